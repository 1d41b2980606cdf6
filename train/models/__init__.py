"""Load models with their tokenizers from a run, a folder or a file, and generate text."""

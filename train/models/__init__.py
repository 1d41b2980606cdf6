"""Models with their tokenizers, loaded from a run, a folder or a file, and text from them."""

"""A model with its tokenizer: from a run, a folder, or a file."""

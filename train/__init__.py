"""The loop that trains the architectures of this project."""

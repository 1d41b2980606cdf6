"""Auditing: find what a model knows but does not say, by reading activations or by prompting."""

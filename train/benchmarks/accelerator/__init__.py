"""A benchmark of one accelerator in parts, which writes each measurement to disk at once.

It needs only jax, flax, optax, orbax-checkpoint, numpy and tokenizers with their dependencies.
"""

"""Benchmark of one GPU or TPU in parts, which writes each measurement to disk when it is done.

Required packages are only jax, flax, optax, orbax-checkpoint, numpy and tokenizers with their
dependencies.
"""

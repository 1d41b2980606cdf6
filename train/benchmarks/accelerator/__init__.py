"""What one accelerator does, part by part, each written to disk as soon as it is known.

Only jax, flax, optax, orbax-checkpoint, numpy and tokenizers are needed, and what these bring.
"""

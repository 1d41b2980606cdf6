"""The small models and inputs that the tests share, so that compiled programs are shared too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from thoughtbubbles import ModelConfig, Thoughtbubbles, TopK

VOCAB = 17
BASE = ModelConfig(
    vocab_size=VOCAB,
    embed_dim=16,
    num_layers=4,
    num_heads=2,
    fork_layers=(1, 2, 3),
    policy=TopK(1.5),
    score_originals=True,
)


@functools.cache
def heavy_model(config: ModelConfig, seed: int = 0) -> Thoughtbubbles:
    """A model whose parameters are all far from their initial values, fork scores above all.

    Not under `jit`: models of other configs then share the programs of each parameter's shape.
    """
    keys = iter(jax.random.split(jax.random.key(seed), 200))

    def shake(path, leaf):
        if "threshold" in jax.tree_util.keystr(path):
            return leaf + 0.3
        scale = 0.6 if "score" in jax.tree_util.keystr(path) else 0.2
        return leaf + scale * jax.random.normal(next(keys), leaf.shape)

    return jax.tree_util.tree_map_with_path(shake, Thoughtbubbles(config, rngs=nnx.Rngs(seed)))


def random_tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, shape), jnp.int32)


@jax.jit
def logits_of(model: Thoughtbubbles, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    return model(tokens, mask)


@jax.jit
def run(model: Thoughtbubbles, tokens: jax.Array, length: jax.Array | None = None):
    return model.run(tokens, length)

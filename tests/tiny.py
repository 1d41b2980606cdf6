"""The small models and inputs that the tests share, so that compiled programs are shared too."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import reference
from flax import nnx

from thoughtbubbles import ModelConfig, Streams, Thoughtbubbles, TopK

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
# Half as many blocks to compile, where what is tested is not how many there are.
SMALL = dataclasses.replace(BASE, num_layers=2, fork_layers=(0, 1))


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


@functools.cache
def quick_model(config: ModelConfig, seed: int = 0) -> Thoughtbubbles:
    """As `heavy_model`, of other numbers: made by NumPy, so that nothing at all is compiled."""
    shapes = nnx.eval_shape(lambda: Thoughtbubbles(config, rngs=nnx.Rngs(seed)))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if "threshold" in name:
            return jax.device_put(np.float32(0.3))  # unlike jnp.asarray, nothing to compile
        start = 1.0 if "scale" in name else (config.fork_gate or 0.0) * name.endswith("['gate']")
        values = start + (0.6 if "score" in name else 0.2) * rng.normal(size=leaf.shape)
        return jax.device_put(values.astype(np.float32))

    params = nnx.to_pure_dict(nnx.state(shapes))
    return Thoughtbubbles.from_params(config, jax.tree_util.tree_map_with_path(draw, params))


def random_tokens(*shape: int, seed: int = 0) -> jax.Array:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, shape)
    return jax.device_put(tokens.astype(np.int32))


@jax.jit
def logits_of(model: Thoughtbubbles, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    return model(tokens, mask)


@jax.jit
def run(model: Thoughtbubbles, tokens: jax.Array, length: jax.Array | None = None):
    return model.run(tokens, length)


@jax.jit
def forked(model: Thoughtbubbles, tokens: jax.Array, length: jax.Array):
    """Streams and originals behind each fork layer of a model without its blocks: soon compiled."""
    streams, found = Streams.start(model.embed_tokens(tokens), length), []
    for fork in model.forks:
        streams = fork(streams)
        found.append((streams, streams.original))
    return found


@functools.cache
def _params(config: ModelConfig, seed: int) -> dict[str, Any]:
    return reference.in_float64(nnx.to_pure_dict(nnx.state(quick_model(config, seed))))


def by_reference(config: ModelConfig, ids: Sequence[int], seed: int = 0) -> reference.Trace:
    """What `quick_model` makes of one row, in double precision and without compiling."""
    return reference.forward(_params(config, seed), config, ids)


def bubbles_by_reference(
    config: ModelConfig, ids: Sequence[int], seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Streams of each token behind each fork layer, and their mean score p: both `[F, T]`."""
    tokens, streams, scores = list(range(len(ids))), [], []
    for fork in by_reference(config, ids, seed).forks:
        p = [np.exp(fork.log_scores[2 * parent + (not is_fork)]) for parent, is_fork in fork.kept]
        tokens = [tokens[parent] for parent, _ in fork.kept]
        streams.append(np.bincount(tokens, minlength=len(ids)))
        scores.append(np.bincount(tokens, p, minlength=len(ids)) / np.maximum(streams[-1], 1))
    return np.array(streams), np.array(scores)

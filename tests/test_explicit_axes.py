"""The modules under explicit axes, which are JAX's default, under auto ones, and in `shard_map`.

Rows are sharded and parameters replicated: nothing is gathered, and each row is what it is alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import BASE

from thoughtbubbles import Architecture, Fork, PrefixRank, Streams, Thoughtbubbles, Threshold, merge
from thoughtbubbles.hatchling import Hatchling, HatchlingConfig
from thoughtbubbles.hatchling.forking import ForkingHatchling, ForkingHatchlingConfig
from thoughtbubbles.placement import broadcast_beside, embedding_rows, placed_beside, zeros_beside
from train.cli.config_json import POLICIES

ROWS, TOKENS, WIDTH = 8, 12, 16
SHARDED = PartitionSpec("rows")
LENGTH = np.array([12, 3, 0, 7, 12, 1, 9, 5], np.int32)
KINDS = [(AxisType.Explicit, 8), ("manual", 8)]


def on_mesh(call: Any, kind: Any, devices: int, module: Any, *rows: Any) -> tuple[Any, str]:
    """Result of a call whose rows are sharded, and its compiled program as text."""
    axis = AxisType.Explicit if kind == "manual" else kind
    mesh = jax.make_mesh((devices,), ("rows",), axis_types=(axis,), devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        rows = jax.device_put(rows, NamedSharding(mesh, SHARDED))
        if kind == "manual":
            specs = (PartitionSpec(), *[SHARDED] * len(rows))
            call = jax.shard_map(call, in_specs=specs, out_specs=SHARDED)
        compiled = jax.jit(call).lower(module, *rows).compile()
        return compiled(module, *rows), compiled.as_text()


def residuals(seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(ROWS, TOKENS, WIDTH)), jnp.float32)


def forked(forks: Any, x: jax.Array, length: jax.Array) -> jax.Array:
    streams = Streams.start(x, length)
    for fork in forks:
        streams = fork(streams)
    return merge(streams)


WINDOW = PrefixRank(2.0, 3)
EVERY = [*(kind(1.5) for kind in POLICIES.values()), WINDOW]


@pytest.mark.parametrize(
    ("policy", "kind", "devices"),
    [*((policy, *kind) for policy in EVERY for kind in KINDS), (WINDOW, AxisType.Auto, 2)],
    ids=str,
)
def test_forks_and_merge_are_bit_for_bit_those_of_one_device(policy, kind, devices):
    forks = [Fork(WIDTH, policy, rngs=nnx.Rngs(seed)) for seed in range(2)]
    x = residuals()
    found, program = on_mesh(forked, kind, devices, forks, x, LENGTH)
    np.testing.assert_array_equal(found, jax.jit(forked)(forks, x, LENGTH))
    assert not any(word in program for word in ("all-gather", "all-to-all", "all-reduce"))


def test_eager_calls_need_no_jit():
    forks = [Fork(WIDTH, WINDOW, rngs=nnx.Rngs(0))]
    mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        rows = jax.device_put((residuals(), LENGTH), NamedSharding(mesh, SHARDED))
        found = forked(forks, *rows)
    assert jax.typeof(found).sharding.spec == PartitionSpec("rows", None, None)
    expected = jax.jit(forked)(forks, residuals(), LENGTH)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def losses(model: Any, tokens: jax.Array, length: jax.Array) -> jax.Array:
    return model.log_prob(model.run(tokens, length), tokens).sum(axis=1)


def gradients(model: Any, tokens: jax.Array, length: jax.Array) -> Any:
    grads = nnx.grad(lambda model: losses(model, tokens, length).sum())(model)
    return nnx.state(grads, nnx.Param)


MODELS: dict[str, dict[str, Any]] = {
    "plain": {"fork_layers": ()},
    "rank, scanned": {"policy": PrefixRank(2.0), "scan_layers": True, "remat": "full"},
    "threshold, probability": {"policy": Threshold(2.0), "merge": "probability"},
}


def decoded(model: Any, tokens: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits after prompts, and after one more token."""
    cache = model.init_cache(ROWS, TOKENS + 4)
    output, cache = model.advance(cache, tokens, length, fresh=True)
    more, _ = model.advance(cache, tokens[:, :1], jnp.ones_like(length))
    return model.logits_at(output, length - 1), model.logits_at(more, jnp.zeros_like(length))


def architecture(name: str) -> Architecture:
    if name in MODELS:
        config = dataclasses.replace(
            BASE,
            vocab_size=64,
            embed_dim=WIDTH,
            num_layers=2,
            **{"fork_layers": (1,), **MODELS[name]},
        )
        return Thoughtbubbles(config, rngs=nnx.Rngs(0))
    small: dict[str, Any] = {
        "vocab_size": 64, "embed_dim": WIDTH, "num_neurons": 64, "num_layers": 2, "num_heads": 2
    }  # fmt: skip
    if name == "forks":
        forking = ForkingHatchlingConfig(**small, fork_layers=(1,), policy=PrefixRank(2.0))
        return ForkingHatchling(forking, rngs=nnx.Rngs(0))
    return Hatchling(HatchlingConfig(**small, form=name, chunk=5), rngs=nnx.Rngs(0))


SCANNED = pytest.param("rank, scanned", marks=pytest.mark.experiment)


@pytest.mark.parametrize(
    "name", ["plain", SCANNED, "threshold, probability", "released", "paper", "forks"]
)
def test_models_their_caches_and_their_gradients(name):
    model = architecture(name)
    tokens = np.random.default_rng(0).integers(0, 64, (ROWS, TOKENS)).astype(np.int32)
    length = np.maximum(LENGTH, 1)

    def forward(model: Any, tokens: jax.Array, length: jax.Array) -> Any:
        return losses(model, tokens, length), decoded(model, tokens, length)

    for call in (forward, gradients):
        found, program = on_mesh(call, AxisType.Explicit, 2, model, tokens, length)
        assert "all-gather" not in program
        assert ("all-reduce" in program) == (call is gradients)
        expected = jax.jit(call)(model, tokens, length)
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_arrays_beside_others_without_a_mesh():
    x, table = residuals(), jnp.arange(12.0).reshape(6, 2)
    np.testing.assert_array_equal(
        broadcast_beside(jnp.arange(TOKENS), x, 2), np.tile(np.arange(TOKENS), (ROWS, 1))
    )
    assert zeros_beside(x, (ROWS, 5), jnp.int32).shape == (ROWS, 5)
    assert placed_beside(table, x) is table
    index = jnp.array([[0, 5], [-1, 6]])
    np.testing.assert_array_equal(embedding_rows(table, index), jnp.take(table, index, axis=0))

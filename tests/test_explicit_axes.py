"""Modules and trainer under explicit axes, which are JAX's default, auto ones, and `shard_map`.

Rows are sharded and parameters replicated: nothing is gathered, and each row is what it is alone.
More of each kind: `python -m pytest -m experiment tests/test_explicit_axes.py`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import BASE

from thoughtbubbles import (
    ArchitectureConfig,
    Fork,
    PrefixRank,
    Streams,
    Threshold,
    TopK,
    attention,
    branches,
    forking,
    head,
    merge,
    prefill,
    token_slots,
)
from thoughtbubbles.architecture import architecture_of
from thoughtbubbles.decoding import generate
from thoughtbubbles.hatchling import HatchlingConfig
from thoughtbubbles.hatchling.forking import ForkingHatchlingConfig
from thoughtbubbles.module import abstract_module
from thoughtbubbles.placement import broadcast_beside, embedding_rows, placed_beside, zeros_beside
from train.devices.mesh import place
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable
from train.engine.step import make_train_step

ROWS, TOKENS, WIDTH = 8, 12, 16
SHARDED = PartitionSpec("rows")
LENGTH = np.array([12, 3, 0, 7, 12, 1, 9, 5], np.int32)


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


WINDOW, WINDOWLESS = PrefixRank(2.0, 3), PrefixRank(1.5)
EVERY = [TopK(1.5), PrefixRank(1.5), Threshold(1.5), WINDOW]


@pytest.mark.parametrize(
    ("policy", "kind", "devices"),
    [(policy, AxisType.Explicit, 8) for policy in EVERY if policy != WINDOWLESS]
    + [(WINDOW, "manual", 8)]
    + [pytest.param(WINDOWLESS, AxisType.Explicit, 8, marks=pytest.mark.experiment)]
    + [pytest.param(policy, "manual", 8, marks=pytest.mark.experiment) for policy in EVERY[:-1]]
    + [pytest.param(WINDOW, AxisType.Auto, 2, marks=pytest.mark.experiment)],
    ids=str,
)
def test_forks_and_merge_are_bit_for_bit_those_of_one_device(policy, kind, devices):
    forks = [Fork(WIDTH, policy, rngs=nnx.Rngs(seed)) for seed in range(2)]
    x = residuals()
    found, program = on_mesh(forked, kind, devices, forks, x, LENGTH)
    np.testing.assert_array_equal(found, jax.jit(forked)(forks, x, LENGTH))
    assert not any(word in program for word in ("all-gather", "all-to-all", "all-reduce"))


@pytest.mark.experiment  # 80 small programs; under jit, placed by the same lines: above
@pytest.mark.parametrize("policy", [TopK(1.5), WINDOW], ids=str)
def test_eager_calls_need_no_jit(policy):
    forks = [Fork(WIDTH, policy, rngs=nnx.Rngs(0))]
    mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        rows = jax.device_put((residuals(), LENGTH), NamedSharding(mesh, SHARDED))
        found = forked(forks, *rows)
    assert jax.typeof(found).sharding.spec == PartitionSpec("rows", None, None)
    expected = jax.jit(forked)(forks, residuals(), LENGTH)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_cache_that_was_placed_nowhere_stands_beside_what_is_written():
    def write(x: jax.Array) -> jax.Array:
        streams = Streams.start(x, first=jnp.zeros(ROWS, jnp.int32))
        return token_slots(streams, TOKENS).write(jnp.zeros((ROWS, TOKENS, WIDTH)), streams.x)

    mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, SHARDED)
        x = jax.ShapeDtypeStruct((ROWS, 3, WIDTH), jnp.float32, sharding=place)
        found = jax.eval_shape(write, x)
    assert found.sharding.spec == PartitionSpec("rows", None, None)


SMALL = dataclasses.replace(BASE, vocab_size=64, num_layers=1, fork_layers=(0,))
HATCHLING: dict[str, Any] = {
    "vocab_size": 64, "embed_dim": WIDTH, "num_neurons": 64, "num_layers": 1, "num_heads": 2
}  # fmt: skip
MODELS: dict[str, ArchitectureConfig] = {
    "plain": dataclasses.replace(SMALL, fork_layers=()),
    "top-k": SMALL,
    "rank, scanned": dataclasses.replace(
        SMALL,
        num_layers=2,
        fork_layers=(1,),
        policy=PrefixRank(2.0),
        scan_layers=True,
        remat="full",
    ),
    "threshold": dataclasses.replace(
        SMALL,
        policy=Threshold(2.0),
        merge="probability",
        remat="dots",
        mlp_dim=ROWS * 2 * (TOKENS - 1),  # a kernel of as many rows as a training step has slots
    ),
    "released": HatchlingConfig(**HATCHLING, form="released", chunk=5),
    "paper": HatchlingConfig(**HATCHLING, form="paper"),
    "rank": ForkingHatchlingConfig(**HATCHLING, fork_layers=(0,), policy=PrefixRank(2.0)),
}
SCANNED = pytest.param("rank, scanned", marks=pytest.mark.experiment)
MORE = [pytest.param("released", marks=pytest.mark.experiment)]  # the blocks of "rank"
THRESHOLD = pytest.param("threshold", marks=pytest.mark.experiment)
RANK = pytest.param("rank", marks=pytest.mark.experiment)
PLAINER = [pytest.param(name, marks=pytest.mark.experiment) for name in ("plain", "top-k")]
TEXT = np.random.default_rng(0).integers(0, 64, (ROWS, TOKENS)).astype(np.int32)


@functools.cache
def weights(name: str) -> Any:
    """Made by NumPy: nothing is compiled."""
    model = abstract_module(lambda: architecture_of(MODELS[name])(MODELS[name], rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    draw = lambda leaf: (0.2 * rng.normal(size=leaf.shape)).astype(leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, nnx.state(model))


def assert_close(ours: Any, theirs: Any) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


# "threshold": its step and its logits below.
@pytest.mark.parametrize("name", ["paper", "rank", THRESHOLD, *MORE, SCANNED])
def test_models_and_their_caches(name):
    def forward(weights: Any, tokens: jax.Array, length: jax.Array) -> Any:
        model = architecture_of(MODELS[name]).from_params(MODELS[name], weights)
        output, cache = model.advance(
            model.init_cache(ROWS, TOKENS + 4), tokens, length, fresh=True
        )
        more, _ = model.advance(cache, tokens[:, :1], jnp.ones_like(length))
        log_probs = model.log_prob(model.run(tokens, length), tokens)
        after = model.logits_at(output, length - 1), model.logits_at(more, jnp.zeros_like(length))
        return log_probs, after

    rows = TEXT, np.maximum(LENGTH, 1)
    given = nnx.to_pure_dict(weights(name))
    found, program = on_mesh(forward, AxisType.Explicit, 2, given, *rows)
    assert not any(word in program for word in ("all-gather", "all-to-all", "all-reduce"))
    assert_close(found, jax.jit(forward)(given, *rows))


def test_logits_that_mix_predictions_and_limits_of_large_passes(monkeypatch):
    """All of `logits`, and, as for passes beyond every limit, log-probabilities and gradients."""
    for module, name, limit in (
        (head, "LARGEST_LOGITS", 4 * ROWS * TOKENS * 16),
        (head, "SMALLEST_CHUNK", 16),
        (attention, "LARGEST_PROBABILITIES", 0),
        (attention, "LARGEST_TILE", 2**10),
        (attention, "SMALLEST_TILE", 1),
        (forking, "LARGEST_MEMBERSHIP", 0),
    ):
        monkeypatch.setattr(module, name, limit)

    def everything(weights: Any, tokens: jax.Array, length: jax.Array) -> Any:
        model = architecture_of(MODELS["threshold"]).from_params(MODELS["threshold"], weights)

        def log_prob(x: jax.Array) -> Any:
            streams = model.run_residuals(x, length).streams
            found = model.log_prob(streams, tokens)
            real = jnp.arange(TOKENS) < length[:, None]
            total = jnp.where(real, found, 0).sum() + (merge(streams) ** 2).sum()
            return total, (found, model.logits(streams), merge(streams, "rightmost"))

        embedded = model.embed_tokens(tokens)
        gradient, found = jax.grad(log_prob, has_aux=True)(embedded)
        return gradient, found

    rows, given = (TEXT, np.maximum(LENGTH, 1)), nnx.to_pure_dict(weights("threshold"))
    expected = jax.jit(lambda *args: everything(*args))(given, *rows)
    found, program = on_mesh(everything, AxisType.Explicit, 2, given, *rows)
    assert not any(word in program for word in ("all-gather", "all-to-all"))
    assert_close(found, expected)


@pytest.mark.parametrize("name", ["threshold", RANK, *PLAINER, *MORE, SCANNED])
def test_a_training_step_is_that_of_one_device(name):
    """Gradients are read from Adam's first moment, (1 - b1) g, after a step that clips nothing.

    Axes that could split parameters have one device.
    """
    optimizer = OptimizerConfig(clip=1e9)
    rows = np.where(np.arange(TOKENS) < np.maximum(LENGTH, 2)[:, None], TEXT, -1)
    found = []
    for devices, axes in ((1, AxisType.Auto), (2, AxisType.Explicit)):
        mesh = jax.make_mesh(
            (devices, 1, 1),
            ("data", "fsdp", "tensor"),
            axis_types=(axes,) * 3,
            devices=jax.devices()[:devices],
        )
        with jax.set_mesh(mesh):
            trainable = make_trainable(MODELS[name], optimizer, 10, mesh)
            zeros = lambda leaf: np.zeros(leaf.shape, leaf.dtype)  # noqa: E731
            state = jax.tree.map(zeros, trainable.abstract.rest).with_variables(weights(name))
            state, batch = jax.device_put(state, trainable.shardings), place(rows, mesh)
            step = make_train_step(trainable).lower(state, batch).compile()
            state, metrics = step(state, batch)
            found.append((metrics, state.opt_state[1][0].mu, state.tracked))
    program = step.as_text()
    assert "all-reduce" in program and "all-gather" not in program and "all-to-all" not in program
    np.testing.assert_allclose(found[1][0]["loss"], found[0][0]["loss"], rtol=1e-6)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(found[0][1])) > 1e-3
    assert_close(*jax.device_get(found[::-1]))


def test_arrays_beside_others_without_a_mesh():
    x, table = residuals(), jnp.arange(12.0).reshape(6, 2)
    np.testing.assert_array_equal(
        broadcast_beside(jnp.arange(TOKENS), x, 2), np.tile(np.arange(TOKENS), (ROWS, 1))
    )
    assert zeros_beside(x, (ROWS, 5), jnp.int32).shape == (ROWS, 5)
    assert placed_beside(table, x) is table
    index = jnp.array([[0, 5], [-1, 6]])
    unknown = [[np.nan, np.nan]] * 2
    np.testing.assert_array_equal(embedding_rows(table, index), [[[0, 1], [10, 11]], unknown])


def test_branches_stay_where_their_rows_are(monkeypatch):
    """Their weights in parts, computed again in the backward pass."""
    monkeypatch.setattr(attention, "LARGEST_PROBABILITIES", 0)
    monkeypatch.setattr(branches, "LARGEST_BRANCHES", 2 * ROWS * 4 * 2 * 4 * (5 + 4))

    def slopes(weights: Any, prefix: jax.Array, length: jax.Array, x: jax.Array) -> Any:
        model = architecture_of(MODELS["plain"]).from_params(MODELS["plain"], weights)

        def states(*vectors: jax.Array) -> Any:
            found = model.backbone().branch_states(vectors[0], length, vectors[1])
            return (found**2).sum(), found

        return jax.grad(states, (0, 1), has_aux=True)(prefix, x)

    rng = np.random.default_rng(0)
    prefix, x = (rng.normal(size=(ROWS, *s, WIDTH)).astype("f4") for s in ((5,), (2, 4)))
    rows, given = (prefix, LENGTH % 6, x), nnx.to_pure_dict(weights("plain"))
    expected = jax.jit(lambda *args: slopes(*args))(given, *rows)
    found, program = on_mesh(slopes, AxisType.Explicit, 2, given, *rows)
    assert not any(word in program for word in ("all-gather", "all-to-all", "all-reduce"))
    assert_close(found, expected)


def test_prompts_in_blocks_before_a_split_vocabulary(monkeypatch):
    given = nnx.to_pure_dict(weights("plain"))
    model = architecture_of(MODELS["plain"]).from_params(MODELS["plain"], given)
    prompts = [[1] * 40, [2] * 33]
    expected = generate(model, prompts, 2)
    for name, value in {"BLOCK": 32, "SMALLEST_BLOCK": 16, "LARGEST_WHOLE": 0}.items():
        monkeypatch.setattr(prefill, name, value)
    mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        graph, arrays = nnx.split(model)
        split = lambda x: SHARDED if x.shape[:1] == (64,) else PartitionSpec()  # noqa: E731
        arrays = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, split(x))), arrays)
        assert generate(nnx.merge(graph, arrays), prompts, 2) == expected

"""The train step: meshes, accumulation, parameter groups, compilation, collectives.

More settings on a mesh: `python -m pytest -m experiment tests/test_step.py`.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tiny import BASE

from thoughtbubbles import Fork, PrefixRank, Streams, Threshold, TopK
from thoughtbubbles.statistics import fork_statistics, readable, score_samples
from train.devices.mesh import (
    MeshConfig,
    batch_sharding,
    check_batch,
    make_mesh,
    place,
    place_local,
    rows_here,
    rows_on,
)
from train.engine.optim import OptimizerConfig, make_schedule, muon_dimensions
from train.engine.state import make_trainable
from train.engine.step import make_train_step

CONFIG = dataclasses.replace(BASE, vocab_size=32, num_layers=2, fork_layers=(0, 1))
TRACKED = dataclasses.replace(CONFIG, policy=Threshold(1.5), num_layers=1, fork_layers=(0,))
ADAMW = OptimizerConfig(learning_rate=1e-2)
COLLECTIVE = re.compile(r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)")


def batches(count, rows=16, length=13):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (count, rows, length)).astype(np.int32)
    tokens[:, ::3, 9:] = -1  # unequal weights
    return tokens


@functools.cache
def program(mesh_config=None, devices=8, accumulate=1, optimizer=ADAMW, config=CONFIG):
    """What is trained and its step, compiled once for all tests that take the same."""
    mesh = make_mesh(mesh_config or MeshConfig(), jax.devices()[:devices])
    trainable = make_trainable(config, optimizer, steps=10, mesh=mesh)
    return trainable, make_train_step(trainable, accumulate)


def run_steps(*, inputs=None, **how):
    trainable, step = program(**how)
    state = trainable.init()
    first = jax.device_get(state.params)
    losses = []
    for tokens in batches(4) if inputs is None else inputs:
        state, metrics = step(state, place(tokens, trainable.mesh))
        losses.append(float(metrics["loss"]))
    return first, losses, jax.device_get(state.params), step


def tracked_run(*, inputs=None, **how):
    """Losses and thresholds `[steps, F]` of a `Threshold` model."""
    trainable, step = program(config=TRACKED, **how)
    state = trainable.init()
    losses, thresholds = [], []
    for tokens in batches(4) if inputs is None else inputs:
        state, metrics = step(state, place(tokens, trainable.mesh))
        losses.append(float(metrics["loss"]))
        thresholds.append(np.asarray(metrics["aux"]["threshold"]))
        np.testing.assert_array_equal(jax.tree.leaves(state.tracked), thresholds[-1])
    assert step._cache_size() == 1
    return np.array(losses), np.array(thresholds)


def assert_close(ours, theirs, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def one_device():
    return run_steps(devices=1)


@pytest.fixture(scope="module")
def one_device_tracked():
    return tracked_run(devices=1)


@pytest.mark.parametrize(
    ("sizes", "accumulate"),
    [((2, 2, 2), 2), pytest.param((4, 1, 2), 1, marks=pytest.mark.experiment)],
    ids=str,
)
def test_a_mesh_gives_the_loss_of_one_device(one_device, sizes, accumulate):
    """Whole batches on a mesh: with thresholds below; by two processes: `test_distributed.py`."""
    how = {"mesh_config": MeshConfig(*sizes), "accumulate": accumulate}
    first, losses, _, step = run_steps(**how)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(one_device[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(losses, one_device[1], rtol=1e-5)
    assert step._cache_size() == 1, "the step compiles once"


def test_the_step_learns_and_compiles_once():
    _, losses, _, step = run_steps(devices=1, inputs=[batches(1)[0]] * 30)
    assert losses[-1] < losses[0] - 0.3
    assert step._cache_size() == 1


@pytest.mark.experiment  # the settings without a mesh: `test_model.py`
def test_large_model_settings_train(one_device):
    """bfloat16, scanned layers and rematerialisation on a mesh stay near float32 on one device."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16", scan_layers=True, remat="dots")
    _, losses, params, _ = run_steps(mesh_config=MeshConfig(2, 2, 2), config=config)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(losses, one_device[1], rtol=5e-3)


@pytest.mark.experiment  # the mesh above has parts too
def test_accumulation_has_the_true_denominator(one_device):
    """Rows have unequal numbers of targets: a mean of means would differ."""
    _, losses, params, _ = run_steps(devices=1, accumulate=4)
    np.testing.assert_allclose(losses, one_device[1], rtol=1e-5)
    assert_close(params, one_device[2], 2e-5)


def test_weights_that_sum_below_one_are_divided_by_their_sum():
    """The scale of all weights together changes nothing: here of a loss that is soon compiled."""
    config = dataclasses.replace(CONFIG, num_layers=1, fork_layers=())
    trainable = make_trainable(config, ADAMW, 10, make_mesh(MeshConfig(), jax.devices()[:1]))
    state, found = trainable.init(), {}

    def loss(model, batch, key):
        weight = batch["scale"].sum() * 3
        return weight * jnp.square(model.embed[...]).sum(), weight, {}

    step = make_train_step(trainable, 1, loss)
    for scale in (1.0, 1e-4):
        batch = {"scale": place(np.full((4, 2), scale / 8, np.float32), trainable.mesh)}
        copy = jax.tree.map(jnp.copy, state)  # a step takes its arrays
        found[scale] = jax.device_get(step(copy, batch)[1])
    embed = np.asarray(state.params["embed"])
    np.testing.assert_allclose(found[1e-4]["loss"], np.square(embed).sum(), rtol=1e-5)
    for metrics in found.values():
        np.testing.assert_allclose(metrics["grad_norm"], 2 * np.linalg.norm(embed), rtol=1e-4)


@pytest.mark.experiment  # of two devices: `test_explicit_axes.py`
def test_a_mesh_tracks_the_thresholds_of_one_device(one_device_tracked):
    losses, thresholds = tracked_run(mesh_config=MeshConfig(2, 2, 2))
    np.testing.assert_allclose(losses, one_device_tracked[0], rtol=1e-5)
    np.testing.assert_allclose(thresholds, one_device_tracked[1], atol=1e-6)
    assert (np.diff(thresholds, axis=0) > 1e-3).all(), "they rise from 0"


def test_accumulation_tracks_the_mean_of_its_parts():
    """Parts of equally long rows: the mean over parts is the mean over rows."""
    inputs = np.abs(batches(2))
    _, whole = tracked_run(devices=1, inputs=inputs)
    _, parts = tracked_run(devices=1, inputs=inputs, accumulate=4)
    assert (np.diff(whole, axis=0) > 1e-3).all(), "they rise from 0"
    np.testing.assert_allclose(parts[0], whole[0], atol=1e-6)  # later the weights differ by noise
    np.testing.assert_allclose(parts, whole, atol=1e-4)


def test_thresholds_are_no_parameters():
    """The optimizer has no moments of them; other policies have no thresholds at all."""
    trainable = make_trainable(TRACKED, ADAMW, 10, make_mesh(MeshConfig(2, 2, 2)))
    state = trainable.abstract
    assert len(jax.tree.leaves(state.tracked)) == 1
    moments = state.opt_state[1][0].mu
    assert jax.tree.structure(moments) == jax.tree.structure(state.params)
    assert len(jax.tree.leaves(state.variables)) == len(jax.tree.leaves(state.params)) + 1
    for policy in (TopK(1.5), PrefixRank(1.5)):
        config = dataclasses.replace(CONFIG, policy=policy)
        state = make_trainable(config, ADAMW, 10, make_mesh(MeshConfig(2, 2, 2))).abstract
        assert jax.tree.structure(state.variables) == jax.tree.structure(state.params)
        assert not jax.tree.leaves(state.tracked)


def test_padding_moves_no_threshold():
    """Neither as three of four micro-batches nor as a whole batch."""
    same = np.repeat(batches(1)[0][:4], 4, axis=0)  # every part i::4 is these four rows
    _, expected = tracked_run(devices=1, inputs=[same], accumulate=4)
    padded = same.copy()
    padded[np.arange(16) % 4 > 0] = -1
    _, found = tracked_run(devices=1, inputs=[padded, np.full_like(same, -1)], accumulate=4)
    np.testing.assert_allclose(found, np.repeat(expected, 2, axis=0), atol=1e-6)


def test_padding_only_batch_is_no_step():
    trainable, step = program(devices=1)
    padding = np.full_like(batches(1)[0], -1)
    _, metrics = step(trainable.init(), place(padding, trainable.mesh))
    assert float(metrics["loss"]) == 0.0 and float(metrics["grad_norm"]) == 0.0


def test_muon_takes_hidden_matrices_only():
    trainable = make_trainable(
        CONFIG, OptimizerConfig(name="muon"), 10, make_mesh(MeshConfig(), jax.devices()[:1])
    )
    flat = jax.tree_util.tree_leaves_with_path(
        trainable.abstract.params, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    by_muon = {
        jax.tree_util.keystr(path, simple=True, separator="/"): muon_dimensions(variable)
        for path, variable in flat
        if muon_dimensions(variable) is not None
    }
    assert set(by_muon) == {
        f"blocks/{name}"
        for name in (
            "attention/q",
            "attention/k",
            "attention/v",
            "attention/o",
            "mlp/up",
            "mlp/down",
        )
    }
    # q is [layers, embed, heads, head_dim]: one matrix per layer from embed to heads x head_dim.
    assert by_muon["blocks/attention/q"].reduction_axis == (1,)
    assert by_muon["blocks/attention/q"].output_axis == (2, 3)
    assert by_muon["blocks/attention/o"].reduction_axis == (1, 2)
    assert by_muon["blocks/attention/o"].output_axis == (3,)


def test_muon_update_is_orthogonal_per_layer_and_learns():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = OptimizerConfig(name="muon", weight_decay=0.0, warmup=0.0, learning_rate=0.01)
    trainable = make_trainable(CONFIG, optimizer, 100, mesh)
    params = trainable.init().params
    rng = np.random.default_rng(0)  # none of its singular values is tiny: those stay so
    grads = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
    updates, _ = second_update(trainable, grads, params)  # the warm-up's step 0 is 0
    query = np.asarray(nnx.to_pure_dict(updates)["blocks"]["attention"]["q"]).reshape(2, 16, 16)
    spread = np.linalg.svd(query, compute_uv=False)
    assert (spread.max(axis=1) / spread.min(axis=1) < 3).all()
    plain = dataclasses.replace(CONFIG, num_layers=1, fork_layers=())
    how = {"devices": 1, "optimizer": optimizer, "config": plain}
    _, losses, _, _ = run_steps(**how, inputs=[batches(1)[0]] * 10)
    assert losses[-1] < losses[0] - 0.1


def second_update(trainable, grads, params):
    """Updates of the second step, and the parameters after it."""

    @jax.jit
    def twice(grads, params):
        _, state = trainable.optimizer.update(grads, trainable.optimizer.init(params), params)
        updates, _ = trainable.optimizer.update(grads, state, params)
        return updates, optax.apply_updates(params, updates)

    return twice(grads, params)


def test_weight_decay_spares_vectors():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = OptimizerConfig(weight_decay=0.5, warmup=0.0, learning_rate=0.1, final_ratio=1.0)
    trainable = make_trainable(CONFIG, optimizer, 100, mesh)
    params = trainable.init().params
    zeros = jax.tree.map(np.zeros_like, params)
    new = nnx.to_pure_dict(jax.device_get(second_update(trainable, zeros, params)[1]))
    old = nnx.to_pure_dict(jax.device_get(params))
    assert (new["blocks"]["attention_norm"]["scale"] == 1).all()
    assert (new["forks"][0]["embedding"] == old["forks"][0]["embedding"]).all()
    np.testing.assert_allclose(new["embed"], 0.95 * old["embed"], rtol=1e-5)


def test_schedules():
    cosine = make_schedule(OptimizerConfig(learning_rate=1.0, warmup=0.1, final_ratio=0.1), 100)
    assert [float(cosine(s)) for s in (0, 5, 10, 100)] == pytest.approx([0, 0.5, 1, 0.1])
    wsd = OptimizerConfig(learning_rate=1.0, schedule="wsd", warmup=0.1, decay=0.2, final_ratio=0.0)
    wsd = make_schedule(wsd, 100)
    assert [float(wsd(s)) for s in (0, 10, 50, 80, 90, 100)] == pytest.approx([0, 1, 1, 1, 0.5, 0])
    for schedule in ("cosine", "wsd"):
        at_once = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup=0.0)
        rates = [float(make_schedule(at_once, 10)(step)) for step in (0, 5, 10)]
        middle = 0.55 if schedule == "cosine" else 1
        assert rates == pytest.approx([1, middle, 0.1])
    for steps, decay in ((7, 3), (10, 5), (11, 5)):  # 3.5 and 5.5 are rounded up, and do not fit
        halves = OptimizerConfig(learning_rate=1.0, schedule="wsd", warmup=0.5, decay=0.5)
        halves = make_schedule(halves, steps)
        rates = [float(halves(step)) for step in range(steps - decay, steps + 1)]
        assert rates == pytest.approx(np.linspace(1, 0.1, decay + 1).tolist())
    with pytest.raises(ValueError, match="warmup=0.6 and decay=0.5 exceed the run"):
        OptimizerConfig(schedule="wsd", warmup=0.6, decay=0.5)
    unknown: Any = {"schedule": "constant"}
    with pytest.raises(ValueError, match="schedule='constant': choose one of cosine, wsd"):
        OptimizerConfig(**unknown)


def test_no_collective_in_a_fork_layer():
    """Batch-sharded scores, selection, gather and its gradient stay on their device."""
    mesh = make_mesh(MeshConfig())
    fork = Fork(16, TopK(1.5), rngs=nnx.Rngs(0))

    def loss(x, fork):
        streams = fork(fork(Streams.start(x)))
        return streams.x * streams.log_score[..., None]

    def gradient(x, weights, fork):
        return jax.vjp(lambda x: loss(x, fork), x)[1](weights)

    shard = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x = jax.ShapeDtypeStruct((16, 12, 16), jnp.float32, sharding=shard)
    weights = jax.ShapeDtypeStruct((16, 18, 16), jnp.float32, sharding=shard)
    for function, args in ((loss, (x, fork)), (gradient, (x, weights, fork))):
        text = jax.jit(function, out_shardings=shard).lower(*args).compile().as_text()
        assert not COLLECTIVE.findall(text)
    control = jax.jit(lambda x: x.sum(axis=0)).lower(x).compile().as_text()
    assert COLLECTIVE.findall(control), "this test can fail"


def test_parameters_are_sharded_as_the_rules_say():
    trainable = make_trainable(CONFIG, ADAMW, 10, make_mesh(MeshConfig(2, 2, 2)))
    specs = nnx.to_pure_dict(jax.tree.map(lambda s: s.spec, trainable.shardings.params))
    assert specs["embed"] == PartitionSpec("tensor", "fsdp")
    assert specs["blocks"]["attention"]["q"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert specs["blocks"]["mlp"]["down"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["forks"][0]["score"] == PartitionSpec("fsdp", None)
    moments = trainable.shardings.opt_state[1][0].mu
    assert jax.tree.leaves(moments) == jax.tree.leaves(trainable.shardings.params)


def test_mesh_mistakes():
    with pytest.raises(ValueError, match="mesh data=3 fsdp=1 tensor=1 does not fit 8 devices"):
        make_mesh(MeshConfig(data=3))
    with pytest.raises(ValueError, match="batch_size=12 does not divide into accumulate=1 parts"):
        check_batch(12, 1, make_mesh(MeshConfig()))
    with pytest.raises(ValueError, match="vocab=17 does not divide over tensor=2"):
        make_trainable(BASE, ADAMW, 10, make_mesh(MeshConfig(4, 1, 2)))
    assert batch_sharding(make_mesh(MeshConfig(2, 2, 2))).spec == PartitionSpec(("data", "fsdp"))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_one_process_holds_the_whole_batch(sizes):
    assert rows_here(16, make_mesh(MeshConfig(*sizes))).tolist() == list(range(16))


def test_rows_of_some_devices_are_put_where_they_belong():
    """Rows that are no neighbours, as a host of a TPU slice has them."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    mine = [mesh.devices[0, 0, 0], mesh.devices[1, 1, 1]]
    rows = rows_on(mine, 8, mesh)
    assert rows.tolist() == [0, 1, 6, 7]
    batch = np.arange(16).reshape(8, 2)
    placed = place_local(batch, rows_here(8, mesh), 8, mesh)
    np.testing.assert_array_equal(placed, batch)
    for shard in placed.addressable_shards:
        if shard.device in mine:
            at = np.searchsorted(rows, shard.index[0].start or 0)
            np.testing.assert_array_equal(shard.data, batch[rows][at : at + 2])


def test_thresholds_are_reported_by_fork_layer():
    one = {name: np.ones(2) for name in ("tokens", "streams", "forked_tokens")}
    sums = one | {"scores": np.ones((2, 10)), "threshold": np.array([0.25, 0.5])}
    metrics = readable(sums, (1, 2))
    assert (metrics["fork_1/threshold"], metrics["fork_2/threshold"]) == (0.25, 0.5)
    del sums["threshold"]
    assert "fork_1/threshold" not in readable(sums, (1, 2))


def test_fork_statistics_count_what_is_there():
    from tiny import SMALL, quick_model, random_tokens

    @jax.jit
    def run(model, tokens, length):
        output = model.run(tokens, length)
        return output.forks, fork_statistics(output)

    given = random_tokens(3, 12), np.array([12, 5, 0])
    forks, sums = jax.device_get(run(quick_model(SMALL), *given))
    metrics = readable(sums, SMALL.fork_layers)
    last = forks[-1]
    counts = [np.bincount(t[a], minlength=1) for t, a in zip(last.token, last.alive, strict=True)]
    counts = np.concatenate([c[c > 0] for c in counts])
    assert metrics["fork_1/streams_per_token"] == pytest.approx(counts.mean())
    assert metrics["fork_1/forked_share"] == pytest.approx((counts > 1).mean())
    assert sum(metrics["fork_1/score_histogram"]) == pytest.approx(1, abs=1e-5)
    scores = np.exp(last.log_score)[last.alive]
    samples = score_samples(sums, SMALL.fork_layers)["fork_1/score"]
    np.testing.assert_allclose(np.sort(samples), np.sort(scores), atol=0.05 + 1e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_loss_gets_another_key_at_each_step_and_part(parts: int):
    def draw(model, batch, key):
        weight = jnp.float32(batch["rows"].shape[0])
        return weight * jax.random.uniform(key), weight, {}

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config = dataclasses.replace(CONFIG, num_layers=1, fork_layers=())
    trainable = make_trainable(config, ADAMW, steps=10, mesh=mesh, seed=3)
    step, state = make_train_step(trainable, parts, draw), trainable.init()
    for number in range(2):
        state, metrics = step(state, {"rows": place(np.zeros((4, 2), np.int32), mesh)})
        at_step = jax.random.fold_in(jax.random.key(3), number)
        draws = [jax.random.uniform(jax.random.fold_in(at_step, part)) for part in range(parts)]
        assert metrics["loss"] == pytest.approx(float(np.mean(draws)), rel=1e-6)

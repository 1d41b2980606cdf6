"""Meshes and shardings: what is split over what, preset by preset."""

import dataclasses
import math
import os
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import BASE

from train.aot.topology import topology_of
from train.devices.mesh import (
    BATCH_AXES,
    AxisRules,
    MeshConfig,
    check_batch,
    constrain_batch,
    make_mesh,
    rows_on,
)
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable
from train.pretraining.presets import PRESETS
from train.rl.config import RLConfig
from train.rl.job import RLJob

GOLDEN = Path(__file__).parent / "golden"
SIZES = MeshConfig(data=2, fsdp=2, tensor=2)


CONFIG = dataclasses.replace(BASE, vocab_size=32)


def trainable_of(config, optimizer=OptimizerConfig()):  # noqa: B008
    return make_trainable(config, optimizer, 10, make_mesh(SIZES))


def dump(state) -> str:
    """One line for each array: name, shape, the mesh axis of each of its axes."""
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        spec = [*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec))]
        axes = ", ".join("+".join(a) if isinstance(a, tuple) else a or "-" for a in spec)
        lines.append(f"{name} {leaf.dtype}{list(leaf.shape)} ({axes})")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", PRESETS)
def test_sharding_is_what_was_reviewed(name):
    """A change shows as a difference of a text file."""
    run = PRESETS[name]
    found = "mesh data 2 x fsdp 2 x tensor 2\n" + dump(
        trainable_of(run.model, run.optimizer).abstract
    )
    path = GOLDEN / f"sharding_{name}.txt"
    if os.environ.get("WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert found == path.read_text(), (
        "if it is meant: WRITE_GOLDEN=1 python -m pytest tests/test_mesh.py, and look at the diff"
    )


def test_every_matrix_is_split_and_moments_lie_with_their_parameters():
    state = trainable_of(CONFIG).abstract
    params = jax.tree.leaves(state.params)
    moments = state.opt_state[1][0]
    for tree in (moments.mu, moments.nu):
        for moment, param in zip(jax.tree.leaves(tree), params, strict=True):
            assert (moment.shape, moment.sharding) == (param.shape, param.sharding)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        name = jax.tree_util.keystr(path)
        axes = [axis for axis in leaf.sharding.spec if axis]
        matrix = not any(word in name for word in ("bias", "scale", "norm", "embedding", "score"))
        assert axes if not matrix else sorted(axes) == ["fsdp", "tensor"], (name, axes)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_heads": 1}, "attention"),
        ({"num_kv_heads": 1}, "attention"),
        ({"mlp_dim": 33}, "mlp"),
        ({"vocab_size": 17}, "embed"),
    ],
)
def test_a_dimension_that_does_not_divide_is_named(changes, name):
    with pytest.raises(ValueError, match=rf"{name}.*does not divide over tensor=2: choose"):
        trainable_of(dataclasses.replace(CONFIG, **changes))


def test_sizes_must_multiply_to_the_devices():
    for sizes in (MeshConfig(3), MeshConfig(2, 2, 4), MeshConfig(-1, -1), MeshConfig(0)):
        with pytest.raises(ValueError, match="does not fit 8 devices: choose sizes whose product"):
            make_mesh(sizes)


def explicit(sizes: tuple[int, ...], *names: str) -> jax.sharding.Mesh:
    return jax.make_mesh(sizes, names, devices=jax.devices()[: math.prod(sizes)])


@pytest.mark.parametrize(
    ("sizes", "names", "message"),
    [
        ((2,), ("rows",), "mesh rows=2 has axes that the trainer does not know: name them data"),
        ((2,), ("tensor",), "mesh tensor=2 has axes that the trainer does not know"),
        ((2, 2), ("data", "tensor"), "data=2 tensor=2 is explicit.*leave tensor=2 to auto axes"),
        ((2, 2), ("data", "fsdp"), "data=2 fsdp=2 is explicit.*leave fsdp=2 to auto axes"),
    ],
)
def test_meshes_of_users_that_no_run_can_have(sizes, names, message):
    with pytest.raises(ValueError, match=message):
        make_trainable(CONFIG, OptimizerConfig(), 10, explicit(sizes, *names))


def test_a_mesh_of_the_batch_alone_replicates_parameters():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    trainable = make_trainable(CONFIG, OptimizerConfig(), 10, mesh)
    assert not any(any(leaf.sharding.spec) for leaf in jax.tree.leaves(trainable.abstract))
    check_batch(4, 2, mesh)
    with pytest.raises(ValueError, match="data x fsdp = 2 devices"):
        check_batch(4, 4, mesh)


def test_the_mesh_around_is_taken_or_refused():
    mesh = explicit((2,), "data")
    trainable = make_trainable(CONFIG, OptimizerConfig(), 10, mesh)
    with pytest.raises(ValueError, match=r"mesh data=2 is explicit and the mesh around is none: c"):
        trainable.model(trainable.abstract.variables)
    with jax.set_mesh(explicit((4,), "data")), pytest.raises(ValueError, match="around is data=4"):
        trainable.model(trainable.abstract.variables)
    with jax.set_mesh(mesh):
        trainable.model(trainable.abstract.variables)
        assert make_mesh(MeshConfig()) == mesh
        assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1
        with pytest.raises(ValueError, match=r"data=2 fsdp=1 tensor=1 inside jax.set_mesh of dat"):
            make_mesh(MeshConfig(2))
        with pytest.raises(ValueError, match="data=2 is explicit, reinforcement learning needs"):
            RLJob(RLConfig(weights="unused"))


def test_residuals_are_split_over_the_batch_alone():
    mesh = make_mesh(SIZES)
    constrain = constrain_batch(mesh)
    assert constrain is not None
    split = jax.jit(constrain)(jax.numpy.zeros((8, 6, 4)))
    assert split.sharding.is_equivalent_to(NamedSharding(mesh, P(BATCH_AXES)), 3)
    assert constrain_batch(make_mesh(MeshConfig(), jax.devices()[:1])) is None
    assert constrain_batch(explicit((2,), "data")) is None, "types say it"


def test_rules_are_fields():
    """A name of an axis that no rule has is an error, not a replicated array."""
    with pytest.raises(TypeError, match="hads"):
        AxisRules(hads="tensor")  # pyright: ignore[reportCallIssue]


@pytest.mark.skipif(find_spec("libtpu") is None, reason='needs libtpu: pip install -e ".[tpu]"')
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("v5e:16x16", (16, 16, 1)),
        ("v5p:4x4x4", (4, 16, 1)),
        ("v5p:4x4x4", (2, 8, 4)),  # fsdp along a part of a dimension of the torus
        ("v6e:4x4", (1, 16, 1)),
        ("v6e:4x4", (1, 8, 2)),
    ],
)
def test_hosts_of_a_slice_hold_all_rows_between_them(name, sizes):
    """A host has a block of the torus, so its rows of a batch are seldom neighbours."""
    mesh = make_mesh(MeshConfig(*sizes), topology_of(name).devices)
    hosts = {}
    for device in mesh.devices.flat:
        hosts.setdefault(device.process_index, []).append(device)
    held = [rows_on(devices, 1024, mesh) for devices in hosts.values()]
    assert len(held) > 1 and {len(rows) for rows in held} == {len(held[0])}
    assert set(np.concatenate(held).tolist()) == set(range(1024))

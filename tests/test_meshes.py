"""Losses do not depend on the mesh, the number of processes, or where a run is continued.

All of it: `python -m pytest -m experiment tests/test_meshes.py`; CI has a mesh in `test_step.py`,
one that a run goes on on in `test_run_folder.py`, and two processes in `test_distributed.py`.
"""

import dataclasses
import random

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from mesh_runs import MODEL, MORE_STEPS, STEPS, OnMesh, run_config
from processes import free_port, processes

from thoughtbubbles import Threshold
from train.devices.mesh import MeshConfig
from train.pretraining.job import train
from train.runs.checkpoint import Checkpointer

TRACKED = dataclasses.replace(MODEL, policy=Threshold(2.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    (folder / "text").mkdir()
    letters = random.Random(0)
    for index in range(8):
        words = ("".join(letters.choices("abcdefgh", k=4)) for _ in range(300))
        (folder / "text" / f"{index}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="module")
def one_device(folder):
    run = OnMesh(run_config(folder), MeshConfig(1), 1)
    return run.train(run.trainable.init(), STEPS)[1]


@pytest.fixture(scope="module")
def saved(folder):
    """A checkpoint of step 5 on 1 x 4 x 2, and what follows it there."""
    run = OnMesh(run_config(folder), MeshConfig(1, 4, 2), 8)
    state, _ = run.train(run.trainable.init(), 5)
    with Checkpointer(folder / "saved", 1) as checkpointer:
        checkpointer.save(5, state.variables, state.rest, {})
    return run.train(state, MORE_STEPS)[1]


@pytest.fixture(scope="module")
def two_processes(folder, saved):
    """The same steps, begun and continued, by two processes of four devices each."""
    port = str(free_port())
    script = ("tests/mesh_runs.py", str(folder), port)
    with processes(script, folder, devices=4, each=lambda process: [str(process)]) as started:
        assert started.statuses() == [0, 0], started.output(0) + started.output(1)
    return [np.load(folder / f"process-{process}.npz") for process in range(2)]


def assert_same_start(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.experiment
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_steps_on_any_mesh(folder, one_device, sizes):
    run = OnMesh(run_config(folder), MeshConfig(*sizes), 8)
    _, result = run.train(run.trainable.init(), STEPS)
    assert_same_start(result.initial, one_device.initial)
    np.testing.assert_allclose(result.losses, one_device.losses, rtol=1e-5)


@pytest.mark.experiment
def test_steps_with_tracked_thresholds(folder):
    results = []
    for sizes, devices in ((MeshConfig(1), 1), (MeshConfig(2, 2, 2), 8)):
        run = OnMesh(run_config(folder, TRACKED), sizes, devices)
        results.append(run.train(run.trainable.init(), STEPS)[1])
    assert_same_start(results[0].initial, results[1].initial)
    np.testing.assert_allclose(results[1].losses, results[0].losses, rtol=1e-5)


@pytest.mark.experiment
@pytest.mark.parametrize(("sizes", "devices"), [((1, 1, 1), 1), ((8, 1, 1), 8)], ids=str)
def test_going_on_elsewhere(folder, saved, sizes, devices):
    run = OnMesh(run_config(folder), MeshConfig(*sizes), devices)
    state = run.restored(folder / "saved")
    assert int(state.step) == 5
    _, result = run.train(state, MORE_STEPS)
    np.testing.assert_allclose(result.losses, saved.losses, rtol=1e-5)
    np.testing.assert_array_equal(result.rows, saved.rows)


@pytest.mark.experiment
def test_a_run_on_the_mesh_around_it(folder, tmp_path):
    """Also in parts, and continued; explicit axes are those that `jax.make_mesh` makes."""
    results = []
    for axes in (AxisType.Auto, AxisType.Explicit):
        out = str(tmp_path / str(axes))
        config = dataclasses.replace(run_config(folder), out=out, accumulate=2, steps=3)
        mesh = jax.make_mesh((2,), ("data",), axis_types=(axes,), devices=jax.devices()[:2])
        with jax.set_mesh(mesh):
            train(dataclasses.replace(config, steps=2))
            results.append(train(config))
    assert results[1] == pytest.approx(results[0], rel=1e-5)


@pytest.mark.experiment
def test_two_processes_are_one_mesh(two_processes, one_device):
    initial = len(one_device.initial)
    for process in two_processes:
        np.testing.assert_allclose(process["begun"], one_device.losses, rtol=1e-5)
        assert_same_start([process[f"initial-{i}"] for i in range(initial)], one_device.initial)
    np.testing.assert_array_equal(two_processes[0]["begun"], two_processes[1]["begun"])
    assert one_device.losses[-1] < one_device.losses[0] - 0.5, "it learns"


@pytest.mark.experiment
def test_going_on_in_two_processes(two_processes, saved):
    np.testing.assert_array_equal(
        np.concatenate([process["rows"] for process in two_processes], axis=1), saved.rows
    )
    for process in two_processes:
        np.testing.assert_allclose(process["continued"], saved.losses, rtol=1e-5)

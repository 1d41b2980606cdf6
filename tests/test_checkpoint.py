"""Checkpoints survive what happens to runs: kills, full disks, damage, other machines."""

import asyncio
import contextlib
import errno
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint._src.path import temporary_paths
from processes import PATIENCE, QUICK, Process, free_port, processes

from train.runs import checkpoint, checksums
from train.runs.checkpoint import Checkpointer, CheckpointError, load_params
from train.runs.quiet_orbax import QuietOrbax

ROOT = Path(__file__).parents[1]


class Model(nnx.Module):
    """Names, a list, a bfloat16 leaf and a parameter called `value`, which nnx also calls so."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (16, 24)))
        self.value = nnx.Param(jnp.arange(3, dtype=jnp.bfloat16))
        self.forks = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])


def state() -> tuple[Any, Any]:
    params = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1)))
    train = {
        "opt": optimizer.init(params),
        "step": jnp.int32(7),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 4),
    }
    return params, train


def bits(leaf: Any) -> tuple[Any, str, bytes]:
    name = str(leaf.dtype)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return leaf.shape, name, np.asarray(leaf).tobytes()


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert list(map(bits, jax.tree.leaves(a))) == list(map(bits, jax.tree.leaves(b)))


SMALL = {"w": np.ones(3, np.float32)}


def save(directory: Path, *steps: int, params: Any = SMALL, train: Any = SMALL) -> None:
    with Checkpointer(directory, save_interval=1, keep=len(steps)) as checkpointer:
        for step in steps:
            assert checkpointer.save(step, params, train, {"step": step})


@contextlib.contextmanager
def one_line_error(*parts: str) -> Iterator[None]:
    with pytest.raises(CheckpointError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def forked(folder: Path) -> dict[str, str]:
    """Environment of a process of one device that may be killed: its cache is its own."""
    return os.environ | {"XLA_FLAGS": QUICK, "JAX_COMPILATION_CACHE_DIR": str(folder / "jax")}


# Round trips


def test_restores_any_tree_bit_for_bit(tmp_path: Path):
    params, train = state()
    with Checkpointer(tmp_path, save_interval=10) as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.save(10, params, train, {"config": {"layers": [1, 2], "name": None}})
    with Checkpointer(tmp_path, save_interval=10) as checkpointer:
        assert checkpointer.latest_step() == 10
        restored = checkpointer.restore(*jax.eval_shape(lambda: (params, train)))
    assert restored[0] == 10
    assert_same(restored[1:3], (params, train))
    assert restored[3] == {"config": {"layers": [1, 2], "name": None}}


def test_load_params_needs_only_the_params(tmp_path: Path):
    params, _ = state()
    save(tmp_path, 1, 2, params=params)
    shutil.rmtree(tmp_path / "2" / "train")
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "tensorboard").mkdir()
    meta, loaded = load_params(tmp_path)
    assert meta == {"step": 2}
    assert_same(loaded, jax.tree.map(np.asarray, nnx.to_pure_dict(params)))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(loaded))
    assert load_params(tmp_path, step=1)[0] == load_params(tmp_path / "1")[0] == {"step": 1}


def test_restores_onto_other_meshes(tmp_path: Path):
    eight = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    four_two = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows, columns, everywhere = (
        NamedSharding(eight, PartitionSpec(*axes)) for axes in (("fsdp",), (None, "fsdp"), ())
    )
    matrix = jax.random.normal(jax.random.key(0), (16, 64))
    params = {"w": jax.device_put(matrix, rows)}
    train = {
        "mu": jax.device_put(matrix + 1, columns),
        "key": jax.device_put(jax.random.key(1), everywhere),
        "keys": jax.device_put(jax.random.split(jax.random.key(2), 8), rows),
    }
    save(tmp_path, 1, params=params, train=train)
    everywhere = NamedSharding(four_two, PartitionSpec())
    for sharding in (
        NamedSharding(four_two, PartitionSpec("fsdp", "tensor")),
        NamedSharding(four_two, PartitionSpec("tensor", None)),
        SingleDeviceSharding(jax.devices()[5]),
    ):
        target = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=sharding)
        targets = {
            "mu": target,
            "key": jax.ShapeDtypeStruct((), train["key"].dtype, sharding=everywhere),
            "keys": jax.ShapeDtypeStruct((8,), train["key"].dtype),
        }
        with Checkpointer(tmp_path, save_interval=1) as checkpointer:
            _, new_params, new_train, _ = checkpointer.restore({"w": target}, targets)
        assert_same((new_params, new_train), (params, train))
        assert new_params["w"].sharding == new_train["mu"].sharding == sharding
        assert new_train["key"].sharding == everywhere

    script = """
import sys, jax, numpy as np
from train.runs import checkpoint, checksums
from train.runs.checkpoint import load_params
assert jax.device_count() == 1
np.save(sys.argv[2], load_params(sys.argv[1])[1]["w"])
"""
    process = Process(("-c", script, tmp_path, tmp_path / "w.npy"), forked(tmp_path), tmp_path)
    assert (process.wait(timeout=PATIENCE), process.output()) == (0, "")
    np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), matrix)


def test_saved_arrays_may_be_donated_at_once(tmp_path: Path):
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    params = {"w": jnp.zeros((1024, 1024))}
    with Checkpointer(tmp_path, save_interval=1) as checkpointer:
        for step in range(1, 4):
            checkpointer.save(step, params, {"step": jnp.int32(step)}, {})
            for _ in range(5):
                params = advance(params)
            jax.block_until_ready(params)
    for step in range(1, 4):
        assert set(np.unique(load_params(tmp_path, step)[1]["w"])) == {5.0 * (step - 1)}


# Which steps are there


def test_saves_at_the_interval_and_keeps_the_newest_and_every_kth(tmp_path: Path):
    with Checkpointer(tmp_path, save_interval=10, keep=2, keep_every=30) as checkpointer:
        saved = [step for step in range(1, 101) if checkpointer.save(step, SMALL, SMALL, {})]
        assert saved == list(range(10, 101, 10))
        assert not checkpointer.save(100, SMALL, SMALL, {}, force=True)  # it is there
        assert checkpointer.save(103, SMALL, SMALL, {}, force=True)
        with one_line_error("cannot save step 50", "has step 103", "another directory"):
            checkpointer.save(50, SMALL, SMALL, {})
    steps = sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit())
    assert steps == [30, 60, 90, 100, 103]


@pytest.mark.parametrize("option", ["save_interval", "keep", "keep_every"])
def test_refuses_options_below_one(tmp_path: Path, option: str):
    with one_line_error(f"{option}=-1"):
        Checkpointer(tmp_path, **{"save_interval": 1, option: -1})
    with one_line_error(f"{option}=0"):
        Checkpointer(tmp_path, **{"save_interval": 1, option: 0})


def test_says_which_checkpoints_there_are(tmp_path: Path):
    with one_line_error(str(tmp_path / "nowhere"), "does not exist"):
        load_params(tmp_path / "nowhere")
    with one_line_error(f"no checkpoint in {tmp_path}"):
        load_params(tmp_path)
    save(tmp_path, 1, 2)
    with one_line_error("step 7", "[1, 2]"):
        load_params(tmp_path, step=7)
    with one_line_error("step=2", str(tmp_path / "1")):
        load_params(tmp_path / "1", step=2)
    with Checkpointer(tmp_path, save_interval=1) as run, one_line_error("step 7", "[1, 2]"):
        run.restore(SMALL, SMALL, step=7)
    with one_line_error(str(tmp_path / "file"), "Not a directory"):
        (tmp_path / "file").touch()
        Checkpointer(tmp_path / "file" / "run", save_interval=1)


# What does not fit


@pytest.mark.parametrize(
    ("change", "name", "there", "here"),
    [
        ({"w": jnp.zeros((6, 64))}, "w", "(4, 64) float32", "(6, 64) float32"),
        ({"w": jnp.zeros((4, 64), jnp.bfloat16)}, "w", "(4, 64) float32", "(4, 64) bfloat16"),
        ({"w": None}, "w", "(4, 64) float32", "none"),
        ({"gate": jnp.zeros(3)}, "gate", "none", "(3,) float32"),
        ({"key": jax.random.key(0, impl="rbg")}, "key", "() key<threefry2x32>", "() key<rbg>"),
        ({"key": jnp.zeros(2, jnp.uint32)}, "key", "() key<threefry2x32>", "(2,) uint32"),
    ],
)
def test_restore_is_strict(tmp_path: Path, change: Any, name: str, there: str, here: str):
    tree = {"w": jnp.zeros((4, 64)), "key": jax.random.key(0)}
    save(tmp_path, 1, params={"block": tree}, train=tree)
    with Checkpointer(tmp_path, save_interval=1) as checkpointer:
        with one_line_error(
            "params", f"block/{name}: checkpoint {there}, model {here}", "configuration"
        ):
            checkpointer.restore({"block": tree | change}, tree)
        with one_line_error("train", f" {name}: checkpoint {there}, model {here}"):
            checkpointer.restore({"block": tree}, tree | change)


def test_names_the_first_of_many_differences(tmp_path: Path):
    save(tmp_path, 1, params={f"w{i}": jnp.zeros(2) for i in range(9)})
    expected = ("w0: ", "w1: ", "w2: ", "and 6 more")
    with Checkpointer(tmp_path, save_interval=1) as run, one_line_error(*expected):
        run.restore({f"w{i}": jnp.zeros(3) for i in range(9)}, {})


@pytest.mark.parametrize(
    ("tree", "part"),
    [
        ({"a": {"step": 3}}, "a/step is a Python int (3)"),
        ({"a": jnp.zeros((0, 2))}, "a has shape (0, 2)"),
        ({"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}}, "two leaves have the name a/b"),
    ],
)
def test_refuses_to_save_what_it_could_not_restore(tmp_path: Path, tree: Any, part: str):
    with Checkpointer(tmp_path, save_interval=1) as checkpointer:
        with one_line_error(part):
            checkpointer.save(1, tree, {}, {})
        with one_line_error("meta is not JSON", "set"):
            checkpointer.save(1, {"a": jnp.zeros(1)}, {"b": jnp.zeros(1)}, {"x": {1}})
        assert checkpointer.save(1, {"a": jnp.zeros(1)}, {"b": jnp.zeros(1)}, {})  # unharmed


# Damage


@pytest.mark.parametrize("harm", ["delete", "truncate"])
@pytest.mark.parametrize("files", ["meta/metadata", "params/manifest.ocdbt", "params/d/*"])
def test_a_damaged_checkpoint_names_the_intact_one(tmp_path: Path, files: str, harm: str):
    params = {"w": jax.random.normal(jax.random.key(0), (256, 256)), "b": jnp.ones(3)}
    train = {"mu": params["w"]}
    save(tmp_path, 50, 100, 200, 300, params=params, train=train)
    for step in ("200", "300"):
        # The large chunks of the writing process are referred to, not copied.
        for file in (*(tmp_path / step).glob(files), *(tmp_path / step).glob("params/*/d/*")):
            if harm == "delete":
                file.unlink()
            else:
                os.truncate(file, file.stat().st_size // 2)
    expected = (f"{tmp_path / '300'} is damaged", "step 100 is intact")
    with one_line_error(*expected):
        load_params(tmp_path)
    with Checkpointer(tmp_path, save_interval=1) as checkpointer:
        with one_line_error(*expected):
            checkpointer.restore(params, train)
        assert_same(checkpointer.restore(params, train, step=100)[1], params)
    with one_line_error("200 is damaged", "no other step here is intact"):
        shutil.rmtree(tmp_path / "50")
        shutil.rmtree(tmp_path / "100")
        load_params(tmp_path, step=200)


def test_a_leaf_that_cannot_be_read_is_named_among_those_read_with_it(tmp_path: Path, monkeypatch):
    """And what is read goes where it belongs, whatever the order of names in the file."""
    params = {name: jnp.full(1000, index) for index, name in enumerate("cab")}
    save(tmp_path, 1, params=params, train=params)
    monkeypatch.setattr(checkpoint, "_READ_TOGETHER", 8000)  # two leaves
    with Checkpointer(tmp_path, save_interval=1) as checkpointer:
        assert_same(checkpointer.restore(params, params)[1:3], (params, params))
    read = checkpoint._read_together

    def fails(folder: Path, targets: Any) -> Any:
        if "a" in targets:
            raise OSError("bad sector")
        return read(folder, targets)

    monkeypatch.setattr(checkpoint, "_read_together", fails)
    with one_line_error("1 is damaged", "params a: bad sector"):
        load_params(tmp_path)


SAVE_FOR_EVER = """
import sys, itertools, jax, jax.numpy as jnp
from train.runs import checkpoint, checksums
from train.runs.checkpoint import Checkpointer
shape = (1024, 1024)
make = jax.jit(lambda step: {str(i): jnp.full(shape, step + i, jnp.float32) for i in range(8)})
with Checkpointer(sys.argv[1], save_interval=1, keep=2) as checkpointer:
    step, params = checkpointer.latest_step() or 0, make(0)
    if step:
        step, params, train, meta = checkpointer.restore(params, {"step": jnp.int32(0)})
        assert train["step"] == meta["step"] == step
        assert all((leaf == step + int(name)).all() for name, leaf in params.items())
    for step in itertools.count(step + 1):
        print(step, flush=True)
        checkpointer.save(step, make(step), {"step": jnp.int32(step)}, {"step": step})
"""


def test_a_refusal_waits_for_what_deletes_an_unfinished_save(tmp_path: Path, monkeypatch):
    """Else its thread prints a traceback behind the error line, when the interpreter has ended."""
    deleted = []

    async def slow(*_: object, **__: object) -> None:
        await asyncio.sleep(0.2)
        deleted.append(True)

    monkeypatch.setattr(temporary_paths, "cleanup_temporary_paths", slow)
    with one_line_error("wrong"), Checkpointer(tmp_path, save_interval=1):
        raise CheckpointError("wrong")
    assert deleted


def unfinished(folder: Path) -> bool:
    """Whether a save is under way there."""
    return any("tmp" in path.name for path in folder.iterdir())


@pytest.mark.slow
def test_kill_during_a_save_leaves_the_checkpoint_before(tmp_path: Path):
    moments, interrupted, before = random.Random(0), 0, 0
    saved, environment = tmp_path / "saved", forked(tmp_path)
    for _ in range(2):
        process = Process(("-c", SAVE_FOR_EVER, saved), environment, tmp_path)
        while process.output().count("\n") < 4:  # three saves are complete or under way
            assert process.poll() is None, process.output()
            time.sleep(0.005)
        while not unfinished(saved):
            assert process.poll() is None, process.output()
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.03))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert all(line.isdigit() for line in process.output().split()), process.output()
        interrupted += unfinished(saved)
        meta, params = load_params(saved)
        assert meta["step"] > before
        before = meta["step"]
        assert all((leaf == before + int(name)).all() for name, leaf in params.items())
    assert interrupted > 0  # else the test proves nothing: the state is too small


# A full disk

LIMIT_FILE_SIZE = """
import resource, sys, jax.numpy as jnp, numpy as np
from train.runs import checkpoint, checksums
from train.runs.checkpoint import Checkpointer, CheckpointError
small = {"w": jnp.ones(3)}
large = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(1024, 1024)))}
try:
    with Checkpointer(sys.argv[1], save_interval=100) as checkpointer:
        checkpointer.save(100, small, small, {})
        checkpointer.restore(small, small)  # waits for the save
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        assert checkpointer.save(200, large, small, {})
except CheckpointError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path):
    saved = tmp_path / "saved"
    process = Process(("-c", LIMIT_FILE_SIZE, saved), forked(tmp_path), tmp_path)
    assert process.wait(timeout=PATIENCE) == 2
    assert process.output() == (
        f"checkpoint of step 200 could not be written to {saved}: File too large; "
        f"step 100 is intact; free space or pass another directory\n"
    )
    assert_same(load_params(saved)[1], SMALL)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system is not allowed here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_full_disk(small_disk: Path, capfd: pytest.CaptureFixture[str]):
    large = {"w": jax.random.normal(jax.random.key(0), (2048, 2048))}
    expected = ("checkpoint of step 2 ", f"{small_disk}: No space left", "step 1 is intact")
    with Checkpointer(small_disk, save_interval=1, keep=1) as checkpointer:
        checkpointer.save(1, SMALL, SMALL, {})
        checkpointer.save(2, large, SMALL, {})
        with one_line_error(*expected):
            checkpointer.restore(SMALL, SMALL)
        assert_same(checkpointer.restore(SMALL, SMALL)[1], SMALL)
    with Checkpointer(small_disk, save_interval=1, keep=1) as checkpointer:
        checkpointer.save(2, large, SMALL, {})
        deadline = time.monotonic() + 30
        with one_line_error(*expected):
            while time.monotonic() < deadline:  # a training loop: the next call says it
                checkpointer.save(2, large, SMALL, {})
                time.sleep(0.01)
    with (
        pytest.raises(RuntimeError, match="the loop's own") as caught,
        Checkpointer(small_disk, save_interval=1, keep=1) as checkpointer,
    ):
        checkpointer.save(2, large, SMALL, {})
        raise RuntimeError("the loop's own error")
    assert "No space left" in caught.value.__notes__[0]
    with Checkpointer(small_disk, save_interval=1, keep=1) as checkpointer:
        assert checkpointer.save(3, SMALL, SMALL, {})
    assert [path.name for path in small_disk.iterdir()] == ["3"]
    assert capfd.readouterr() == ("", "")


def hooks() -> tuple[Any, ...]:
    filters = [list(logging.getLogger(name).filters) for name in ("absl", "asyncio")]
    return (*filters, sys.unraisablehook)


def test_hooks_of_the_process_are_set_while_a_checkpointer_is_open(tmp_path: Path, monkeypatch):
    # Failed saves of other tests have left theirs.
    monkeypatch.setattr(QuietOrbax, "_open", 0)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    for name in ("absl", "asyncio"):
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    before = hooks()
    first = Checkpointer(tmp_path / "a", save_interval=1)
    second = Checkpointer(tmp_path / "b", save_interval=1)
    first.close()
    assert hooks()[0] != before[0] and hooks()[2] != before[2]
    second.close()
    second.close()
    assert hooks() == before
    (tmp_path / "file").write_text("")
    with one_line_error("cannot keep checkpoints"):
        Checkpointer(tmp_path / "file" / "below", save_interval=1)
    assert hooks() == before
    with Checkpointer(tmp_path / "c", save_interval=1) as failing:
        monkeypatch.setattr(failing._manager, "save", refuse)
        with one_line_error("checkpoint of step 1 ", "No space left"):
            failing.save(1, SMALL, SMALL, {})
    assert hooks() != before, "threads of a failed save print after it is closed"


def refuse(*_: Any, **__: Any) -> bool:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Several processes

TWO_PROCESSES = """
import os, signal, sys, time, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from train.runs import checkpoint, checksums
from train.runs.checkpoint import Checkpointer
directory, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
sharded, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), ()))
make = jax.jit(
    lambda step: ({"w": jnp.arange(8.0) + step}, {"key": jax.random.key(step)}),
    out_shardings=({"w": sharded}, {"key": everywhere}),
)
with Checkpointer(directory, save_interval=1000) as checkpointer:
    for step in range(1, 1000):
        params, train = make(step)
        jax.block_until_ready(params)
        if step == 5 and process == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        saved = checkpointer.save(step, params, train, {})
        if checkpointer.reached_preemption(step):
            assert saved
            break
        time.sleep(0.02)
    _, again, key, _ = checkpointer.restore(params, train)
    for old, new in zip(again["w"].addressable_shards, params["w"].addressable_shards):
        assert (old.data == new.data).all()
    assert (jax.random.key_data(key["key"]) == jax.random.key_data(train["key"])).all()
jax.distributed.shutdown()  # by hand: the end of a forked process does not call what jax registers
print(step)
"""


@pytest.mark.slow
def test_preempting_one_process_saves_in_both(tmp_path: Path):
    saved, port = tmp_path / "saved", str(free_port())
    with processes(
        ("-c", TWO_PROCESSES, saved, port), tmp_path, each=lambda process: (str(process),)
    ) as started:
        assert started.statuses() == [0, 0], started.output(0) + started.output(1)
        steps = {int(started.output(i).split()[-1]) for i in range(2)}
    assert len(steps) == 1
    step = steps.pop()
    processes_of = {name.split("/")[1] for name in checksums._read(saved / str(step))}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= processes_of
    assert not list(saved.rglob("checksums-*"))
    assert_same(load_params(saved, step)[1], {"w": np.arange(8, dtype=np.float32) + step})

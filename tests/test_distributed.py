"""Several real processes: they find each other, agree, and survive kills, stops and mistakes.

Kills: `python -m pytest -m experiment tests/test_distributed.py`.
"""

import dataclasses
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import PATIENCE, free_port, processes
from test_pretrain import run_here

from train import pretrain
from train.cli.config_json import as_json
from train.data import DataConfig, prepare
from train.devices.distributed import DistributedConfig, _loss
from train.engine.config import EvalConfig
from train.engine.loop import run_lock
from train.engine.optim import OptimizerConfig
from train.evaluation.held_out import held_out
from train.models.load import load_model
from train.pretraining.config import RunConfig
from train.pretraining.presets import PRESETS
from train.runs import checkpoint
from train.runs.checkpoint import Checkpointer, load_meta, load_params
from train.runs.metrics import read_metrics
from train.runs.resume import differences

STEPS, SAVE_EVERY = 30, 6
SMALL = (
    *("--model.embed-dim", "8", "--model.num-layers", "1", "--model.num-heads", "2"),
    *("--mesh.data", "1", "--mesh.fsdp", "-1", "--data.seq-len", "16", "--batch-size", "8"),
    *("--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--log-every", "1"),
    *("--evaluation.every", "0", "--evaluation.rows", "12"),
    *("--optimizer.warmup", "0", "--optimizer.final-ratio", "1"),  # however many steps there are
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    words = random.Random(0)
    for index in range(20):
        (folder / f"{index}.txt").write_text(" ".join(words.choices(["one", "two", "six"], k=300)))
    return folder


@pytest.fixture(scope="module")
def command(corpus):
    """The words of a small run, but for its folder."""
    cache = corpus.with_name("cache")
    data = ("--data.corpus", str(corpus), "--data.cache-dir", str(cache))
    return ("-m", "train.pretrain", "tiny_plain", *data, *SMALL)


# Finding each other


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"coordinator": "a:1"}, "pass num_processes and process_id too"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "form host:port"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id=2"),
        ({"coordinator": "a:1", "auto": True}, "one or the other"),
        ({"heartbeat": 0}, "heartbeat=0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_mistakes_in_the_options(fields, part):
    with pytest.raises(ValueError, match=part):
        DistributedConfig(**fields)


def test_how_processes_find_each_other_is_no_part_of_a_run():
    ours = dataclasses.replace(
        PRESETS["tiny"], dry_run=True, distributed=DistributedConfig("host:1", 2, 1)
    )
    assert not differences(as_json(PRESETS["tiny"]), ours)


@pytest.mark.slow
def test_waiting_for_others_ends_with_one_line(tmp_path: Path, command):
    """Process 1 without a coordinator; process 0 without process 1; no cluster at all."""
    places = [f"127.0.0.1:{free_port()}" for _ in range(2)]

    def each(number: int) -> list[str]:
        if number == 2:
            return ["--distributed.auto"]
        words = ["--distributed.coordinator", places[number], "--distributed.num-processes", "2"]
        return [*words, "--distributed.process-id", str(1 - number), "--distributed.timeout", "2"]

    out = tmp_path / "run"
    with processes((*command, "--out", str(out)), tmp_path, count=3, each=each) as started:
        assert started.statuses() == [2, 2, 2]
        for number, parts in enumerate(
            (
                (f"coordinator {places[0]} has not answered in 2 s", "start process 0 there"),
                (f"not all of 2 processes have come to {places[1]} in 2 s", "start them all"),
                ("auto: this is no environment of several processes", "SLURM"),
            )
        ):
            *_, last = started.output(number).splitlines()
            assert last.startswith("error: ")
            for part in parts:
                assert part in last
            assert "Traceback" not in started.output(number)
    assert not out.exists()


@pytest.mark.slow
def test_tasks_of_slurm_find_each_other(tmp_path: Path, command):
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    out = tmp_path / "run"
    with processes(
        (*command, "--out", str(out), "--dry-run", "--distributed.auto"),
        tmp_path,
        environment=slurm | {"JAX_COORDINATOR_PORT": str(free_port())},
        environment_of_each=lambda i: {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
        each=lambda process: (),
    ) as started:
        assert started.statuses() == [0, 0], started.output(0) + started.output(1)
        assert "4 cpu of 2 processes (data 1 x fsdp 4 x tensor 1)" in started.output(0)
        assert "process 0 reads 4 rows" in started.output(0)
        assert "parameters" not in started.output(1), "one process speaks"
    assert not out.exists()


# Agreeing

AGREE = """
import pathlib, sys, time
from jax.experimental.multihost_utils import sync_global_devices
from train.devices.distributed import DistributedConfig, assert_same_on_all_hosts
from train.devices.distributed import distributed_context, ends_when_alone, sync_errors
from train.runs import run_folder
port, process, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
run_folder.NETWORK_DISK = 0.0
with distributed_context(DistributedConfig(f"127.0.0.1:{port}", 2, process)):
    for attempt in (
        lambda: open("/nowhere") if process else None,
        lambda: assert_same_on_all_hosts("config", {"steps": 3, "data": {"seed": process}}),
    ):
        try:
            with sync_errors():
                attempt()
        except (ValueError, OSError) as error:
            print(error)
    assert_same_on_all_hosts("config", {"steps": 3})
    with run_folder.run_lock(folder / "disk-0"):
        time.sleep(2 * process)  # process 1 leaves the first run while process 0 begins the next
    try:
        with run_folder.run_lock(folder / f"disk-{process}"):
            print("not reached")
    except ValueError as error:
        print(error)
    with ends_when_alone():
        sync_global_devices("both are here")
        if process:
            raise ValueError("only process 1 fails")
        sync_global_devices("one is missing")
"""


FALL_SILENT = """
import os, signal, sys
from jax.experimental.multihost_utils import sync_global_devices
from train.devices.distributed import DistributedConfig, distributed_context, ends_when_alone
port, process = sys.argv[1], int(sys.argv[2])
config = DistributedConfig(f"127.0.0.1:{port}", 2, process, heartbeat=10)
with distributed_context(config), ends_when_alone():
    sync_global_devices("both are here")
    if process:
        os.kill(os.getpid(), signal.SIGSTOP)
    sync_global_devices("one says nothing")
"""


@pytest.mark.slow
def test_an_error_or_the_silence_of_one_process_ends_all(tmp_path: Path):
    """Both at once, as the silence takes the ten seconds of a heartbeat.

    Its host is gone, say: no connection is closed. jax aborts; the last line is ours.
    """
    ports = [str(free_port()) for _ in range(2)]
    with (
        processes(
            ("-c", FALL_SILENT),
            tmp_path / "silent",
            each=lambda process: (ports[1], str(process)),
            devices=1,
        ) as silent,
        processes(
            ("-c", AGREE),
            tmp_path,
            each=lambda process: (ports[0], str(process), str(tmp_path)),
            devices=1,
        ) as started,
    ):
        assert started.statuses() in ([1, 2], [-6, 2]), started.output(0) + started.output(1)
        started.wait_for_words(0, "start all of them again")
        first, second = started.output(0), started.output(1)
        assert silent.running[0].wait(timeout=PATIENCE) not in (0, 2)
        silent.wait_for_words(0, "start all of them again")
        last = silent.output(0).splitlines()[-1]
        assert last.startswith("error: process 0 of 2"), silent.output(0)
        assert silent.running[1].poll() is None, "it still is, but silent"
    missing = "[Errno 2] No such file or directory: '/nowhere'"
    assert f"process 1: {missing}" in first and missing in second
    assert (
        "processes disagree: config.data.seed is 0 in process 0 and 1 in process 1" in first
        and "processes disagree: config.data.seed is 0 in process 0 and 1 in process 1" in second
    )
    part = f"{tmp_path}/disk-1 is not the folder that process 0 has under this name"
    assert f"process 1: {part}" in first and part in second
    assert "not reached" not in first + second
    assert second.splitlines()[-1] == "error: only process 1 fails"
    last = first.splitlines()[-1]
    assert last.startswith(
        "error: process 0 of 2: another process has ended or can't be reached ("
    ), first
    assert "start all of them again" in last and "Traceback" not in first


LOST = {
    "gloo, a peer's end": "UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/"
    "pair.cc:547] Connection closed by peer [127.0.0.1]:62101",
    "gloo, a peer's host": "UNKNOWN: Gloo AllReduce failed: [external/gloo/gloo/transport/tcp/"
    "pair.cc:547] Read error [127.0.0.1]:62101: Connection reset by peer",
    "barrier": "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 "
    "heartbeat timeout. This indicates that the remote task has failed, got preempted, or crashed "
    "unexpectedly.",
    "coordinator": "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader "
    "task was preempted/died/restarted unexpectedly or this task is experiencing network issues.",
    "socket": "UNAVAILABLE: failed\nAdditional GRPC error information from remote target:\n"
    ':UNKNOWN:Error received from peer  {grpc_status:14, grpc_message:"Socket closed"}',
}
OWN = {
    "memory": "RESOURCE_EXHAUSTED: Out of memory allocating 1073741824 bytes.",
    "compiler": "INTERNAL: Mosaic failed to compile TPU kernel: unsupported shape cast",
    "no status": "the coordination of Gloo and NCCL: heartbeat",
}


@pytest.mark.parametrize("message", LOST.values(), ids=LOST)
def test_words_of_jax_about_a_lost_process(message):
    """Those of a peer's end, the barrier and the coordinator as jax 0.10.2 raised them in one
    process of two whose other was killed; the others have the same form.
    """
    first = message.splitlines()[0]
    expected = first if len(first) <= 120 else first[:117] + "..."
    for kind in (ValueError, jax.errors.JaxRuntimeError):
        assert _loss(kind(message)) == expected
        outer = RuntimeError("the step failed")
        outer.__cause__ = kind(message)
        assert _loss(outer) == expected


@pytest.mark.parametrize("message", OWN.values(), ids=OWN)
def test_an_error_of_one_process_is_no_lost_process(message):
    assert _loss(RuntimeError(message)) is None


@pytest.mark.slow
def test_a_folder_with_a_live_run_is_refused_by_all(tmp_path: Path, command):
    """Of another number of processes, too: the test's own is one."""
    out = tmp_path / "run"
    with (
        run_lock(out),
        processes((*command, "--out", str(out)), tmp_path, devices=1) as started,
    ):
        assert started.statuses() == [2, 2], started.output(0) + started.output(1)
        line = f"another run is going on in {out}: pass another --out"
        assert started.output(0).splitlines()[-1].startswith(f"error: {line}")
        assert started.output(1).splitlines()[-1].startswith(f"error: process 0: {line}")
    left = sorted(path.name for path in out.iterdir())
    assert left == [".lock", ".lock-others"], "nothing is half-written"


# Surviving


@pytest.fixture(scope="module")
def whole(tmp_path_factory, command):
    """The folder and outputs of an uninterrupted run of two processes; `jax` is its cache."""
    folder = tmp_path_factory.mktemp("whole")
    logged = {"JAX_LOG_COMPILES": "1"}
    with processes((*command, "--out", str(folder / "run")), folder, environment=logged) as started:
        assert started.statuses() == [0, 0], started.output(0) + started.output(1)
        return folder / "run", [started.output(process) for process in range(2)]


@pytest.mark.slow
def test_a_run_of_two_processes(whole, command, monkeypatch, tmp_path: Path):
    """It is what one process does on one device."""
    out, (first, second) = whole
    assert first.count("Compiling jit(step)") == second.count("Compiling jit(step)") == 1
    assert first.count("held-out loss") == 1 and first.count("sample (temperature") == 1
    assert "held-out" not in second and "sample" not in second and "error" not in first + second
    lines = read_metrics(out)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    # The held-out loss is that of the saved model, computed by one process.
    rows = prepare(DataConfig(**load_model(out).config["data"])).validation
    alone = held_out(load_model(out).model, rows, 8, EvalConfig(rows=12))
    for name, value in alone.items():
        assert lines[-1][f"eval/{name}"] == pytest.approx(value, rel=1e-5)
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    assert run_here(monkeypatch, *command[2:], "--out", str(tmp_path)) == 0
    losses, expected = (
        [line["loss"] for line in read if "loss" in line]
        for read in (lines, read_metrics(tmp_path))
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] < losses[0] - 0.1, "it learns"


@pytest.mark.experiment
@pytest.mark.parametrize("kills", [1, 10])
def test_kills_and_a_stop_leave_no_trace(whole, command, tmp_path: Path, kills: int):
    """`kill -9` of one process, then SIGTERM to one where it is done time and again: the same
    parameters. What SIGTERM to one does is also in `test_checkpoint.py`.
    """
    out = tmp_path / "run"
    shutil.copytree(whole[0].with_name("jax"), tmp_path / "jax")
    moments = random.Random(time.time_ns())
    words = (*command, "--out", str(out))

    def steps_done() -> int:
        metrics = out / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def saved() -> int:
        return (load_meta(out) or {"step": 0})["step"]

    first = moments.randrange(2)
    first_step = 2 * SAVE_EVERY if kills == 1 else 1  # something is saved before the last kill
    targets = sorted(moments.sample(range(first_step, STEPS - 2 * SAVE_EVERY), kills))
    for kill, target in enumerate(targets):
        victim = (kill + first) % 2
        with processes(words, tmp_path) as started:
            started.wait_until(lambda: "GFLOP" in started.output(0))  # old metrics are trimmed
            started.wait_until(lambda target=target: steps_done() >= target)
            with pytest.raises(ValueError, match="another run is going on"), run_lock(out):
                pass
            time.sleep(moments.random() * 0.1)
            started.running[victim].send_signal(signal.SIGKILL)
            statuses = started.statuses()
            assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] not in (0, 2)
            started.wait_for_words(1 - victim, "start all of them again")
            last = started.output(1 - victim).splitlines()[-1]
            assert last.startswith(f"error: process {1 - victim} of 2"), last
    before = saved()
    assert before > 0
    if kills > 1:
        with processes(words, tmp_path) as started:
            started.wait_until(lambda: "GFLOP" in started.output(0))
            started.wait_until(lambda: steps_done() > before)
            started.running[1].send_signal(signal.SIGTERM)
            assert started.statuses() == [0, 0], started.output(0) + started.output(1)
            assert f"stopped at step {saved()} and saved it" in started.output(0)
            assert before < saved() == steps_done() < STEPS
    with processes(words, tmp_path) as started:
        assert started.statuses() == [0, 0], started.output(0) + started.output(1)
    ours, theirs = load_params(out)[1], load_params(whole[0])[1]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    ours, theirs = (
        [(line["step"], line["loss"]) for line in read_metrics(folder) if "loss" in line]
        for folder in (out, whole[0])
    )
    assert ours == theirs


@pytest.mark.slow
def test_a_killed_run_goes_on_as_it_was_and_ctrl_c_stops_all_at_one_step(
    whole, command, tmp_path: Path
):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    shutil.rmtree(out / str(STEPS))  # as if it had been killed in its last steps
    saved = STEPS - SAVE_EVERY
    words = (*command, "--out", str(out), "--steps", "100000", "--save-every", "100000")
    with processes(words, tmp_path, cache=whole[0].with_name("jax")) as started:
        started.wait_until(lambda: "GFLOP" in started.output(0))  # old metrics are trimmed
        started.wait_until(lambda: (out / "metrics.jsonl").read_bytes().count(b"\n") > STEPS)
        with pytest.raises(ValueError, match="another run is going on"), run_lock(out):
            pass
        for process in started.running:  # a terminal tells all
            process.send_signal(signal.SIGINT)
        assert started.statuses() == [0, 0], started.output(0) + started.output(1)
        assert f"from step {saved}" in started.output(0)
        stopped = (load_meta(out) or {})["step"]
        assert f"stopped at step {stopped} and saved" in started.output(0)
    ours, theirs = (
        [(line["step"], line["loss"]) for line in read_metrics(folder) if "loss" in line]
        for folder in (out, whole[0])
    )
    assert ours[:STEPS] == theirs and len(ours) == stopped


def test_the_thread_that_ends_a_save_does_not_move_where_a_process_stands(
    tmp_path: Path, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        checkpoint.ocp.CheckpointManager,
        "reached_preemption",
        lambda self, step: asked.append(step) or True,
    )
    with Checkpointer(tmp_path, 1) as checkpointer:
        assert checkpointer.reached_preemption(7)
        found = []
        thread = threading.Thread(target=lambda: found.append(checkpointer.reached_preemption(5)))
        thread.start()
        thread.join()
        assert checkpointer.reached_preemption(8)
    assert found == [False] and asked == [1, 2]


# A dry run


def test_dry_run_allocates_and_writes_nothing(capsys, tmp_path: Path):
    config = dataclasses.replace(
        PRESETS["tiny"], dry_run=True, out=str(tmp_path / "run"), steps=10, batch_size=64
    )
    config = dataclasses.replace(config, data=DataConfig("/nowhere", cache_dir=str(tmp_path)))
    before = jax.live_arrays()  # held, so that no new one can pass for an old one
    pretrain.main(config)
    assert {id(array) for array in jax.live_arrays()} <= {id(array) for array in before}
    assert not list(tmp_path.iterdir())
    shown = capsys.readouterr().out
    assert f"{config.model.num_params():,} parameters" in shown
    assert "8 cpu (data 8 x fsdp 1 x tensor 1); steps 0 to 10" in shown
    assert f"{10 * 64 * 256:,} tokens" in shown and f"{tmp_path}/run, from the start" in shown


@pytest.mark.slow
def test_dry_run_says_what_it_would_continue(capsys, whole, corpus):
    out, _ = whole
    saved = load_model(out).config
    data = DataConfig(**saved["data"])
    model = dataclasses.replace(PRESETS["tiny_plain"].model, embed_dim=8, num_layers=1, num_heads=2)
    config = RunConfig(
        model=model,
        data=data,
        optimizer=OptimizerConfig(**saved["optimizer"]),
        batch_size=8,
        steps=STEPS + 10,
        out=str(out),
        dry_run=True,
    )
    pretrain.main(config)
    shown = capsys.readouterr().out
    assert f"{out}, from step {STEPS} of the run that it holds" in shown
    assert f"10 of {STEPS + 10}, {10 * 8 * 16:,} tokens" in shown
    assert f"steps: saved {STEPS}, now {STEPS + 10}" in shown and "mesh" in shown
    with pytest.raises(ValueError, match="model.embed_dim: saved 8, now 16"):
        model = dataclasses.replace(config.model, embed_dim=16)
        pretrain.main(dataclasses.replace(config, model=model))

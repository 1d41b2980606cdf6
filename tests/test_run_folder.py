"""Who holds a run folder, and what a run that goes on says has changed."""

import dataclasses
import random
import signal
from pathlib import Path

import jax
import pytest
from processes import free_port, processes

from thoughtbubbles import ModelConfig
from train.cli.config_json import as_json
from train.data import DataConfig
from train.engine import loop
from train.engine.config import EvalConfig
from train.pretraining import job
from train.pretraining.config import RunConfig
from train.runs.checkpoint import load_meta
from train.runs.instruments import not_recorded
from train.runs.resume import noted_changes
from train.runs.run_folder import run_lock

HOLD = """
import pathlib, sys, time
from train.devices.distributed import DistributedConfig, distributed_context
from train.runs.run_folder import run_lock
port, process, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
with distributed_context(DistributedConfig(f"127.0.0.1:{port}", 2, process)), run_lock(folder):
    print("held", flush=True)
    time.sleep(1000)
"""


@pytest.mark.slow
def test_a_folder_is_held_as_long_as_any_process_of_a_run_lives(tmp_path: Path):
    """Even when process 0 was killed, and process 1 does not know it yet."""
    out, port = tmp_path / "run", str(free_port())

    def refused(line: str) -> None:
        with pytest.raises(ValueError, match=line), run_lock(out):
            pass

    words = lambda process: (port, str(process), str(out))  # noqa: E731
    with processes(("-c", HOLD), tmp_path, each=words, devices=1) as started:
        started.wait_until(lambda: all("held" in started.output(i) for i in range(2)))
        refused("another run is going on")
        first, second = started.running
        second.send_signal(signal.SIGSTOP)  # it must not notice
        first.send_signal(signal.SIGKILL)
        first.wait()
        refused("a process of an earlier run in .*run is still there, .* end it, or wait")
        second.send_signal(signal.SIGKILL)
        second.wait()
        with run_lock(out):
            refused("another run is going on")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Two steps of the smallest run there is."""
    words, text = random.Random(0), tmp_path / "text"
    text.mkdir()
    for index in range(20):
        (text / f"{index}.txt").write_text(" ".join(words.choices(["one", "two", "six"], k=200)))
    return RunConfig(
        model=ModelConfig(vocab_size=264, embed_dim=8, num_layers=1, num_heads=2),
        data=DataConfig(str(text), seq_len=8, cache_dir=str(tmp_path / "cache")),
        evaluation=EvalConfig(every=0, rows=8),
        batch_size=8,
        steps=2,
        out=str(tmp_path / "run"),
    )


def test_metadata_are_read_by_who_holds_the_folder(config, monkeypatch):
    """A checkpoint that was written while data were prepared is seen."""
    asked = []

    def reading(out):
        asked.append(held(out))
        return load_meta(out)

    def held(out) -> bool:
        try:
            with run_lock(Path(out)):
                return False
        except ValueError:
            return True

    one = jax.devices()[:1]  # the program of the next test
    monkeypatch.setattr(jax, "devices", lambda: one)
    monkeypatch.setattr(loop, "load_run_meta", reading)
    job.train(config)
    assert asked == [False, True]


def test_what_options_came_to_is_compared(config, monkeypatch, capsys):
    """`data=-1` is another mesh on other devices, and none where it comes to the same."""

    every = jax.devices()

    def run(devices: int, **changes) -> str:
        monkeypatch.setattr(jax, "devices", lambda: every[:devices])
        job.train(dataclasses.replace(config, **changes))
        return capsys.readouterr().err

    assert "goes on with a change" not in run(1)
    meta = load_meta(config.out)
    assert meta and meta["resolved"] == {
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
        "attention": "xla",
    }
    same = dataclasses.replace(config.mesh, data=1)
    shown = run(1, steps=3, mesh=same, attention="xla", profile="1:2")
    assert "goes on with a change: steps: saved 2, now 3\n" in shown
    assert "mesh" not in shown.partition("goes on with a change")[2] and "attention:" not in shown
    assert "profile='1:2': the run goes on from step 2, so nothing will be recorded" in shown
    shown = run(8, steps=4)
    assert "goes on with a change: mesh.data: saved 1, now 8\n" in shown
    assert shown.count("goes on with a change") == 2  # and the steps


def test_attention_is_compared_as_it_was_resolved(config):
    now = {"config": as_json(config), "resolved": {"mesh": {"data": 8}, "attention": "splash"}}
    saved = now | {"resolved": {"mesh": {"data": 8}, "attention": "xla"}}
    assert noted_changes(saved, now, config) == ["attention: saved 'xla', now 'splash'"]
    assert noted_changes(now, now, config) == []


@pytest.mark.parametrize(
    ("window", "start", "steps", "left"),
    [
        ("10:20", 9, 30, None),
        ("10:20", 10, 30, "only steps 11 to 20"),
        ("10:20", 20, 30, "nothing"),
        ("10:20", 15, 15, "nothing"),
        ("", 5, 30, None),
    ],
)
def test_a_run_that_goes_on_past_a_profile_says_so(window, start, steps, left):
    line = not_recorded(window, start, steps)
    assert (line is None) == (left is None)
    assert line is None or f"from step {start}, so {left} will be recorded" in line

"""Metrics files that survive kills, TensorBoard events, progress and throughput."""

import importlib
import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from train.runs.metrics import MetricsError, MetricWriter, Progress, read_metrics

ROOT = Path(__file__).parents[1]


def without_time(path: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name != "time"}
        for line in read_metrics(path)
    ]


def run(script: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# The file


def test_writes_one_valid_json_object_per_step(tmp_path: Path):
    values = {
        "loss": np.float32(0.1),
        "bfloat16": jnp.bfloat16(1.5),
        "count": 3,
        "forked": True,
        "used": jnp.arange(3),
        "scores": [0.5, math.nan],
        "nan": math.nan,
        "high": jnp.inf,
        "low": -math.inf,
    }
    with MetricWriter(tmp_path / "new" / "run") as writer:
        writer.write(7, values)
        line, empty = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().split("\n")
    assert empty == ""
    raw = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert raw["time"] > 1.6e9
    assert list(raw)[:2] == ["step", "time"]
    assert (raw["nan"], raw["high"], raw["low"]) == ("NaN", "Infinity", "-Infinity")
    (read,) = without_time(tmp_path / "new" / "run")
    assert math.isnan(read.pop("nan")) and math.isnan(read["scores"].pop())
    assert read == {
        "step": 7,
        "loss": float(np.float32(0.1)),
        "bfloat16": 1.5,
        "count": 3,
        "forked": True,
        "used": [0, 1, 2],
        "scores": [0.5],
        "high": math.inf,
        "low": -math.inf,
    }
    assert type(read["count"]) is int and read["forked"] is True


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"scores": np.zeros((2, 3))}, "scores has shape (2, 3)"),
        ({"name": "tiny"}, "name is 'tiny'"),
        ({"loss": None}, "loss is None"),
        ({"loss": 1j}, "loss is 1j"),
        ({"step": 1}, "step is the name"),
    ],
)
def test_refuses_what_is_no_metric(tmp_path: Path, values: dict[str, Any], part: str):
    with MetricWriter(tmp_path) as writer:
        with pytest.raises(MetricsError) as caught:
            writer.write(1, values)
        writer.write(1, {"loss": 2.0})
    assert part in str(caught.value)
    assert without_time(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_resuming_gives_the_file_of_an_uninterrupted_run(tmp_path: Path):
    def write(directory: Path, steps: range, resume_step: int) -> None:
        with MetricWriter(directory, resume_step=resume_step) as writer:
            for step in steps:
                writer.write(step, {"loss": 1 / step})
                if step % 4 == 0:
                    writer.write(step, {"validation_loss": 2 / step})

    write(tmp_path / "whole", range(1, 13), 0)
    interrupted = tmp_path / "interrupted"
    write(interrupted, range(1, 12), 0)
    with (interrupted / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    write(interrupted, range(9, 13), 8)
    assert without_time(interrupted) == without_time(tmp_path / "whole")
    assert len(without_time(interrupted)) == 15
    write(interrupted, range(1, 2), 0)
    assert without_time(interrupted) == [{"step": 1, "loss": 1.0}]
    assert sorted(path.name for path in interrupted.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_without_a_step_it_appends_after_the_last_whole_line(tmp_path: Path):
    with MetricWriter(tmp_path) as writer:
        writer.write(5, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6')
    assert without_time(tmp_path / "metrics.jsonl") == [{"step": 5, "loss": 1.0}]
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": 2.0})
    both = [{"step": 5, "loss": 1.0}, {"step": 1, "loss": 2.0}]
    assert without_time(tmp_path) == both
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text().rstrip("\n"))  # as some editors save it
    assert without_time(tmp_path) == both
    with MetricWriter(tmp_path) as writer:
        writer.write(2, {"loss": 3.0})
    assert without_time(tmp_path) == [*both, {"step": 2, "loss": 3.0}]


def test_a_kill_loses_no_line(tmp_path: Path):
    script = """
import os, signal, sys
from train.runs.metrics import MetricWriter
writer = MetricWriter(sys.argv[1])
for step in range(1, 101):
    writer.write(step, {"loss": 0.5})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run(script, tmp_path).returncode == -signal.SIGKILL
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 101))


def test_a_full_disk_is_one_line(tmp_path: Path):
    script = """
import resource, sys
from train.runs.metrics import MetricWriter, MetricsError
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
try:
    with MetricWriter(sys.argv[1]) as writer:
        for step in range(1, 1001):
            writer.write(step, {"loss": 0.5})
except MetricsError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""
    ended = run(script, tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == (
        f"metrics could not be written to {tmp_path / 'metrics.jsonl'}: File too large; "
        f"free space or pass another directory\n"
    )
    steps = [line["step"] for line in read_metrics(tmp_path)]
    assert len(steps) > 50 and steps == list(range(1, len(steps) + 1))


def test_says_what_cannot_be_read(tmp_path: Path):
    with pytest.raises(MetricsError, match="does not exist: pass the folder of a run"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(MetricsError, match=r"line 2 of .*metrics.jsonl is not a JSON object"):
        read_metrics(tmp_path)
    for line in ("[1]", '{"step": "x"}', '{"step": null}', "[" * 100_000):
        (tmp_path / "metrics.jsonl").write_text(f"{line}\n")
        with pytest.raises(MetricsError, match="line 1"):
            MetricWriter(tmp_path, resume_step=3)
    with pytest.raises(MetricsError, match="Not a directory; free space or pass another"):
        MetricWriter(tmp_path / "metrics.jsonl" / "run")
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped/metrics.jsonl")
    with pytest.raises(ValueError, match="metrics.jsonl is no regular file: remove it"):
        read_metrics(tmp_path / "piped")


def test_a_process_that_does_not_write_leaves_no_trace(tmp_path: Path):
    with MetricWriter(tmp_path / "run", resume_step=0, enabled=False) as writer:
        writer.write(1, {"loss": 1.0})
    stream = io.StringIO()
    with Progress(10, enabled=False, stream=stream) as progress:
        progress.update(10, 1.0, None)
        progress.write("done")
    assert list(tmp_path.iterdir()) == []
    assert stream.getvalue() == ""


# TensorBoard


def events(directory: Path) -> list[Any]:
    """All events of the event files, in order of time."""
    event_pb2: Any = importlib.import_module("tensorboardX.proto.event_pb2")
    found = []
    for file in sorted((directory / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_shows_scalars_and_histograms(tmp_path: Path):
    with MetricWriter(tmp_path) as writer:
        samples = np.array([[0.5, 0.5], [-2.0, math.nan]])
        none = jnp.full(3, jnp.nan)
        writer.write(3, {"loss": 1.5, "used": [4, 5]}, {"score/0": samples, "score/1": none})
        writer.write(4, {"loss": math.nan})
    values = [(event.step, value) for event in events(tmp_path) for value in event.summary.value]
    assert [(step, value.tag) for step, value in values] == [
        (3, "loss"),
        (3, "used/0"),
        (3, "used/1"),
        (3, "score/0"),
        (4, "loss"),
    ]
    assert [value.simple_value for _, value in values[:3]] == [1.5, 4.0, 5.0]
    histogram = values[3][1].histo
    assert (histogram.min, histogram.max, histogram.num, histogram.sum) == (-2.0, 0.5, 3, -1.0)
    filled = [
        (limit, count)
        for limit, count in zip(histogram.bucket_limit, histogram.bucket, strict=True)
        if count
    ]
    assert [count for _, count in filled] == [1, 2]
    assert -2.0 <= filled[0][0] <= -2.0 / 1.1 and 0.5 <= filled[1][0] <= 0.5 * 1.1
    assert math.isnan(values[4][1].simple_value)


def test_tensorboard_hides_what_came_after_the_checkpoint(tmp_path: Path):
    for resume_step in (0, 8):
        with MetricWriter(tmp_path, resume_step=resume_step) as writer:
            for step in (resume_step + 1, resume_step + 2):
                writer.write(step, {"loss": 1.0})
    seen = [(event.step, event.session_log.status) for event in events(tmp_path) if event.step]
    assert seen == [(1, 1), (1, 0), (2, 0), (9, 1), (9, 0), (10, 0)]  # 1 is START


# Progress


def test_progress_off_a_terminal_is_a_line_now_and_then():
    clock, stream = Clock(), io.StringIO()
    with Progress(1000, start=900, every=10.0, stream=stream, clock=clock) as progress:
        for step in range(901, 1001):
            progress.update(step, 1 / step, 12345.6 if step > 901 else None)
            if step == 930:
                progress.write("validation loss 1.0")
            clock.now += 0.4
    assert stream.getvalue().splitlines() == [
        "step 901/1000: loss 0.0011",
        "step 926/1000: loss 0.0011, 12.3k tok/s, 00:29 left",
        "validation loss 1.0",
        "step 951/1000: loss 0.0011, 12.3k tok/s, 00:19 left",
        "step 976/1000: loss 0.0010, 12.3k tok/s, 00:09 left",
        "step 1000/1000: loss 0.0010, 12.3k tok/s, 00:00 left",
    ]


def test_progress_on_a_terminal_is_a_bar():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(100, start=40, stream=stream) as progress:
        progress.update(41, 2.5, None)
        progress.write("validation loss 1.0")
        progress.update(100, 1.25, 12345.6)
    shown = stream.getvalue()
    assert "41%" in shown or "40%" in shown
    assert "100/100" in shown and "loss 1.2500, 12.3k tok/s" in shown
    assert "validation loss 1.0\n" in shown

"""Write the metrics of a run to a JSON Lines file, TensorBoard and a progress bar."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from train.runs.appended import object_of
from train.runs.files import check_regular, write_atomically

_FILE = "metrics.jsonl"
_TENSORBOARD_FLUSH = 30.0  # seconds
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsError(ValueError):
    """Raised with a one-line message if metrics cannot be written or read."""


class MetricWriter:
    """Writer of metrics to `directory/metrics.jsonl` and TensorBoard (`directory/tensorboard`).

    A line is one JSON object `{"step": 7, "time": seconds since 1970, name: value, ...}`. A value
    is a number, a bool or a flat list of numbers or bools. NaN and the infinities, which JSON
    lacks, are written as the strings "NaN", "Infinity" and "-Infinity"; `read_metrics` turns these
    strings back into floats. Each line is handed to the operating system immediately, so that no
    line is lost if the process is killed.

    Args:
        directory: Run folder, which is made if it does not exist.
        resume_step: Step of the checkpoint that the run resumes from, 0 for a new run. Lines of
            later steps are dropped, so that the file gets the same lines as in an uninterrupted
            run, provided that a step's line is written before its checkpoint. None keeps all lines.
            An incomplete last line, which a killed process leaves, is always dropped; a whole last
            line without a line break gets one.
        enabled: Whether this process writes; only one process of a run may.

    Raises:
        MetricsError: The folder cannot be written, or the file is damaged.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        resume_step: int | None = None,
        enabled: bool = True,
    ):
        self._enabled = enabled
        if not enabled:
            return
        self._path = Path(directory) / _FILE
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _trim(self._path, resume_step)
            self._file = self._path.open("ab", buffering=0)
            self._events = _Events(self._path.parent / "tensorboard", resume_step)
        except OSError as error:
            raise _unwritten(self._path, error) from error

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except MetricsError as failed:
            if error is None:
                raise
            error.add_note(str(failed))

    def write(
        self, step: int, values: Mapping[str, Any], histograms: Mapping[str, Any] | None = None
    ) -> None:
        """Write the metrics of a step as one line, and to TensorBoard.

        Args:
            step: Number of updates done.
            values: Scalars and vectors by name (Python, NumPy or jax); TensorBoard shows a vector
                as the scalars name/0, name/1, ...
            histograms: Samples of any shape by name, for TensorBoard only; samples that are not
                finite are left out.

        Raises:
            MetricsError: A value is not a number or has more than one axis, a name is "step" or
                "time", or the files can't be written.
        """
        if not self._enabled:
            return
        plain = {name: _plain(name, value) for name, value in values.items()}
        line: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
        taken = sorted(line.keys() & plain)
        if taken:
            raise MetricsError(
                f"{taken[0]} is the name of a field of every line: rename the metric"
            )
        data = json.dumps(line | _encode(plain), allow_nan=False).encode() + b"\n"
        try:
            while data:  # a full disk takes a part of it, then raises
                data = data[self._file.write(data) :]
            self._events.write(int(step), plain, histograms or {})
        except OSError as error:
            raise _unwritten(self._path, error) from error

    def close(self) -> None:
        """Close the metrics file and the TensorBoard events."""
        if not self._enabled:
            return
        self._file.close()
        try:
            self._events.close()
        except OSError as error:
            raise _unwritten(self._path, error) from error


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the lines of a metrics file, one dict for each line, in order.

    Args:
        path: Run folder, or its metrics file.

    Raises:
        MetricsError: The file does not exist, or a line is damaged. An incomplete last line, which
            a killed process leaves, is skipped.
    """
    file = Path(path)
    if file.is_dir():
        file = file / _FILE
    if not file.exists():
        raise MetricsError(f"{file} does not exist: pass the folder of a run")
    return [_decode(line) for _, line in _lines(file)]


class Progress:
    """Display of training progress: a progress bar on a terminal, else lines at intervals.

    The display shows the loss, tokens per second and the remaining time.

    Args:
        total: Number of steps of the whole run.
        start: Number of steps that were done before this process began.
        every: Minimum number of seconds between lines if the stream is not a terminal.
        enabled: Whether this process prints; only one process of a run should.
        stream: Text stream that is printed to; None takes standard error.
        clock: Function that returns the time in seconds.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        every: float = 10.0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._start, self._every = total, start, every
        self._enabled, self._clock = enabled, clock
        self._stream = sys.stderr if stream is None else stream
        self._first: tuple[float, int] | None = None  # (time, step) of the first update
        self._printed = -math.inf
        self._bar = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                total=total, initial=start, file=self._stream, unit="step", dynamic_ncols=True
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(
        self, step: int, loss: float, tokens_per_second: float | None, note: str = ""
    ) -> None:
        """Show the step, loss and speed of the run.

        Args:
            step: Number of updates done.
            loss: Training loss of the last update.
            tokens_per_second: Rate of training; None if it is not known yet.
            note: Text that is shown after the rate; "" for none.
        """
        if not self._enabled:
            return
        rate = (
            "" if tokens_per_second is None else f", {tqdm.format_sizeof(tokens_per_second)} tok/s"
        )
        note = note and f", {note}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}{rate}{note}", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = self._clock()
        if self._first is None:
            self._first = now, step
        if now - self._printed < self._every and step < self._total:
            return
        self._printed = now
        since, first = self._first
        left = ""
        if step > first:
            seconds = (now - since) / (step - first) * (self._total - step)
            left = f", {tqdm.format_interval(seconds)} left"
        self.write(f"step {step}/{self._total}: loss {loss:.4f}{rate}{note}{left}")

    def write(self, text: str) -> None:
        """Print a line above the progress bar, or as an ordinary line if no bar is shown.

        Args:
            text: Line to print.
        """
        if self._enabled:
            tqdm.write(text, file=self._stream)
            self._stream.flush()

    def close(self) -> None:
        """Close the progress bar."""
        if self._bar is not None:
            self._bar.close()


class _Events:
    """Writer of one TensorBoard event file, in the calling thread.

    `tensorboardX.SummaryWriter` writes in a second thread. Once a full disk has ended that thread,
    `SummaryWriter` waits for the thread forever.
    """

    def __init__(self, directory: Path, resume_step: int | None):
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        self._summary, self._proto = summary, event_pb2
        directory.mkdir(exist_ok=True)
        # The nanoseconds keep two writers of the same second apart.
        self._writer = event_file_writer.EventsWriter(
            str(directory / "events"), f".{time.time_ns()}"
        )
        self._flushed = time.monotonic()
        # Powers of 1.1 at both sides of 0, as TensorBoard itself bins.
        powers = 1e-12 * 1.1 ** np.arange(774)
        self._edges = np.concatenate([-powers[::-1], [0.0], powers]).tolist()
        if resume_step is not None:
            # Makes TensorBoard hide earlier writers' events of this step and of later steps.
            self._event(resume_step + 1, session_log={"status": "START"})

    def _event(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._proto.Event(step=step, wall_time=time.time(), **content))

    def write(self, step: int, values: Mapping[str, Any], histograms: Mapping[str, Any]) -> None:
        for name, value in values.items():
            parts = {name: value}
            if isinstance(value, list):
                parts = {f"{name}/{i}": part for i, part in enumerate(value)}
            for tag, part in parts.items():
                self._event(step, summary=self._summary.scalar(tag, float(part)))
        for name, samples in histograms.items():
            array = np.asarray(samples).astype(np.float64).ravel()
            array = array[np.isfinite(array)]
            if array.size:
                self._event(step, summary=self._summary.histogram(name, array, self._edges))
        if time.monotonic() - self._flushed > _TENSORBOARD_FLUSH:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def _plain(name: str, value: Any) -> Any:
    """Convert a scalar or vector to a number or bool of Python, or to a flat list."""
    array = np.asarray(value)
    if array.ndim > 1:
        raise MetricsError(
            f"{name} has shape {array.shape}: write a scalar or a vector, or pass it as a histogram"
        )
    if array.dtype.kind in "biu":
        return array.tolist()
    try:
        if array.dtype.kind not in "fV":  # V: bfloat16 and its like
            raise TypeError
        return array.astype(np.float64).tolist()
    except TypeError:
        raise MetricsError(f"{name} is {value!r}: write a number or a vector of numbers") from None


def _encode(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _encode(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_encode(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return "NaN" if math.isnan(values) else "Infinity" if values > 0 else "-Infinity"
    return values


def _decode(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _decode(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_decode(value) for value in values]
    return _NON_FINITE.get(values, values) if isinstance(values, str) else values


def _lines(file: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return the bytes and the JSON object of every line, except of a half-written last line.

    Raises:
        MetricsError: A complete line is not a JSON object with a step.
    """
    check_regular(file)
    lines = []
    for number, raw in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        line = object_of(raw)
        if line is None and not raw.endswith(b"\n"):
            break
        if line is None or type(line.get("step")) is not int:
            raise MetricsError(
                f"line {number} of {file} is not a JSON object with a step: remove it"
            )
        lines.append((raw.removesuffix(b"\n") + b"\n", line))
    return lines


def _trim(file: Path, last_step: int | None) -> None:
    """Drop a half-written last line and the lines of steps after `last_step`, atomically.

    The rule for a last line without a line break is that of `train.runs.appended`.
    """
    if not file.exists():
        return
    kept = b"".join(
        raw for raw, line in _lines(file) if last_step is None or line["step"] <= last_step
    )
    if kept != file.read_bytes():
        write_atomically(file, kept)


def _unwritten(path: Path, error: OSError) -> MetricsError:
    return MetricsError(
        f"metrics could not be written to {path}: {error.strerror or error}; "
        f"free space or pass another directory"
    )

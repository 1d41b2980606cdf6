"""Measure the time and memory of a run: step times, data wait, MFU, memory, profiler traces."""

import contextlib
import re
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from train.devices.hardware import GIB, chip_of


class Stopwatch:
    """Timer of completed training steps, which reports throughput, MFU and goodput.

    The time of a step runs from the completion of the previous step to its own completion,
    regardless of when the step was dispatched. The first step, which compiles, is not timed. A
    pause for an evaluation or a checkpoint, which `resume` ends, counts for no step.

    Args:
        tokens: Number of tokens per step.
        flops: Number of FLOPs of a step on the whole mesh (`RunConfig.step_flops`).
        peak_flops: Peak FLOP/s of the whole mesh (`peak_flops`); None if unknown.
        start_time: Reading of `clock` at which the process began, for goodput; None takes now.
        window: Number of newest steps that rates and percentiles are computed over.
        clock: Function that returns the time in seconds.
    """

    def __init__(
        self,
        tokens: int,
        flops: float,
        peak_flops: float | None,
        start_time: float | None = None,
        window: int = 100,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._tokens, self._flops, self._peak_flops = tokens, flops, peak_flops
        self._clock, self._start_time = clock, clock() if start_time is None else start_time
        self._last: float | None = None
        self._in_steps = 0.0
        self._waited = 0.0  # for data, since the last completed step
        # Seconds of a step, seconds of the wait for data, and the share of a whole step's tokens.
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=window)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Return a context manager that counts the time inside as the wait for the next batch."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    def step_done(self, share: float = 1.0) -> None:
        """Record that a step is complete on the device.

        Args:
            share: Fraction of a whole step's tokens and FLOPs; below 1 for a batch of shorter rows.
        """
        now = self._clock()
        if self._last is not None:
            self._steps.append((now - self._last, self._waited, share))
            self._in_steps += now - self._last
        self._last, self._waited = now, 0.0

    def resume(self) -> None:
        """Exclude a pause from the next step's time; call this method at the end of the pause.

        All dispatched steps must have been completed before the pause.
        """
        if self._last is not None:
            self._last, self._waited = self._clock(), 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second over the window; None before the second step is complete."""
        if not self._steps:
            return None
        seconds, _, shares = map(sum, zip(*self._steps, strict=True))
        return self._tokens * shares / max(seconds, 1e-9)

    def report(self) -> dict[str, float]:
        """Compute rates and percentiles over the window.

        Returns:
            Mapping from names to values: `tokens_per_second`; `step_seconds` (median),
            `step_seconds_p90` and `step_seconds_p99`; `data_wait`, the fraction of step time in
            which the host waited for a batch; `goodput`, the fraction of the time since the
            process's start that completed steps took, in contrast to startup, compilation,
            evaluation and checkpoints; and, if the peak is known, `mfu`, the median of a step's
            model FLOP/s divided by the peak. The mapping is empty before the second step.
        """
        if self.tokens_per_second is None:
            return {}
        seconds, waited, shares = np.array(self._steps).T
        median, p90, p99 = np.percentile(seconds, (50, 90, 99))
        report = {
            "tokens_per_second": self.tokens_per_second,
            "step_seconds": median,
            "step_seconds_p90": p90,
            "step_seconds_p99": p99,
            "data_wait": waited.sum() / max(seconds.sum(), 1e-9),
            "goodput": self._in_steps / max(self._clock() - self._start_time, 1e-9),
        }
        if self._peak_flops is not None:
            speed = np.median(shares / np.maximum(seconds, 1e-9))
            report["mfu"] = self._flops * speed / self._peak_flops
        return {name: float(value) for name, value in report.items()}

    def readable(self) -> str:
        """Format the report as one line of text."""
        report = self.report()
        if not report:
            return "time: fewer than two steps"
        line = (
            f"time: {report['goodput']:.0%} in steps; a step took {report['step_seconds']:.3g} s "
            f"(median), {report['step_seconds_p99']:.3g} s (99th percentile); "
            f"{report['data_wait']:.0%} of it waiting for data"
        )
        return f"{line}; {report['mfu']:.1%} MFU" if "mfu" in report else line


def peak_flops(mesh: Mesh, tflops_per_device: float | None = None) -> float | None:
    """Return the peak bfloat16 FLOP/s of all devices of a mesh; None if the chip is not known.

    Args:
        mesh: Mesh of the run.
        tflops_per_device: Peak of one device in 10^12 FLOP/s; None looks the peak up by the kind of
            the device in `train.devices.hardware`, which has no entry for CPUs.
    """
    if tflops_per_device is not None:
        return tflops_per_device * 1e12 * mesh.size
    chip = chip_of(mesh.devices.flat[0].device_kind)
    return None if chip is None else chip.flops * mesh.size


def memory() -> dict[str, float]:
    """Measure the memory of this process in GiB.

    Returns:
        Mapping from metric names to GiB: `memory/host_peak_gib`; `memory/device_in_use_gib` and
        `memory/device_peak_gib`, maxima over this process's devices. The last two metrics are left
        out for devices without memory statistics (CPUs).
    """
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    report = {
        "memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    }
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    for name, key in (("in_use", "bytes_in_use"), ("peak", "peak_bytes_in_use")):
        if stats and all(key in found for found in stats):
            report[f"memory/device_{name}_gib"] = max(found[key] for found in stats) / GIB
    return report


class Profiler:
    """Recorder of a profiler trace of a window of steps, for TensorBoard and Perfetto.

    Args:
        window: First and last step, both included, as "10:20" or "steps=10:20"; "" for no trace.
        folder: Folder of the trace.

    Raises:
        ValueError: The window has another form, or its steps are below 1 or in decreasing order.
    """

    def __init__(self, window: str, folder: Path):
        self._first, self._last = parse_window(window)
        self._folder = folder
        self._on = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Return a context manager that annotates a step's dispatch in the trace.

        The trace is started at the first step inside of the window.

        Args:
            number: Number of the step, from 1.
        """
        if not self._on and self._first <= number <= self._last:
            jax.profiler.start_trace(self._folder)
            self._on = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def ends_with(self, number: int) -> bool:
        """Return whether a trace is being recorded, and its last step is `number` or earlier."""
        return self._on and number >= self._last

    def stop(self) -> None:
        """End a trace that is being recorded, and write it, once the window's last step is done."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()


def not_recorded(window: str, start: int, steps: int) -> str | None:
    """Return a notice if a resumed run has already passed steps of its profiler window, else None.

    Args:
        window: First and last step of the window, as in `Profiler`.
        start: Step that the run resumes from.
        steps: Number of steps of the whole run.
    """
    first, last = parse_window(window)
    last = min(last, steps)
    if not first <= min(start, last):
        return None
    left = f"only steps {start + 1} to {last}" if start < last else "nothing"
    return f"profile={window!r}: the run goes on from step {start}, so {left} will be recorded"


def parse_window(text: str) -> tuple[int, int]:
    """Parse "10:20" or "steps=10:20" as first and last step; "" is the empty window (0, -1).

    Raises:
        ValueError: The text has another form, or its steps are below 1 or in decreasing order.
    """
    if not text:
        return 0, -1
    match = re.fullmatch(r"(?:steps=)?(\d+):(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"profile={text!r}: write the first and the last step, such as 10:20")
    return int(match[1]), int(match[2])

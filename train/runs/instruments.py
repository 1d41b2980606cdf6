"""What a run's time and memory go to: steps, data, MFU, percentiles, a profiler window."""

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
    """Times of completed steps, by a clock that never jumps.

    A step takes from the completion of the step before to its own, so that dispatching ahead of
    the device counts for nothing. The first step (it compiles) only starts time, and a pause
    (`resume`: an evaluation, a checkpoint) is no part of any step.

    Args:
        tokens: of a step.
        flops: that a step needs on the whole mesh (`RunConfig.step_flops`).
        peak_flops: FLOP/s of the whole mesh, or None if unknown (`peak_flops`).
        born: when the process began, by the same clock, for goodput; now by default.
        window: how many steps rates and percentiles look back.
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
        self._clock, self._born = clock, clock() if start_time is None else start_time
        self._last: float | None = None
        self._in_steps = 0.0
        self._waited = 0.0  # for data, since the last completed step
        self._steps: deque[tuple[float, float]] = deque(maxlen=window)  # seconds, of which data

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the host's wait for its next batch."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    def step_done(self) -> None:
        now = self._clock()
        if self._last is not None:
            self._steps.append((now - self._last, self._waited))
            self._in_steps += now - self._last
        self._last, self._waited = now, 0.0

    def resume(self) -> None:
        """To be called after a pause before which all steps were completed."""
        if self._last is not None:
            self._last, self._waited = self._clock(), 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Over the window; None before the second step."""
        seconds = sum(seconds for seconds, _ in self._steps)
        return self._tokens * len(self._steps) / max(seconds, 1e-9) if self._steps else None

    def report(self) -> dict[str, float]:
        """Rates over the window, and the share of wall time since birth that went to steps.

        Returns:
            `tokens_per_second`; `step_seconds` (median), `step_seconds_p90`, `step_seconds_p99`;
            `data_wait`, the share of step time in which the host waited for a batch; `goodput`,
            the share of the process's time in completed steps (what is missing: start,
            compilation, evaluation, checkpoints); `mfu`, the model's FLOPs at the median step time
            over the peak, where the peak is known. Empty before the second step.
        """
        if self.tokens_per_second is None:
            return {}
        seconds, waited = np.array(self._steps).T
        median, p90, p99 = np.percentile(seconds, (50, 90, 99))
        report = {
            "tokens_per_second": self.tokens_per_second,
            "step_seconds": median,
            "step_seconds_p90": p90,
            "step_seconds_p99": p99,
            "data_wait": waited.sum() / max(seconds.sum(), 1e-9),
            "goodput": self._in_steps / max(self._clock() - self._born, 1e-9),
        }
        if self._peak_flops is not None:
            report["mfu"] = self._flops / max(median, 1e-9) / self._peak_flops
        return {name: float(value) for name, value in report.items()}

    def readable(self) -> str:
        """One line for a person."""
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
    """Peak FLOP/s of a mesh: its chips' bfloat16 peak (`train.devices.hardware`), or what is given.

    None for devices that the table lacks, such as CPUs.
    """
    if tflops_per_device is not None:
        return tflops_per_device * 1e12 * mesh.size
    chip = chip_of(mesh.devices.flat[0].device_kind)
    return None if chip is None else chip.flops * mesh.size


def memory() -> dict[str, float]:
    """GiB in use and at the peak on this process's fullest device, and the host process's peak.

    Devices that keep no account of their memory (CPUs) are left out.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    report = {
        "memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    }
    accounts = [account for d in jax.local_devices() if (account := d.memory_stats())]
    for name, key in (("in_use", "bytes_in_use"), ("peak", "peak_bytes_in_use")):
        if accounts and all(key in account for account in accounts):
            report[f"memory/device_{name}_gib"] = max(a[key] for a in accounts) / GIB
    return report


class Profiler:
    """Records the steps of a window with jax's profiler, for TensorBoard and Perfetto.

    Args:
        window: `"10:20"` or `"steps=10:20"`: from step 10 to step 20, both included; "" for none.
        folder: where the trace goes.

    Raises:
        ValueError: the window is written in another way.
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
        """Around the dispatch of a step."""
        if not self._on and self._first <= number <= self._last:
            jax.profiler.start_trace(self._folder)
            self._on = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def ends_with(self, number: int) -> bool:
        """Whether step `number` is the last of the window that is being recorded."""
        return self._on and number >= self._last

    def stop(self) -> None:
        """To be called when the last step of the window is complete."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()


def not_recorded(window: str, start: int, steps: int) -> str | None:
    """A line if a run of so many steps that goes on from `start` is past a part of its window."""
    first, last = parse_window(window)
    last = min(last, steps)
    if not first <= min(start, last):
        return None
    left = f"only steps {start + 1} to {last}" if start < last else "nothing"
    return f"profile={window!r}: the run goes on from step {start}, so {left} will be recorded"


def parse_window(text: str) -> tuple[int, int]:
    """First and last step of `"10:20"` or `"steps=10:20"`; a window that never comes for ""."""
    if not text:
        return 0, -1
    match = re.fullmatch(r"(?:steps=)?(\d+):(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"profile={text!r}: write the first and the last step, such as 10:20")
    return int(match[1]), int(match[2])

"""Run the parts of the accelerator benchmark in order, each in its own process."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from train.benchmarks.accelerator.part import LOST, PARTS, has_tiny_sizes, run_part
from train.benchmarks.accelerator.record import DeviceLost, TimeIsUp, read
from train.benchmarks.accelerator.table import tables

LEAST = 10.0  # minimum number of seconds left with which a part is started


@dataclasses.dataclass(frozen=True)
class AcceleratorBenchmark:
    """Benchmark of one GPU or TPU in parts; another call resumes where the last call stopped.

    Attributes:
        minutes: Time limit of this call in minutes; no measurement begins after the limit.
        out: Folder of the results, one JSON file for each part, and of compiled programs.
        parts: Parts to run, in this order: "kernels" (attention against the reference), "step"
            (train step and MFU), "memory" (peak against the forecast), "decode", "rl" (rollouts and
            updates), "precision" (bfloat16 against float32), "then" (the runs of `then`).
        then: JSON Lines file of training runs that use the remaining time (`docs/accelerators.md`);
            none by default.
        tiny: Whether to use tiny sizes in one process, to try the benchmark on a CPU; the measured
            times say nothing about speed.
        table: Whether to only print the folder's results as tables, without measuring.
        compile_for: Topologies such as v5e:2x2 and h100:1, for which the programs are compiled on
            any machine; with topologies, nothing is measured.
    """

    minutes: float = 9.0
    out: str = "runs/accelerator"
    parts: tuple[str, ...] = PARTS
    then: str | None = None
    tiny: bool = False
    table: bool = False
    compile_for: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.minutes >= 1:
            raise ValueError(f"minutes={self.minutes:g} is below 1: a part needs that to start")
        if unknown := [name for name in self.parts if name not in PARTS]:
            raise ValueError(f"unknown part {unknown[0]!r}: choose from {', '.join(PARTS)}")


def main(config: AcceleratorBenchmark) -> None:
    """Run the unfinished parts until the time limit, and print their results as tables.

    With `config.table`, only print the results. With `config.compile_for`, only compile.

    Raises:
        ValueError: An option or the file of runs has a mistake, or a result file is damaged or of
            other sizes.
    """
    folder = Path(config.out).expanduser()
    if config.table:
        print(tables(folder, PARTS))
        return
    folder.mkdir(parents=True, exist_ok=True)
    if config.compile_for:
        from train.benchmarks.accelerator.described import compile_for

        for name in config.compile_for:
            compile_for(name, folder, config.tiny)
            print(tables(folder, (f"compiled_{name.replace(':', '_')}",)), flush=True)
        return
    if config.then is not None:
        from train.benchmarks.accelerator.queued import read_queue

        read_queue(config.then)  # raises for a mistake before any work begins
    end = time.monotonic() + 60 * config.minutes
    for name in config.parts:
        found = read(folder, name, has_tiny_sizes(name, config.tiny))
        done = (found or {}).get("finished", False)
        if name == "then":
            done = config.then is None  # the file may have new runs
        if done:
            continue
        left = end - time.monotonic()
        if left < LEAST:
            print(f"the time is over before {name}: the same command goes on there", flush=True)
            return
        started = time.monotonic()
        finished = _run(name, config, folder, left)
        state = "done" if finished else "cut"
        print(f"{name}: {state} after {time.monotonic() - started:.0f} s", flush=True)
        if (data := read(folder, name)) and data["measurements"]:
            print(tables(folder, (name,)) + "\n", flush=True)


def _run(name: str, config: AcceleratorBenchmark, folder: Path, seconds: float) -> bool:
    """Run a part, and return whether it finished; a mistake in its input exits with status 2."""
    if config.tiny:
        try:
            run_part(name, folder, seconds, True, config.then)
        except (TimeIsUp, DeviceLost):
            return False
        return True
    end, given = time.monotonic() + seconds, {"tiny": False, "then": config.then, "retry": True}
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": str((folder / "compiled").absolute()),
    }
    fraction = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # JAX refuses both
    if not any(map(os.environ.get, fraction)):
        defaults[fraction[0]] = "0.92"  # JAX takes three quarters of a GPU otherwise
    status = LOST
    while status == LOST and (left := end - time.monotonic()) > 0:
        given |= {"name": name, "folder": str(folder), "seconds": max(left - LEAST, 1.0)}
        # A process for each part frees its device memory, and a crash spares the other parts.
        command = [sys.executable, "-m", "train.benchmarks.accelerator.part", json.dumps(given)]
        try:
            status = subprocess.run(command, env=defaults | os.environ, timeout=left).returncode
        except subprocess.TimeoutExpired:
            return False
        given["retry"] = False  # a run that loses the device would lose it again
    if status == 2:  # its message is printed already
        sys.exit(2)
    if status not in (0, 3, LOST):
        print(f"{name}: the process ended with status {status}", file=sys.stderr, flush=True)
    return status == 0

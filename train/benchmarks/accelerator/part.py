"""Run one part of the benchmark: python -m train.benchmarks.accelerator.part JSON (see `main`)."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import jax

from train.benchmarks.accelerator.record import DeviceLost, Record, TimeIsUp
from train.benchmarks.accelerator.sizes import full_sizes, tiny_sizes

LOST = 4
"""Exit status of a process whose device is lost, and whose part a new process can go on with."""

PARTS = ("kernels", "step", "memory", "decode", "rl", "precision", "then")


def run_part(
    name: str, folder: Path, seconds: float, tiny: bool, then: str | None, retry: bool = True
) -> None:
    """Run the measurements of a part that the part's result file does not have yet.

    Args:
        name: Name of the part, one of `PARTS`.
        folder: Folder of the results.
        seconds: Time limit of the part in seconds; no measurement begins after the limit.
        tiny: Whether to use tiny sizes, which also run on a CPU.
        then: File of training runs, for the part "then"; None for no runs.
        retry: Whether to train runs of `then` again that failed before.

    Raises:
        TimeIsUp: The time limit was reached before the part was finished.
        DeviceLost: A measurement has ended all work of this process on the device.
        ValueError: There is no accelerator, the folder's results are of another device, of other
            sizes or damaged, or the file of training runs has a mistake.
    """
    # Imported here, so that a part whose imports fail does not take the others with it.
    if not tiny and jax.default_backend() == "cpu":
        raise ValueError("jax finds no accelerator here: install its plugin, or add --tiny")
    record = Record(folder, name, seconds, tiny=has_tiny_sizes(name, tiny))
    sizes = tiny_sizes() if tiny else full_sizes()
    if name == "then":
        from train.benchmarks.accelerator.queued import measure_queue

        if then is not None:
            measure_queue(record, then, retry)
    elif name == "kernels":
        from train.benchmarks.accelerator.kernels import measure_kernels

        measure_kernels(record, sizes)
    elif name in ("decode", "rl"):
        from train.benchmarks.accelerator import inference

        {"decode": inference.measure_decoding, "rl": inference.measure_rl}[name](record, sizes)
    else:
        from train.benchmarks.accelerator import training

        measure = {
            "step": training.measure_steps,
            "memory": training.measure_memory,
            "precision": training.measure_precision,
        }
        measure[name](record, sizes)
    record.finish()


def has_tiny_sizes(name: str, tiny: bool) -> bool:
    """Whether `tiny` makes a part's sizes tiny; the runs of "then" have the sizes of their file."""
    return tiny and name != "then"


def main() -> None:
    """Run a part with the arguments of `run_part` in JSON, the only command-line argument.

    The exit status is 3 if the time limit was reached, `LOST` if a new process must go on, and 2
    after a `ValueError`.
    """
    given = json.loads(sys.argv[1])
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        run_part(**given | {"folder": Path(given["folder"])})
    except TimeIsUp:
        sys.exit(3)
    except DeviceLost:
        sys.exit(LOST)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _end_with(parent: int) -> None:
    """End this process once its parent has ended, so that nothing holds the accelerator."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()

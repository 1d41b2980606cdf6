"""One part in a process of its own: python -m train.benchmarks.accelerator.part (see `main`)."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import jax

from train.benchmarks.accelerator.record import Record, TimeIsUp
from train.benchmarks.accelerator.sizes import full_sizes, tiny_sizes

PARTS = ("kernels", "step", "memory", "decode", "rl", "precision", "then")


def run_part(name: str, folder: Path, seconds: float, tiny: bool, then: str | None) -> None:
    """Measure a part, going on where its file stops.

    Args:
        name: Name of the part, one of `PARTS`.
        folder: Folder of the results.
        seconds: Time for it; no measurement begins later.
        tiny: Whether sizes are tiny.
        then: File of training runs, for the part "then".

    Raises:
        TimeIsUp: The part is not finished.
        ValueError: There is no accelerator, the folder's results are of another device, or the file
            has a mistake.
    """
    # Imported here, so that a part whose imports fail does not take the others with it.
    if not tiny and jax.default_backend() == "cpu":
        raise ValueError("jax finds no accelerator here: install its plugin, or add --tiny")
    record, sizes = Record(folder, name, seconds), tiny_sizes() if tiny else full_sizes()
    if name == "then":
        from train.benchmarks.accelerator.queued import measure_queue

        if then is not None:
            measure_queue(record, then)
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


def main() -> None:
    """Run the part that the only argument describes in JSON; status 3 if the time was over."""
    given = json.loads(sys.argv[1])
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        run_part(**given | {"folder": Path(given["folder"])})
    except TimeIsUp:
        sys.exit(3)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _end_with(parent: int) -> None:
    """End this process once its parent has, so that nothing holds the accelerator."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()

"""The folder of a run: who holds it, whether it may be continued, what a failure leaves in it."""

import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train.config import RunConfig, as_json, differences
from train.data import PackedData
from train.distributed import agreed, several, tell

_LOCK = ".lock"
NETWORK_DISK = 90.0  # seconds after which every host sees a new file


def check_continuation(out: Path, saved: dict[str, Any] | None, config: RunConfig) -> None:
    """Raise if `out` holds a run that this config would not continue."""
    found = differences(saved["config"], as_json(config)) if saved else []
    if found:
        raise ValueError(
            f"{out} holds a run of another config ({'; '.join(found[:3])}"
            f"{'; ...' if len(found) > 3 else ''}): pass another --out, or the saved values"
        )


def check_fingerprint(out: Path, saved: dict[str, Any] | None, data: PackedData) -> None:
    """Raise if `out` holds a run on other data."""
    if saved and saved["data_fingerprint"] != data.fingerprint:
        raise ValueError(
            f"{out} was trained on data {saved['data_fingerprint']}, the corpus is now "
            f"{data.fingerprint}: restore the corpus, or pass another --out"
        )


@contextlib.contextmanager
def only_run_in(out: Path) -> Iterator[None]:
    """Hold the run folder: a second run in it would overwrite the first one's files.

    Process 0 holds it for all processes of its run, however many a second run has.
    """
    if jax.process_index() > 0:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is going on in {out}: pass another --out (the processes of one run "
                "find each other by --distributed.auto or --distributed.coordinator)"
            ) from None
        lock.truncate(0)
        lock.write(secrets.token_hex())
        lock.flush()
        yield


def check_shared(out: Path) -> None:
    """Raise in all processes unless all see the folder that process 0 holds.

    Else each would write its part of a checkpoint to a disk of its own.
    """
    if not several():
        return
    lock = out / _LOCK
    held, *_ = tell(lock.read_text() if jax.process_index() == 0 else None)
    with agreed():
        deadline = time.monotonic() + NETWORK_DISK
        while not (lock.exists() and lock.read_text() == held):
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{out} is not the folder that process 0 has under this name: pass an --out "
                    "on a disk that all processes share"
                )
            time.sleep(0.5)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a kill or a full disk leaves the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save_evidence(
    out: Path, step: int, batch: Mapping[str, np.ndarray], metrics: Mapping[str, Any]
) -> str:
    """Keep the batch and metrics of a step whose loss is not finite; returns the error line."""
    folder = out / f"nonfinite-step-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"batch-{jax.process_index()}.npz"
    np.savez(part, tokens=batch["tokens"], rows=batch["rows"])
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    evidence = {
        "step": step,
        "loss": str(loss),
        "grad_norm": str(norm),
        "forks": {name: np.asarray(sums).tolist() for name, sums in metrics["forks"].items()},
        "learning_rate": float(metrics["learning_rate"]),
    }
    if jax.process_index() == 0:
        (folder / "metrics.json").write_text(json.dumps(evidence, indent=2))
    return (
        f"step {step}: loss {loss}, gradient norm {norm}: stopped; its batch and metrics "
        f"are in {folder}, the last checkpoint is untouched; look at the batch, or lower "
        "optimizer.learning_rate"
    )

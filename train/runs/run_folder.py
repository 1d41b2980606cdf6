"""The folder of a run: who holds it, whether it may be continued, what a failure leaves in it."""

import contextlib
import fcntl
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from train.cli.plugins import missing_plugins
from train.devices.distributed import broadcast, is_multiprocess, sync_errors
from train.runs.resume import differences

_LOCK, _OTHERS = ".lock", ".lock-others"
NETWORK_DISK = 90.0  # seconds after which every host sees a new file


def check_continuation(out: Path, saved: dict[str, Any] | None, config: Any) -> None:
    """Raise if `out` holds a run that this config would not continue."""
    try:
        found = differences(saved["config"], config) if saved else []
    except ValueError as error:
        hint = missing_plugins(saved["config"] if saved else {})
        raise ValueError(f"{out} holds a run that can't be read: {error}{hint}") from error
    if found:
        raise ValueError(
            f"{out} holds a run of another config ({'; '.join(found[:3])}"
            f"{'; ...' if len(found) > 3 else ''}): pass another --out, or the saved values"
        )


def check_data(out: Path, saved: dict[str, Any] | None, fingerprint: str) -> None:
    """Raise if `out` holds a run on other data."""
    if saved and saved["data_fingerprint"] != fingerprint:
        raise ValueError(
            f"{out} was trained on data {saved['data_fingerprint']}, they are now {fingerprint}: "
            "restore the corpus or task, or pass another --out"
        )


def check_base(out: Path, saved: dict[str, Any] | None, meta: Mapping[str, Any]) -> None:
    """Raise if the run in `out` stands beside other frozen weights."""
    if saved and saved.get("base") != meta.get("base"):
        raise ValueError(
            f"{out} was trained beside weights {saved.get('base')}, they are now "
            f"{meta.get('base')}: put those back that it began with, or pass another --out"
        )


@contextlib.contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Hold the run folder: a second run in it would overwrite the first one's files.

    Every process of the run calls it. Process 0 holds one file for all, however many processes a
    second run has. The others share another one, so that a run is refused, too, while a process of
    an earlier run is left that has not noticed the end of its process 0.

    Raises:
        ValueError: in all processes: another run holds the folder, or they see different folders.
    """
    with contextlib.ExitStack() as held:
        token = secrets.token_hex()
        with sync_errors():
            if jax.process_index() == 0:
                held.enter_context(_first(out, token))
        if is_multiprocess():
            first, *_ = broadcast(token)
            with sync_errors():
                _check_shared(out, first)
                if jax.process_index() > 0:
                    held.enter_context(_locked(out / _OTHERS, fcntl.LOCK_SH, _taken(out)))
        yield
        if is_multiprocess():
            # Process 0 lets go last: whoever comes next finds nobody left of this run.
            if jax.process_index() > 0:
                held.close()
            broadcast(None)


@contextlib.contextmanager
def _first(out: Path, token: str) -> Iterator[None]:
    """Hold the folder as process 0, once no process of an earlier run is left."""
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out / _LOCK, fcntl.LOCK_EX, _taken(out)) as lock:
        left = (
            f"a process of an earlier run in {out} is still there, though its process 0 is not: "
            "end it, or wait until it notices (distributed.heartbeat seconds)"
        )
        # Nobody can take it from here on who does not hold the first lock or belong to this run.
        with _locked(out / _OTHERS, fcntl.LOCK_EX, left):
            pass
        lock.truncate(0)
        lock.write(token)
        lock.flush()
        yield


@contextlib.contextmanager
def _locked(path: Path, how: int, refusal: str) -> Iterator[TextIO]:
    with path.open("a+") as file:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(refusal) from None
        yield file


def _taken(out: Path) -> str:
    return (
        f"another run is going on in {out}: pass another --out (the processes of one run "
        "find each other by --distributed.auto or --distributed.coordinator)"
    )


def _check_shared(out: Path, token: str) -> None:
    """Raise unless this process sees the folder that process 0 holds.

    Else each would write its part of a checkpoint to a disk of its own.
    """
    lock = out / _LOCK
    deadline = time.monotonic() + NETWORK_DISK
    while not (lock.exists() and lock.read_text() == token):
        if time.monotonic() > deadline:
            raise ValueError(
                f"{out} is not the folder that process 0 has under this name: pass an --out "
                "on a disk that all processes share"
            )
        time.sleep(0.5)


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
        "aux": {name: np.asarray(sums).tolist() for name, sums in metrics["aux"].items()},
        "learning_rate": float(metrics["learning_rate"]),
    }
    if jax.process_index() == 0:
        (folder / "metrics.json").write_text(json.dumps(evidence, indent=2))
    return (
        f"step {step}: loss {loss}, gradient norm {norm}: stopped; its batch and metrics "
        f"are in {folder}, the last checkpoint is untouched; look at the batch, or lower "
        "optimizer.learning_rate"
    )

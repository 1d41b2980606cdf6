"""Lock a run folder, check it before a run is resumed, and save evidence of a failed step."""

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
from train.devices.distributed import allgather, is_multiprocess, sync_errors
from train.runs.metadata import why_other_data
from train.runs.resume import differences

_LOCK, _OTHERS = ".lock", ".lock-others"
NETWORK_DISK = 90.0
"""Maximum number of seconds until every host sees a new file on a shared disk."""


def check_continuation(out: Path, saved: dict[str, Any] | None, config: Any) -> None:
    """Raise a ValueError if a run folder holds a run that this config may not resume.

    Args:
        out: Run folder.
        saved: Metadata of the folder's newest checkpoint; None if there is none.
        config: Config dataclass of the run that is to resume.
    """
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
    """Raise a ValueError if a run folder holds a run that was trained on other data.

    Args:
        out: Run folder.
        saved: Metadata of the folder's newest checkpoint; None if there is none.
        fingerprint: Hash of the data of the run that is to resume.
    """
    if saved and saved["data_fingerprint"] != fingerprint:
        raise ValueError(
            f"{out} was trained on data {saved['data_fingerprint']}, they are now {fingerprint}: "
            f"restore the corpus or task, or pass another --out{why_other_data(saved)}"
        )


def check_base(out: Path, saved: dict[str, Any] | None, meta: Mapping[str, Any]) -> None:
    """Raise a ValueError if a run folder holds a run with other frozen parameters.

    Args:
        out: Run folder.
        saved: Metadata of the folder's newest checkpoint; None if there is none.
        meta: Metadata of the run that is to resume, with the parameters' checksum under `base`.
    """
    if saved and saved.get("base") != meta.get("base"):
        raise ValueError(
            f"{out} was trained with frozen weights {saved.get('base')}, they are now "
            f"{meta.get('base')}: put those back that it began with, or pass another --out"
        )


@contextlib.contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Return a context manager that locks a run folder against a second run.

    A second run would overwrite the files of the first. Every process of the run must enter the
    context. Process 0 locks one file for the whole run, and the other processes share the lock of a
    second file. So a new run is also refused if process 0 of an earlier run has ended while another
    process of that run is still alive.

    Args:
        out: Run folder, which is made if it does not exist.

    Raises:
        ValueError: Another run has locked the folder, or the processes see different folders. All
            processes raise the error.
    """
    with contextlib.ExitStack() as locks:
        token = secrets.token_hex()
        with sync_errors():
            if jax.process_index() == 0:
                locks.enter_context(_first(out, token))
        if is_multiprocess():
            first, *_ = allgather(token)
            with sync_errors():
                _check_shared(out, first)
                if jax.process_index() > 0:
                    locks.enter_context(_locked(out / _OTHERS, fcntl.LOCK_SH, _taken(out)))
        yield
        if is_multiprocess():
            # Process 0 unlocks last, so that the next run finds no process of this one.
            if jax.process_index() > 0:
                locks.close()
            allgather(None)


@contextlib.contextmanager
def _first(out: Path, token: str) -> Iterator[None]:
    """Lock the folder as process 0; raise a ValueError if a process of another run holds a lock."""
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out / _LOCK, fcntl.LOCK_EX, _taken(out)) as lock:
        left = (
            f"a process of an earlier run in {out} is still there, though its process 0 is not: "
            "end it, or wait until it notices (distributed.heartbeat seconds)"
        )
        # From here on, only processes of this run can lock the second file.
        with _locked(out / _OTHERS, fcntl.LOCK_EX, left):
            pass
        lock.truncate(0)
        lock.write(token)
        lock.flush()
        yield


@contextlib.contextmanager
def _locked(path: Path, how: int, refusal: str) -> Iterator[TextIO]:
    with path.open("a+", encoding="utf-8") as file:
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
    """Raise a ValueError unless this process sees the folder that process 0 has locked.

    With different folders, each process would write its part of a checkpoint to its own disk.
    """
    lock = out / _LOCK
    deadline = time.monotonic() + NETWORK_DISK
    while not (lock.exists() and lock.read_text(encoding="utf-8") == token):
        if time.monotonic() > deadline:
            raise ValueError(
                f"{out} is not the folder that process 0 has under this name: pass an --out "
                "on a disk that all processes share"
            )
        time.sleep(0.5)


def save_evidence(
    out: Path, step: int, batch: Mapping[str, np.ndarray], metrics: Mapping[str, Any]
) -> str:
    """Save the batch and metrics of a step whose loss or gradient is not finite.

    Args:
        out: Run folder.
        step: Number of the step.
        batch: Local rows of the batch, which this process has read: arrays "tokens" and "rows".
        metrics: Metrics that the train step returned.

    Returns:
        Error message for the user, which names the folder of the saved files.
    """
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
        (folder / "metrics.json").write_text(json.dumps(evidence, indent=2), encoding="utf-8")
    return (
        f"step {step}: loss {loss}, gradient norm {norm}: stopped; its batch and metrics "
        f"are in {folder}, the last checkpoint is untouched; look at the batch, or lower the "
        "learning rate"
    )

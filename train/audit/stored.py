"""Arrays that an audit has trained, stored in a folder as a checkpoint with metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.runs.checkpoint import Checkpointer, load_meta, load_params
from train.runs.run_folder import run_lock


def save_stored(
    folder: Path, kind: str, leaves: Mapping[str, Any], meta: Mapping[str, Any]
) -> None:
    """Write named arrays and metadata to a folder.

    Args:
        folder: Folder to write.
        kind: Kind of the arrays in words, e.g. "tuned lens", which `read_stored` checks.
        leaves: Mapping from name to array.
        meta: JSON-serializable metadata.
    """
    with run_lock(folder), Checkpointer(folder, 1) as checkpointer:
        rest = {"step": np.zeros((), np.int32)}  # a checkpoint needs a second tree with an array
        checkpointer.save(0, dict(leaves), rest, {"kind": kind, **meta}, force=True)


def read_stored(
    folder: str | Path, kind: str, names: Sequence[str]
) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Read the metadata and arrays that `save_stored` wrote.

    Args:
        folder: Folder to read.
        kind: Kind of the arrays that was given to `save_stored`.
        names: Names of the required arrays.

    Returns:
        Metadata, and a mapping from name to array.

    Raises:
        ValueError: The folder holds nothing of this kind, an array is missing, or the checkpoint is
            damaged.
    """
    path = Path(folder).expanduser()
    meta = load_meta(path)
    if meta is None or meta.get("kind") != kind:
        found = "nothing" if meta is None else meta.get("kind", "a run")
        raise ValueError(f"{folder} holds {found}, no {kind}: pass the folder of one")
    meta, leaves = load_params(path)
    if missing := [name for name in names if name not in leaves]:
        raise ValueError(f"{folder} has no {', '.join(missing)}: it was edited, train it again")
    return meta, leaves

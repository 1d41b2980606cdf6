"""What an audit has trained, in a folder: a checkpoint like a run's, and what it is of."""

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
    """Write arrays by name with what they are.

    Args:
        folder: Folder to write.
        kind: What the arrays are, in words.
        leaves: Arrays by name.
        meta: Metadata as JSON can write them.
    """
    with run_lock(folder), Checkpointer(folder, 1) as checkpointer:
        rest = {"step": np.zeros((), np.int32)}  # a checkpoint has a second tree, never empty
        checkpointer.save(0, dict(leaves), rest, {"kind": kind, **meta}, force=True)


def read_stored(
    folder: str | Path, kind: str, names: Sequence[str]
) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Metadata and arrays that `save_stored` wrote.

    Raises:
        ValueError: The folder holds no such thing, or it is damaged.
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

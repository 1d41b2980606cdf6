"""The item `meta` of a checkpoint: version, the caller's metadata, shape and dtype of leaves."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thoughtbubbles.fields import shown
from train.runs.files import check_regular
from train.runs.leaves import CheckpointError, forms, key_impls

FORMAT = 1
"""Version of the checkpoint format, raised when older code would misread newer checkpoints."""

ITEMS = ("params", "train")
_PARTS = ("meta", "leaves", "keys")


def make_envelope(
    meta: Mapping[str, Any], trees: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Build the content of a checkpoint's item `meta`, called the envelope, as JSON values.

    Args:
        meta: Metadata of the caller.
        trees: Mapping from the name of an item to its leaves, a mapping from names to arrays.

    Returns:
        Dict of `format` (version), `meta`, `leaves` (shape and dtype of each leaf of each item)
        and `keys` (implementation of each leaf that is a PRNG key).
    """
    return {
        "format": FORMAT,
        "meta": dict(meta),
        "leaves": {item: forms(tree) for item, tree in trees.items()},
        "keys": {item: key_impls(tree) for item, tree in trees.items()},
    }


def read_envelope(folder: Path) -> dict[str, Any]:
    """Read and check the envelope of a checkpoint, as `make_envelope` built it.

    Args:
        folder: Step folder.

    Returns:
        Dict with the entries `meta`, `leaves` and `keys`.

    Raises:
        CheckpointError: A newer version of this library wrote the checkpoint.
        OSError: The file can't be read.
        ValueError: The file is damaged.
    """
    file = folder / "meta" / "metadata"
    check_regular(file)
    envelope = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(envelope, dict):
        raise ValueError("it is no object")
    version = envelope.get("format", 0)  # older than versions, with the layout of 1
    if type(version) is not int:
        raise ValueError(f"format={version!r:.60} is no version")
    if version > FORMAT:
        unknown = ", ".join(sorted(envelope.keys() - {"format", *_PARTS})) or "none"
        raise CheckpointError(
            f"checkpoint {folder} has format {shown(version)}, this version of thoughtbubbles "
            f"reads {FORMAT} (fields unknown here: {unknown[:100]}): install a newer one"
        )
    parts = {part: envelope.get(part) for part in _PARTS}
    for part, value in parts.items():
        if not isinstance(value, dict):
            raise ValueError(f"{part} is no object")
        for item in ITEMS if part != "meta" else ():
            leaves = value.get(item)
            if not isinstance(leaves, dict) or not all(isinstance(v, str) for v in leaves.values()):
                raise ValueError(f"{part} of {item} are no texts")
    return parts

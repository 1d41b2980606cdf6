r"""Files of JSON Lines that a command appends to, and goes on with after an interruption.

The last line of such a file may lack its line break. One rule holds for all of these files:

- A last line that is a whole JSON object is kept, as editors may leave out the last line break; the
  next append adds it.
- A last line that is no JSON object is dropped if the file is the command's own, which its first
  line tells: a kill or a full disk has left a half of it, and its content is computed again.
- In a file of other content nothing is dropped; an append begins a new line.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

IsOwn = Callable[[bytes], bool]
"""Function that says of a file's first line, which may be a half, whether the command wrote it."""


def begins_with(head: bytes) -> IsOwn:
    """Return the `IsOwn` of a command whose files all begin with `head`."""
    return lambda first: first[: len(head)] == head[: len(first)]


def object_of(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object that a line holds; None for a half of one, and for any other text."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def drop_half_line(path: Path, is_own: IsOwn) -> None:
    """Drop an interrupted last line of a command's own file; no other line or file is changed.

    Args:
        path: File, which need not exist.
        is_own: Function that recognises the command's files by their first line.
    """
    if path.is_file() and not _ends_whole(path):
        lines = path.read_bytes().splitlines(keepends=True)
        if object_of(lines[-1]) is None and is_own(lines[0]):
            os.truncate(path, path.stat().st_size - len(lines[-1]))


def append_objects(path: Path, objects: Iterable[Mapping[str, Any]], is_own: IsOwn) -> None:
    """Append objects to a file, each as a line of JSON, after `drop_half_line`.

    Args:
        path: File, which is made with its folder if it does not exist.
        objects: JSON-serializable mappings.
        is_own: Function that recognises the command's files by their first line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    drop_half_line(path, is_own)
    begin = "" if not path.is_file() or _ends_whole(path) else "\n"
    data = (begin + "".join(f"{json.dumps(each)}\n" for each in objects)).encode()
    with path.open("ab", buffering=0) as file:
        while data:  # a full disk takes a part of it, then raises
            data = data[file.write(data) :]


def _ends_whole(path: Path) -> bool:
    """Return whether a file is empty or ends in a line break."""
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"

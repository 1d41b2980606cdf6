"""JSON Lines: one JSON object on each line; an error names file, line and field."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.data.config import DataError


class JsonLine(NamedTuple):
    """One object of a JSON Lines file.

    Attributes:
        where: File and line number, for error messages.
        number: Line number in the file, from 1.
        fields: Fields of the object by name.
    """

    where: str
    number: int
    fields: dict[str, Any]


def read_json_lines(path: Path, texts: Sequence[str] = ()) -> Iterator[JsonLine]:
    """Objects of a JSON Lines file in order, one at a time; blank lines are skipped.

    Args:
        path: File in UTF-8; one whose name ends in .gz is unpacked.
        texts: Names of fields that every object must have, with a string as their value.

    Raises:
        DataError: The file cannot be read, is not UTF-8, or has a line that is no JSON object or
            lacks one of `texts`.
    """
    unpack = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        # Only "\n" ends a line: JSON text may hold other line separators of Unicode.
        with unpack(path, "rt", encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield JsonLine(where, number, _object(line, where, texts))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}): convert it") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; repair it or name another file") from error


def _object(line: str, where: str, texts: Sequence[str]) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}): repair or delete it") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise DataError(f"{where}: a JSON {kind}, not an object: {line.strip()[:40]}")
    for name in texts:
        if not isinstance(value.get(name), str):
            found = json.dumps(value[name])[:40] if name in value else "missing"
            raise DataError(f'{where}: the field "{name}" is {found}: give a string')
    return value

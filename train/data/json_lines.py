"""Read JSON Lines, one JSON object on each line; errors name file, line and field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.data.config import DataError
from train.data.streams import file_lines, file_text, uncompressed_name


class JsonLine(NamedTuple):
    """One record of a file, usually a line of JSON Lines.

    Attributes:
        where: File, and number of the line, item or row, for error messages.
        number: Number of the line, of the item in a JSON array, or of the row in Arrow or Parquet,
            from 1.
        fields: Fields of the object keyed by name.
    """

    where: str
    number: int
    fields: dict[str, Any]


def read_json_lines(
    path: Path, texts: Sequence[str] = (), encoding: str = "utf-8"
) -> Iterator[JsonLine]:
    """Yield the objects of a JSON Lines file in order; blank lines are skipped.

    A file whose name ends in .json may hold one array of objects instead, which is read into memory
    as a whole.

    Args:
        path: Path of the file, which is decompressed if its name says so (`streams.DECOMPRESSORS`).
        texts: Names of fields that every object must have, with a string as their value.
        encoding: Encoding of a file without a byte order mark.

    Raises:
        DataError: The file cannot be read, is not text, or has a line that is not a JSON object or
            lacks one of `texts`.
    """
    if uncompressed_name(path.name).endswith(".json") and _is_array(path, encoding):
        items = _parsed("".join(file_text(path, encoding)), str(path))
        for number, value in enumerate(items, 1):
            where = f"{path}, item {number}"
            yield JsonLine(where, number, _object(value, where, texts))
        return
    for number, line in enumerate(file_lines(path, encoding), 1):
        if line and not line.isspace():
            where = f"{path}, line {number}"
            yield JsonLine(where, number, _object(_parsed(line, where), where, texts))


def _is_array(path: Path, encoding: str) -> bool:
    begin = (text.lstrip() for text in file_text(path, encoding))
    return next(filter(None, begin), "").startswith("[")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}): repair or delete it") from error


def _object(value: Any, where: str, texts: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        hint = ": one array of all objects belongs in a .json file" * isinstance(value, list)
        shown = json.dumps(value, ensure_ascii=False)[:40]
        raise DataError(f"{where}: a JSON {type(value).__name__}, not an object: {shown}{hint}")
    for name in texts:
        check_text(value, name, where)
    return value


def check_text(fields: dict[str, Any], name: str, where: str, way_out: str = "") -> str:
    """Return the string of a field, and check that it can be encoded as UTF-8.

    Args:
        fields: Fields of an object.
        name: Name of the field.
        where: File and line number, for error messages.
        way_out: Advice in the error message if the field is not a string; "" asks for a string.

    Raises:
        DataError: The field is missing, is not a string, or holds an unpaired surrogate (half a
            character).
    """
    value = fields.get(name)
    if not isinstance(value, str):
        found = json.dumps(value, ensure_ascii=False)[:40] if name in fields else "missing"
        raise DataError(f'{where}: the field "{name}" is {found}: {way_out or "give a string"}')
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f'{where}: the field "{name}" holds half a character ({error.reason}): repair it'
            ) from error
    return value

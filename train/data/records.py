"""Read records with a field of text: JSON Lines, Parquet, and Arrow as `datasets` saves it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data.config import DataError
from train.data.json_lines import JsonLine, check_text, read_json_lines
from train.data.streams import uncompressed_name

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
ARROW_SUFFIXES = (".parquet", ".arrow")

_BATCH = 256  # records in memory


def is_records(name: str) -> bool:
    """Whether a file of this name holds records, by its suffix; JSON may be compressed."""
    return uncompressed_name(name).endswith(JSON_SUFFIXES) or name.lower().endswith(ARROW_SUFFIXES)


def read_records(path: Path) -> Iterator[JsonLine]:
    """Yield the records of a file in order, with all fields; few records are in RAM at a time.

    Null values of Arrow and Parquet count as missing fields, in nested objects too, because there
    every record has all columns of the file.

    Args:
        path: Path of the file; without a suffix of Parquet or Arrow it is read as JSON Lines.

    Raises:
        DataError: The file cannot be read, or a line is not a JSON object.
    """
    if not path.name.lower().endswith(ARROW_SUFFIXES):
        yield from read_json_lines(path)
        return
    with _arrow_errors(path), contextlib.ExitStack() as stack:
        _, batches = _opened(path, None, stack)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield JsonLine(f"{path}, row {number}", number, _without_nulls(row))


def _without_nulls(value: Any) -> Any:
    """Copy objects and lists, without the fields of objects that are null."""
    if isinstance(value, dict):
        return {name: _without_nulls(of) for name, of in value.items() if of is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def record_texts(path: Path, field: str, encoding: str = "utf-8") -> Iterator[str]:
    """Yield the text of each record of a file in order; few records are in memory at a time.

    Args:
        path: Path of the file.
        field: Name of the field, or column, that holds the text.
        encoding: Encoding of JSON without a byte order mark.

    Raises:
        DataError: The file cannot be read, or a record has no text in this field.
    """
    if path.name.lower().endswith(ARROW_SUFFIXES):
        yield from _column(path, field)
        return
    for where, _, fields in read_json_lines(path, encoding=encoding):
        way_out = ""
        if field not in fields:
            named = [name for name, value in fields.items() if isinstance(value, str)]
            way_out = _other_field(named)
        yield check_text(fields, field, where, way_out)


def _other_field(names: list[str]) -> str:
    found = ", ".join(names)[:80] or "none"
    return f"name another, files(path=..., field=...); those of text are {found}"


def _column(path: Path, field: str) -> Iterator[str]:
    count = 0
    with _arrow_errors(path), contextlib.ExitStack() as stack:
        schema, batches = _opened(path, field, stack)
        kinds = {column.name: _value_type(column.type) for column in schema}
        if not _is_text(kinds.get(field)):
            found = str(kinds[field]) if field in kinds else "missing"
            named = [name for name, kind in kinds.items() if _is_text(kind)]
            raise DataError(f'{path}: the column "{field}" is {found}: {_other_field(named)}')
        for batch in batches:
            for value in batch.column(batch.schema.get_field_index(field)).to_pylist():
                count += 1
                if value is None:
                    raise DataError(
                        f'{path}, row {count}: the column "{field}" is null: give a string'
                    )
                yield value


@contextlib.contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    import pyarrow  # half a second, which a corpus of text files does not need

    try:
        yield
    except DataError:
        raise
    # The last two: text that is not UTF-8, and times that Python lacks.
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot read {path}: {why}; repair it or leave it out") from error


def _opened(
    path: Path, field: str | None, stack: contextlib.ExitStack
) -> tuple[Any, Iterator[Any]]:
    """Open a file; return its schema and record batches, with one column or (None) all columns."""
    import pyarrow
    from pyarrow import ipc, parquet

    if path.suffix.lower() == ".parquet":
        # A buffer, so that pages are read one after the other and not a row group at once.
        file = stack.enter_context(parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False))
        schema = file.schema_arrow
        columns = None if field is None else [name for name in schema.names if name == field]
        return schema, file.iter_batches(_BATCH, columns=columns, use_threads=False)
    source = stack.enter_context(pyarrow.memory_map(str(path)))
    try:
        stream = stack.enter_context(ipc.open_stream(source))
        return stream.schema, iter(stream)
    except pyarrow.ArrowInvalid:  # Arrow's file format, not its streaming format
        whole = stack.enter_context(ipc.open_file(source))
        return whole.schema, (whole.get_batch(i) for i in range(whole.num_record_batches))


def _value_type(kind: Any) -> Any:
    from pyarrow import types

    return kind.value_type if types.is_dictionary(kind) else kind


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if kind is None:
        return False
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)

"""Stream files as bytes, text or lines, decompressed and decoded; errors name file and line."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from train.data.config import DataError

CHUNK = 1 << 20
"""Number of bytes that are read at a time."""

LONGEST_LINE = 1 << 28
"""Maximum number of characters in a line. Files with longer lines are refused, because one line is
held in memory as a whole."""


def _open_plain(path: Path) -> IO[bytes]:
    return open(path, "rb")


def _open_zstd(path: Path) -> IO[bytes]:
    from pyarrow import input_stream  # tensorflow-datasets brings it; it takes 0.1 s to import

    return input_stream(str(path), compression="zstd")


DECOMPRESSORS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
"""Mapping from the suffix of a compressed file's name to the function that opens the file."""

# The mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def uncompressed_name(name: str) -> str:
    """Name of a file in lower case, without the suffix of its compression (see `DECOMPRESSORS`)."""
    name = name.lower()
    compression = next((suffix for suffix in DECOMPRESSORS if name.endswith(suffix)), "")
    return name.removesuffix(compression)


def file_bytes(path: Path) -> Iterator[bytes]:
    """Yield the content of a file in chunks, decompressed if its name says so (`DECOMPRESSORS`).

    Raises:
        DataError: The path is not a regular file, or the file cannot be read or is damaged.
    """
    if path.exists() and not path.is_file():  # a pipe would wait for ever
        raise DataError(f"cannot read {path}: no regular file; name a file")
    unpack = DECOMPRESSORS.get(path.suffix.lower(), _open_plain)
    try:
        with unpack(path) as stream:
            while chunk := stream.read(CHUNK):
                yield chunk
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"cannot read {path}: {error}; repair it or leave it out") from error


def file_text(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """Yield the text of a file in chunks; line ends stay as they are.

    Args:
        path: Path of the file.
        encoding: Encoding of a file without a byte order mark. A mark of UTF-8, UTF-16 or UTF-32
            takes precedence, and is removed from the text.

    Raises:
        DataError: The file cannot be read, is not text in its encoding, or has a NUL byte.
    """
    decoder = None
    line = 1
    for chunk in file_bytes(path):
        if decoder is None:
            encoding = next((name for mark, name in _MARKS if chunk.startswith(mark)), encoding)
            decoder = codecs.getincrementaldecoder(encoding)()
        try:
            text = decoder.decode(chunk)
        except UnicodeDecodeError as error:
            raise _not_text(path, encoding, error, line) from error
        if "\0" in text:
            line += text[: text.index("\0")].count("\n")
            raise _not_text(path, encoding, "NUL byte", line)
        line += text.count("\n")
        yield text
    try:
        if decoder is not None and (text := decoder.decode(b"", final=True)):
            yield text
    except UnicodeDecodeError as error:
        raise _not_text(path, encoding, error, line) from error


def _not_text(path: Path, encoding: str, why: UnicodeDecodeError | str, line: int) -> DataError:
    if isinstance(why, UnicodeDecodeError):
        line += why.object[: why.start].decode(encoding, "ignore").count("\n")
        why = f"byte 0x{why.object[why.start]:02x}, {why.reason}"
    name = "UTF-8" if encoding.startswith("utf-8") else encoding
    return DataError(
        f"{path} is not {name} text (line {line}: {why}): convert it to UTF-8 with iconv, name its "
        "encoding where the command has that option, or leave it out"
    )


def file_lines(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    r"""Yield the lines of a file without their line ends, which are \n, \r\n or \r.

    The text after the last line end is a line only if it is not empty. Other line separators of
    Unicode are part of a line, as in JSON.

    Args:
        path: Path of the file.
        encoding: Encoding of the file, as in `file_text`.

    Raises:
        DataError: The file cannot be read, is not text, or has a line of more than `LONGEST_LINE`
            characters.
    """
    begun: list[str] = []  # pieces of a line whose end is not yet read
    count = length = 0
    after_return = False
    for text in file_text(path, encoding):
        if after_return and text.startswith("\n"):
            text = text[1:]
        after_return = text.endswith("\r")
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        first, *others = text.split("\n")
        begun.append(first)
        length += len(first)
        if length > LONGEST_LINE:
            raise DataError(
                f"{path}, line {count + 1}: longer than {LONGEST_LINE:,} characters: cut it, or "
                "leave the file out"
            )
        if others:
            yield "".join(begun)
            yield from others[:-1]
            count += len(others)
            begun, length = [others[-1]], len(others[-1])
    if length:
        yield "".join(begun)

"""Files to text: which files count, how they are decoded, where a lone file is cut."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from train.data.config import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
"""Suffixes of the files of a folder that are read, also followed by .gz. HTML is left out, since it
often lies beside the text that it was made from: one could be trained on and the other held out."""

SECTION = 8192
"""Number of characters after which a lone file is cut at the next blank line."""


def is_text(name: str) -> bool:
    """Whether a folder's file of this name belongs to the corpus."""
    return name.lower().removesuffix(".gz").endswith(TEXT_SUFFIXES)


def read_text(path: Path) -> str:
    """Text of a file in UTF-8, unpacked if its name ends in .gz.

    Raises:
        DataError: The file cannot be read, or is not text.
    """
    try:
        raw = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"cannot read {path}: {error}; repair it or move it out of the corpus"
        ) from error
    try:
        if b"\0" in raw:
            raise ValueError(f"NUL byte at {raw.index(0)}")
        return raw.decode("utf-8-sig")
    except ValueError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error}): convert it or move it out of the corpus"
        ) from error


def sections(text: str) -> Iterator[str]:
    """Cut the text of a lone file, which has no document boundaries, at blank lines.

    Sections have SECTION to 2·SECTION characters (the last one may be shorter); where there is no
    blank line they end at a line's end. Joined, they are the text.
    """
    start = 0
    while len(text) - start > SECTION:
        end = text.find("\n\n", start + SECTION, start + 2 * SECTION) + 2
        if end < 2:
            end = text.find("\n", start + SECTION) + 1
        if end < 1:
            break
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]

"""Choose the text files of a folder by their names, and split long texts into documents."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from train.data.streams import uncompressed_name

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
"""Suffixes of the text files that are read in a folder, plain or compressed. HTML is left out: an
HTML file often lies beside the text that it was made from, and one copy could be trained on and the
other copy held out."""

SECTION = 8192
"""Number of characters after which a single file is split at the next blank line."""

WHOLE = 1 << 20
"""Number of characters up to which a file of a folder is one document. A longer file is split after
each `WHOLE` characters, at the next blank line, so that memory does not grow with the file."""

_BLANK = re.compile(r"\r?\n\r?\n|\r\r")
_END = re.compile(r"\r\n?|\n")


def is_text(name: str) -> bool:
    """Whether a file of this name in a folder is text of the corpus, by its suffix."""
    return uncompressed_name(name).endswith(TEXT_SUFFIXES)


def sections(chunks: Iterable[str], size: int = SECTION) -> Iterator[str]:
    """Split a text without document boundaries into sections at blank lines.

    A section ends at the first blank line between `size` and 2·`size` characters. Without one it
    ends at the next line end after `size` characters, or after `WHOLE` characters (at least
    2·`size`) if there is no line end. The last section may be shorter. The concatenation of all
    sections is the text.

    Args:
        chunks: Pieces of the text, in order.
        size: Number of characters after which a section ends at the next blank line.
    """
    text, start = "", 0
    for chunk in chunks:
        text, start = text[start:] + chunk, 0
        # A section of up to 2·size characters may still find a blank line in the next chunk.
        while len(text) - start > 2 * size and (end := _cut(text, start, size)):
            yield text[start:end]
            start = end
    while len(text) - start > size and (end := _cut(text, start, size)):
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _cut(text: str, start: int, size: int) -> int | None:
    """Index of the end of the section that begins at `start`; None if it has no end yet."""
    longest = start + max(WHOLE, 2 * size)
    found = _BLANK.search(text, start + size, start + 2 * size)
    found = found or _END.search(text, start + size, longest)
    if found:
        return found.end()
    return longest if len(text) > longest else None

"""Text files to documents: which names count, and where a long text is cut."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from train.data.streams import unpacked_name

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
"""Suffixes of the text files of a folder that are read, also packed. HTML is left out, since it
often lies beside the text that it was made from: one could be trained on and the other held out."""

SECTION = 8192
"""Number of characters after which a lone file is cut at the next blank line."""

WHOLE = 1 << 20
"""Number of characters up to which a file of a folder is one document; a longer one is cut as a
lone file is, so that memory does not grow with it."""

_BLANK = re.compile(r"\r?\n\r?\n|\r\r")
_END = re.compile(r"\r\n?|\n")


def is_text(name: str) -> bool:
    """Whether a folder's file of this name is text that belongs to the corpus."""
    return unpacked_name(name).endswith(TEXT_SUFFIXES)


def sections(chunks: Iterable[str], size: int = SECTION) -> Iterator[str]:
    """Cut a text that has no document boundaries at blank lines.

    Sections have `size` to 2·`size` characters (the last one may be shorter); where there is no
    blank line they end at a line's end, or after `WHOLE` characters where there is none either.
    Joined, they are the text.

    Args:
        chunks: The text in pieces.
        size: Number of characters after which the text is cut.
    """
    text, start = "", 0
    for chunk in chunks:
        text, start = text[start:] + chunk, 0
        # Until more is read, a blank line might follow that lies behind the end of the chunk.
        while len(text) - start > 2 * size and (end := _cut(text, start, size)):
            yield text[start:end]
            start = end
    while len(text) - start > size and (end := _cut(text, start, size)):
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _cut(text: str, start: int, size: int) -> int | None:
    """Index behind the section that begins at `start`; None where it has no end yet."""
    longest = start + max(WHOLE, 2 * size)
    found = _BLANK.search(text, start + size, start + 2 * size)
    found = found or _END.search(text, start + size, longest)
    if found:
        return found.end()
    return longest if len(text) > longest else None

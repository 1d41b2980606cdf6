"""Files to text: which files count, how one is decoded, where a lone file is cut."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from train.data.config import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".html", ".htm")
"""Files of a folder that are read; also with .gz behind. Others are left alone."""

SECTION = 8192
"""Characters after which a lone file is cut at the next blank line."""

_INLINE = frozenset(
    ["a", "abbr", "b", "bdi", "bdo", "big", "cite", "code", "del", "dfn", "em", "font", "i"]
    + ["img", "ins", "kbd", "mark", "q", "s", "samp", "small", "span", "strong", "sub", "sup"]
    + ["time", "tt", "u", "var", "wbr"]
)  # tags that don't end a line


def is_text(name: str) -> bool:
    """Whether a folder's file of this name belongs to the corpus."""
    return name.lower().removesuffix(".gz").endswith(TEXT_SUFFIXES)


def read_text(path: Path) -> str:
    """The text of a file: unpacked (.gz), decoded as UTF-8, freed of tags (.html, .htm).

    Raises:
        DataError: the file cannot be read, or isn't text.
    """
    name = path.name.lower()
    try:
        raw = path.read_bytes()
        if name.endswith(".gz"):
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"cannot read {path}: {error}; repair it or move it out of the corpus"
        ) from error
    try:
        if b"\0" in raw:
            raise ValueError(f"NUL byte at {raw.index(0)}")
        text = raw.decode("utf-8-sig")
    except ValueError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error}): convert it or move it out of the corpus"
        ) from error
    return strip_html(text) if name.removesuffix(".gz").endswith((".html", ".htm")) else text


def sections(text: str) -> Iterator[str]:
    """Cuts the text of a lone file, which has no document boundaries, at blank lines.

    The pieces are SECTION to 2·SECTION characters long (the last one may be shorter); where there
    is no blank line they end at a line's end. Joined, they are the text.
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


def strip_html(text: str) -> str:
    """What a reader of an HTML page sees, one block per line; whitespace kept inside <pre>."""
    stripper = _Stripper()
    stripper.feed(text)
    stripper.close()
    text = re.sub(r"[ \t]+\n", "\n", "".join(stripper.pieces))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


class _Stripper(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._hidden = False
        self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden = self._hidden or tag in ("script", "style")
        self._verbatim += tag == "pre"
        if tag not in _INLINE:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = self._hidden and tag not in ("script", "style")
        self._verbatim = max(0, self._verbatim - (tag == "pre"))
        if tag not in _INLINE:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if not self._verbatim:
            data = re.sub(r"\s+", " ", data)
            if not self.pieces or self.pieces[-1].endswith("\n"):
                data = data.lstrip()
        if data:
            self.pieces.append(data)

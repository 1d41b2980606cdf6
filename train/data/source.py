"""Files that make a corpus: the standard library's own, a folder's, or a lone one."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from train.data import text
from train.data.config import DataError

_NOT_LIBRARY = frozenset(
    ["site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3"]
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Files that make a corpus: paths relative to `root`, sorted; a lone file is cut in pieces."""

    name: str
    root: Path
    files: tuple[str, ...]
    lone: bool = False

    def fingerprint(self) -> str:
        """Of the files' names and bytes."""
        total = hashlib.blake2b(digest_size=16)
        for file in self.files:
            try:
                with open(self.root / file, "rb") as content:
                    total.update(hashlib.file_digest(content, hashlib.blake2b).digest())
            except OSError as error:
                raise DataError(
                    f"cannot read {self.root / file}: {error}; move it out of the corpus"
                ) from error
            total.update(os.fsencode(file) + b"\0")
        return total.hexdigest()

    def documents(self, file: str) -> Iterator[str]:
        """The documents of one file that hold more than white space."""
        content = text.read_text(self.root / file)
        pieces = text.sections(content) if self.lone else iter([content])
        return (piece for piece in pieces if piece.strip())


def find_source(spec: str) -> Source:
    """The files behind "stdlib" or a path. In a folder: those with a suffix of
    `text.TEXT_SUFFIXES`, at any depth; hidden files and folders are left out.

    Raises:
        DataError: the path doesn't exist, or holds no text file.
    """
    if spec == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = tuple(f for f in _walk(root, _NOT_LIBRARY) if f.endswith(".py"))
        wanted = ".py"
    else:
        root = Path(spec).expanduser().absolute()
        if root.is_file():
            return Source(spec, root.parent, (root.name,), lone=True)
        if not root.is_dir():
            raise DataError(
                f'corpus {spec} does not exist: give a folder, a file, "stdlib" or "tfds:NAME"'
            )
        files = tuple(f for f in _walk(root) if text.is_text(f))
        wanted = " ".join(text.TEXT_SUFFIXES) + ", also with .gz"
    if not files:
        raise DataError(f"corpus {spec} is empty: no text file ({wanted}) in {root}")
    return Source(spec, root, files)


def _walk(root: Path, excluded: frozenset[str] = frozenset()) -> list[str]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in excluded and not f.startswith(".")]
        paths = (Path(folder, f) for f in files if not f.startswith("."))
        found += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    return sorted(found)

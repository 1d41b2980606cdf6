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
class TextFiles:
    """Text files of one corpus.

    Attributes:
        name: Name of the corpus in messages.
        root: Folder of the files.
        files: Paths of the files relative to `root`, sorted.
        lone: Whether the corpus is a single file, which is cut into sections.
    """

    name: str
    root: Path
    files: tuple[str, ...]
    lone: bool = False

    def fingerprint(self) -> str:
        """Hash of the files' names and bytes.

        Raises:
            DataError: A file cannot be read.
        """
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
        """Documents of one file; those of white space alone are left out.

        Args:
            file: Path of the file relative to `root`.

        Raises:
            DataError: The file cannot be read, or is not text.
        """
        content = text.read_text(self.root / file)
        pieces = text.sections(content) if self.lone else iter([content])
        return (piece for piece in pieces if piece.strip())


def standard_library() -> TextFiles:
    """The source files of Python's standard library, without its tests.

    Raises:
        DataError: This Python has no source files of its standard library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in _walk(root, _NOT_LIBRARY) if file.endswith(".py")]
    return _not_empty(TextFiles("stdlib", root, tuple(files)), ".py")


def find_text_files(path: str) -> TextFiles:
    """The text files of a folder, or a lone file.

    In a folder, files with a suffix of `text.TEXT_SUFFIXES` count, at any depth; hidden files and
    folders are left out. A lone file counts whatever its suffix is.

    Args:
        path: Path of a folder or a file.

    Raises:
        DataError: The path does not exist, or holds no text file.
    """
    root = Path(path).expanduser().absolute()
    if root.is_file():
        return TextFiles(path, root.parent, (root.name,), lone=True)
    if not root.is_dir():
        raise DataError(
            f'corpus {path} does not exist: give a folder, a file, "stdlib", "tfds:NAME", or a '
            "source of a --plugin"
        )
    files = [file for file in _walk(root) if text.is_text(file)]
    suffixes = " ".join(text.TEXT_SUFFIXES) + ", also with .gz"
    return _not_empty(TextFiles(path, root, tuple(files)), suffixes)


def _not_empty(found: TextFiles, suffixes: str) -> TextFiles:
    if not found.files:
        raise DataError(f"corpus {found.name} is empty: no text file ({suffixes}) in {found.root}")
    return found


def _walk(root: Path, excluded: frozenset[str] = frozenset()) -> list[str]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in excluded and not f.startswith(".")]
        paths = (Path(folder, f) for f in files if not f.startswith("."))
        found += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    return sorted(found)

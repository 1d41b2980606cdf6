"""Find the text files of a corpus: Python's standard library, a folder, or a single file."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from train.data.config import DataError
from train.data.records import ARROW_SUFFIXES, JSON_SUFFIXES, is_records, record_texts
from train.data.streams import DECOMPRESSORS, file_text, uncompressed_name
from train.data.text import SECTION, TEXT_SUFFIXES, WHOLE, is_text, sections

_NOT_LIBRARY = frozenset(
    ["site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3"]
)

# Names of splits as `datasets` finds them in the paths of a data set's files.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Files of one corpus: text, or records with a field of text.

    Attributes:
        name: Name of the corpus in messages.
        root: Folder of the files.
        files: Paths of the files relative to `root`, sorted.
        lone: Whether the corpus is a single file; a single text file is split into sections.
        held_out: Files among `files` that are the corpus's own held-out split; empty if it has
            none.
        field: Name of the record field that holds the text.
        encoding: Encoding of files without a byte order mark.
        passed_over: Mapping from reason to the number of files that are skipped for this reason.
    """

    name: str
    root: Path
    files: tuple[str, ...]
    lone: bool = False
    held_out: frozenset[str] = frozenset()
    field: str = "text"
    encoding: str = "utf-8"
    passed_over: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def note(self) -> str:
        """Message for the user: how many files are read, and how many are skipped and why."""
        return files_note(len(self.files), self.passed_over)

    def fingerprint(self) -> str:
        """Compute a hash of the files' names and contents, and of the options of reading.

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
        how = f"{self.lone} {sorted(map(os.fsencode, self.held_out))} {self.field} {self.encoding}"
        total.update(how.encode())
        return total.hexdigest()

    def documents(self, file: str) -> Iterator[str]:
        """Read the documents of one file; documents of white space alone are left out.

        Args:
            file: Path of the file relative to `root`.

        Raises:
            DataError: The file cannot be read, is not text, or has a record without text.
        """
        path = self.root / file
        if is_records(file):
            pieces = record_texts(path, self.field, self.encoding)
        else:
            text = file_text(path, self.encoding)
            pieces = sections(text, SECTION if self.lone else WHOLE)
        return (piece for piece in pieces if piece and not piece.isspace())


def files_note(count: int, passed_over: Mapping[str, int]) -> str:
    """Format for the user how many files of a folder are read, and how many are skipped and why.

    Args:
        count: Number of files that are read.
        passed_over: Mapping from reason to the number of files that are skipped for this reason.
    """
    read = f"{count:,} file{'s' * (count != 1)} read"
    if not passed_over:
        return read
    reasons = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count:,} {reason}" for reason, count in reasons[:6]]
    shown += ["..."] * (len(reasons) > 6)
    return f"{read}, {sum(passed_over.values()):,} passed over: {', '.join(shown)}"


def suffix_of(file: str) -> str:
    """Suffix of a file, or "without a suffix", as the reason why the file is skipped."""
    return Path(file.lower()).suffix or "without a suffix"


def standard_library() -> TextFiles:
    """Find the source files of Python's standard library, without its tests.

    Raises:
        DataError: This Python has no source files of its standard library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in walk_files(root, Counter(), _NOT_LIBRARY) if file.endswith(".py")]
    if not files:
        raise DataError(f"corpus stdlib is empty: no .py file in {root}")
    return TextFiles("stdlib", root, tuple(files))


def find_text_files(
    path: str, field: str = "text", suffixes: str = "", encoding: str = "utf-8"
) -> TextFiles:
    """Find the files of a corpus: the files of a folder, or a single file.

    A folder that holds records (JSON Lines, Parquet, Arrow) is a data set: only the records are
    read, because text beside them (README.md) describes them. In another folder, files with a
    suffix of `text.TEXT_SUFFIXES` are read. Files are found at any depth and through links; hidden
    files and folders are left out. A single file is read whatever its suffix is.

    Args:
        path: Path of a folder or a file.
        field: Name of the record field that holds the text.
        suffixes: Suffixes of the files to read in a folder, separated by spaces, such as
            ".txt .jsonl"; "" chooses as described above.
        encoding: Encoding of files without a byte order mark.

    Raises:
        DataError: The path does not exist or has no such file, or the encoding is unknown.
    """
    _check_encoding(encoding)
    root = Path(path).expanduser().absolute()
    if root.is_file():
        one = (root.name,)
        return TextFiles(path, root.parent, one, lone=True, field=field, encoding=encoding)
    if not root.is_dir():
        what = "is no regular file" if root.exists() else "does not exist"
        raise DataError(
            f'corpus {path} {what}: give a folder, a file, "stdlib", "tfds:NAME", or a '
            "source of a --plugin"
        )
    passed: Counter[str] = Counter()
    found = walk_files(root, passed)
    belongs, why = _chooser(found, suffixes)
    files = [file for file in found if belongs(file)]
    passed.update(why(file) for file in found if not belongs(file))
    files, held_out = _own_splits(files, passed)
    if not files:
        known = suffixes or " ".join(
            (
                *TEXT_SUFFIXES,
                *JSON_SUFFIXES[:-1],
                *ARROW_SUFFIXES,
                "also compressed:",
                *DECOMPRESSORS,
            )
        )
        note = TextFiles(path, root, (), passed_over=+passed).note
        raise DataError(f"corpus {path} is empty: no text file ({known}) in {root}; {note}")
    return TextFiles(path, root, tuple(files), False, held_out, field, encoding, +passed)


def _check_encoding(encoding: str) -> None:
    try:
        "".encode(encoding)
    except (LookupError, ValueError):
        raise DataError(
            f"unknown encoding {encoding!r}: write one of Python's, such as latin-1 or utf-16"
        ) from None


def _chooser(found: list[str], suffixes: str) -> tuple[Callable[[str], bool], Callable[[str], str]]:
    """Return two functions of a file: whether the file is read, and the reason to skip it."""
    if suffixes:
        chosen = tuple(suffixes.lower().split())
        named = lambda file: file.lower().endswith(chosen)  # noqa: E731
        return lambda file: named(file) or named(uncompressed_name(file)), suffix_of
    # A plain .json mostly describes data (dataset_info.json); .json data (C4) are compressed.
    records = lambda file: is_records(file) and not file.lower().endswith(".json")  # noqa: E731
    if any(map(records, found)):
        return records, lambda file: suffix_of(file) + " beside records" * is_text(file)
    return is_text, suffix_of


def _own_splits(files: list[str], passed: Counter[str]) -> tuple[list[str], frozenset[str]]:
    """Return the files to read, and the files among them in the data set's own held-out split.

    The validation split is held out, or without one the test split. With both, the test split is
    not read.
    """
    of = {file: _split_name(file) if is_records(file) else None for file in files}
    if "train" not in of.values():
        return files, frozenset()
    held_out = next((name for name in ("validation", "test") if name in of.values()), None)
    unread = {file for file, name in of.items() if name == "test" != held_out}
    passed["of the test split"] += len(unread)
    chosen = frozenset(file for file, name in of.items() if name is not None and name == held_out)
    return [file for file in files if file not in unread], chosen


def _split_name(file: str) -> str | None:
    """Split that a path names, such as data/train-00000-of-00002.parquet or test/part.jsonl."""
    words = re.split(r"[^a-z]+", file.lower())
    for word in reversed(words):  # the file's own name says more than its folder's
        for split, names in _SPLITS.items():
            if word in names:
                return split
    return None


def walk_files(
    root: Path, passed: Counter[str], excluded: frozenset[str] = frozenset()
) -> list[str]:
    """List the files of a folder at any depth, also through links; hidden files are left out.

    Args:
        root: Folder to search.
        passed: Mapping from reason to the number of skipped files and folders, which is updated.
        excluded: Names of folders that are skipped and not counted.

    Returns:
        Paths relative to the folder, sorted.

    Raises:
        DataError: The folder cannot be read.
    """

    def unread(error: OSError) -> None:
        if Path(error.filename) == root:
            raise DataError(f"cannot read {root}: {error.strerror}") from error
        passed["folders that cannot be read"] += 1

    found: list[str] = []
    seen: set[tuple[int, int]] = set()  # a link may lead to a folder that it lies in
    for folder, folders, files in os.walk(root, onerror=unread, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            passed["folders linked twice"] += 1
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        passed["hidden"] += sum(name.startswith(".") for name in (*folders, *files))
        folders[:] = sorted(f for f in folders if f not in excluded and not f.startswith("."))
        for name in files:
            path = Path(folder, name)
            if name.startswith("."):
                continue
            if path.is_file():
                found.append(path.relative_to(root).as_posix())
            else:
                passed["broken links" if path.is_symlink() else "no regular files"] += 1
    return sorted(found)

"""Write the documents of a corpus to disk in two splits, in constant memory, and read them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from train.data import splits
from train.data.config import DataError
from train.data.corpus import Split
from train.data.storage import record_writer
from train.data.text_files import TextFiles

SIDES: tuple[Split, Split] = ("train", "validation")

_METADATA = "documents.json"
_BUFFER = 1 << 15  # bytes of each of 256 buckets in memory
_KEY, _SIZE = 16, 8  # bytes in front of a spooled document
_BLOCK = 1 << 18  # bytes of a record


def write_documents(files: TextFiles, validation: float, folder: Path) -> None:
    """Write the distinct documents of text files to disk as two splits, each in order of a hash.

    Of documents with equal `splits.document_digest`, the first document is kept. If the corpus has
    its own held-out split, copies of held-out documents are removed from the training split.

    Args:
        files: Files of the corpus.
        validation: Fraction of the documents to hold out, between 0 and 1, if the corpus has no
            held-out split of its own.
        folder: Empty folder to write.

    Raises:
        DataError: A file cannot be read or is not text, or a split would have no document.
        OSError: The data cannot be written.
    """
    spool = _Spool(folder / "spool")
    ends: dict[Split, tuple[bytes, bytes]] = {}  # lowest and highest digest of each split
    own: set[bytes] = set()  # digests of documents that the corpus itself holds out
    read = 0
    in_order = sorted(files.files, key=lambda file: file not in files.held_out)
    for file in tqdm(in_order, "reading", unit="file", leave=False, disable=None):
        for document in files.documents(file):
            read += 1
            key = splits.document_digest(document)
            if file in files.held_out:
                own.add(key)
            elif key in own:
                continue
            held = file in files.held_out if files.held_out else splits.held_out(key, validation)
            side = SIDES[held]
            low, high = ends.get(side, (key, key))
            ends[side] = min(low, key), max(high, key)
            spool.add(side, key, document.encode())
    spool.flush()
    moved = _to_move(files, ends)
    counts = dict.fromkeys(SIDES, 0)
    with contextlib.ExitStack() as stack:
        blocks = {
            side: _Blocks(stack.enter_context(record_writer(_file(folder, side)))) for side in SIDES
        }
        for side in SIDES:
            for key, document in spool.in_order(side):
                to = SIDES[side == "train"] if key == moved else side
                blocks[to].add(document)
                counts[to] += 1
        for block in blocks.values():
            block.flush()
    (folder / "spool").rmdir()
    stored = counts | {"repeated": read - sum(counts.values())}
    (folder / _METADATA).write_text(json.dumps(stored) + "\n", encoding="utf-8")


def _to_move(files: TextFiles, ends: dict[Split, tuple[bytes, bytes]]) -> bytes | None:
    """Digest of the document to move to an empty split; None if both splits have documents.

    It is the document whose digest is nearest to the border between the splits.
    """
    if len(ends) == 2:
        return None
    if files.held_out:
        empty = "train" if "validation" in ends else "validation"
        raise DataError(
            f"corpus {files.name} has no document in its own {empty} split that is not in the "
            f"other: choose files that have both with suffixes=..., or one file ({files.note})"
        )
    low, high = next(iter(ends.values()), (b"", b""))
    if low == high:
        raise splits.too_few(files.name, int(bool(ends)))
    return low if "train" in ends else high


class StoredDocuments:
    """Reader of documents that `write_documents` has written.

    Args:
        folder: Folder of the documents.

    Raises:
        DataError: The folder's metadata are damaged.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        try:
            stored = json.loads((folder / _METADATA).read_text(encoding="utf-8"))
            self._counts = {name: int(stored[name]) for name in (*SIDES, "repeated")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged() from error

    @property
    def repeated(self) -> int:
        """Number of documents that were not stored, because equal documents are stored."""
        return self._counts["repeated"]

    def documents(self, split: Split) -> Iterator[str]:
        """Yield the documents of a split in their stored order.

        Raises:
            DataError: The stored documents are damaged.
        """
        # Here: what needs no packed rows runs without array_record.
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        def block_of(index: int) -> bytes:
            try:
                return source[index]
            except RuntimeError as error:  # array_record, at a hash that differs
                raise self._damaged() from error

        try:
            source = ArrayRecordDataSource(os.fspath(_file(self._folder, split)))
            length = len(source)
        except (RuntimeError, ValueError) as error:
            raise self._damaged() from error
        count = 0
        for index in range(length):
            block, start = block_of(index), 0
            while start < len(block):
                size = int.from_bytes(block[start : start + _SIZE], "little")
                start += _SIZE + size
                yield block[start - size : start].decode()
                count += 1
        if count != self._counts[split]:
            raise self._damaged()

    def count(self, split: Split) -> int:
        return self._counts[split]

    def _damaged(self) -> DataError:
        return DataError(f"the stored documents in {self._folder} are damaged: delete that folder")


class _Blocks:
    """Writer that joins documents into records, in which each document follows its size in bytes.

    Args:
        write: Function that appends a record.
    """

    def __init__(self, write: Callable[[bytes], None]):
        self._write = write
        self._block = bytearray()

    def add(self, document: bytes) -> None:
        self._block += len(document).to_bytes(_SIZE, "little") + document
        if len(self._block) > _BLOCK:
            self.flush()

    def flush(self) -> None:
        if self._block:
            self._write(bytes(self._block))
        self._block.clear()


class _Spool:
    """Temporary files that sort documents by a hash: 256 files per split, one per first byte.

    Args:
        folder: Folder of the files.
    """

    def __init__(self, folder: Path):
        folder.mkdir()
        self._folder = folder
        self._buffers: dict[tuple[Split, int], bytearray] = {}

    def add(self, side: Split, key: bytes, document: bytes) -> None:
        order = hashlib.md5(side.encode() + key.hex().encode()).digest()
        bucket = side, order[0]
        buffer = self._buffers.setdefault(bucket, bytearray())
        buffer += order + key + len(document).to_bytes(_SIZE, "little") + document
        if len(buffer) > _BUFFER:
            self._write(bucket, buffer)

    def flush(self) -> None:
        for bucket, buffer in self._buffers.items():
            self._write(bucket, buffer)
        self._buffers.clear()

    def in_order(self, side: Split) -> Iterator[tuple[bytes, bytes]]:
        """Yield key and text of each distinct document in order of the hash; remove the files."""
        for path in sorted(self._folder.glob(f"{side}-*")):
            with open(path, "rb") as file:
                before = b""
                for order, start, size in sorted(_index(path)):
                    if order == before:
                        continue
                    before = order
                    file.seek(start)
                    yield file.read(_KEY), file.read(_SIZE + size)[_SIZE:]
            path.unlink()

    def _write(self, bucket: tuple[Split, int], buffer: bytearray) -> None:
        with open(self._folder / f"{bucket[0]}-{bucket[1]:02x}", "ab") as file:
            file.write(buffer)
        buffer.clear()


def _index(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """Yield the hash, the offset of the key, and the size in bytes of each document of a file."""
    with open(path, "rb") as file:
        while head := file.read(_KEY + _KEY + _SIZE):
            size = int.from_bytes(head[-_SIZE:], "little")
            yield head[:_KEY], file.tell() - _KEY - _SIZE, size
            file.seek(size, os.SEEK_CUR)


def _file(folder: Path, side: str) -> Path:
    return folder / f"{side}.array_record"

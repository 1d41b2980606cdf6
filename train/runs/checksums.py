"""Checksums of a checkpoint's files, one for each piece, so that damaged arrays can be named.

Orbax verifies its indices and manifests (OCDBT nodes end in a CRC-32C), but neither the bytes of
arrays nor its JSON. So the file `checksums` of a step folder lists the CRC-32 of every piece of
every file of the step's items, and the names of the arrays in the piece. The file begins with a
CRC-32 of the list itself. The list refers to files and byte ranges only, so that any mesh and any
number of hosts can verify a checkpoint.
"""

import functools
import json
import os
import zlib
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from train.runs.files import check_regular

NAME = "checksums"
_PART = "checksums-of-process-"  # prefix of each process's file until the step is committed
_FOLDED = 2**16  # bytes of each of the two vectors that a long piece is folded to
_BUFFER = 16 * _FOLDED
_SHOWN = 3

# Offset in the file, number of bytes, checksum, names of the arrays in the piece.
Piece = tuple[int, int, int, list[str]]


class DamagedFileError(ValueError):
    """A file differs from what was written; the message names the file and the arrays in it."""


class NoChecksumsError(DamagedFileError):
    """A step folder has no file of checksums."""


def write_part(item: Path, process: int) -> None:
    """Write the checksums of the files that one process has written for an item.

    Args:
        item: Folder of the item.
        process: Index of the process, which has finished writing its arrays.
    """
    own = item / f"ocdbt.process_{process}"
    found = _pieces_of_files(item, [path for path in own.rglob("*") if path.is_file()])
    (item / f"{_PART}{process}").write_text(json.dumps(found), encoding="utf-8")


def write(folder: Path) -> None:
    """Write the file of checksums of a step folder.

    The files that `write_part` wrote are merged into the file of checksums and deleted; checksums
    of all other files are computed.

    Args:
        folder: Step folder, with one folder for each item.
    """
    found: dict[str, list[Piece]] = {}
    for item in sorted(path for path in folder.iterdir() if path.is_dir()):
        parts = list(item.glob(f"{_PART}*"))
        pieces: dict[str, list[Piece]] = {}
        for part in parts:
            pieces |= json.loads(part.read_text(encoding="utf-8"))
            part.unlink()
        rest = [
            p for p in item.rglob("*") if p.is_file() and str(p.relative_to(item)) not in pieces
        ]
        pieces |= _pieces_of_files(item, rest)
        found |= {f"{item.name}/{name}": pieces[name] for name in sorted(pieces)}
    body = json.dumps(found).encode()
    with open(folder / NAME, "wb") as stream:
        stream.write(b"%08x\n" % zlib.crc32(body) + body)
        stream.flush()
        os.fsync(stream.fileno())  # before the folder gets its name


def verify(folder: Path, items: Iterable[str], share: int = 0, shares: int = 1) -> None:
    """Verify the files of a checkpoint's items against their checksums.

    Args:
        folder: Step folder.
        items: Names of the items whose files are verified.
        share: Index of the part of the files to verify, such as the index of this process.
        shares: Number of parts that the files are divided into, such as the number of processes.

    Raises:
        DamagedFileError: A file differs or is missing, or there are no checksums.
        OSError: The file system fails to read a file that exists.
    """
    found = _read(folder)
    names: list[str] = []
    for item in items:
        inside = [name for name in found if name.startswith(f"{item}/")]
        if not inside:
            raise DamagedFileError(f"{NAME} lists no file of {item}")
        names += inside
    for name in sorted(names)[share::shares]:
        _check_regular(folder, name)
        try:
            with open(folder / name, "rb") as stream:
                for _, size, checksum, arrays in found[name]:
                    if _checksum(stream, size) != checksum:
                        raise DamagedFileError(f"{name} is not as it was written{_of(arrays)}")
                if stream.read(1):
                    raise DamagedFileError(f"{name} is longer than it was written")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            arrays = [array for *_, inside in found[name] for array in inside]
            raise DamagedFileError(f"{name}: {error.strerror}{_of(arrays)}") from error


def _check_regular(folder: Path, name: str) -> None:
    try:
        check_regular(folder / name)
    except ValueError:
        raise DamagedFileError(f"{name} is no regular file") from None


def _read(folder: Path) -> dict[str, list[Piece]]:
    _check_regular(folder, NAME)
    try:
        head, _, body = (folder / NAME).read_bytes().partition(b"\n")
    except FileNotFoundError:
        raise NoChecksumsError(f"{folder} has no checksums") from None
    except (NotADirectoryError, IsADirectoryError) as error:
        raise DamagedFileError(f"{NAME}: {error.strerror}") from error
    if head != b"%08x" % zlib.crc32(body):
        raise DamagedFileError(f"{NAME} is not as it was written")
    return json.loads(body)


def _of(arrays: list[str]) -> str:
    names = list(dict.fromkeys(arrays))
    shown = ", ".join(names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f": array {shown}{more}" if names else ""


def _checksum(stream: BufferedReader, size: int) -> int:
    """Compute the CRC-32 of the next `size` bytes of a file; a long piece is first folded.

    A long piece is folded to Fletcher's checksum, as in ZFS, over 64 KiB vectors of 64-bit words:
    the sum of all vectors and the sum of all partial sums. Folding is twice as fast as a CRC.
    """
    if size <= _BUFFER:
        return zlib.crc32(stream.read(size))
    totals, positions = (np.zeros(_FOLDED // 8, np.uint64) for _ in range(2))
    buffer = bytearray(_BUFFER)
    view, rows = memoryview(buffer), np.frombuffer(buffer, np.uint64).reshape(-1, len(totals))
    left = size
    while left:
        count = stream.readinto(view[: min(left, _BUFFER)])
        if not count:
            break  # truncated: the CRC tells
        left -= count
        used = -(-count // _FOLDED)
        view[count : used * _FOLDED] = bytes(used * _FOLDED - count)
        for row in rows[:used]:
            np.add(totals, row, totals)
            np.add(positions, totals, positions)
    return zlib.crc32(positions.tobytes(), zlib.crc32(totals.tobytes(), left))


def _pieces_of_files(item: Path, files: Iterable[Path]) -> dict[str, list[Piece]]:
    """Compute the pieces of each file, keyed by the file's path relative to the item's folder."""
    names = {path: str(path.relative_to(item)) for path in files}
    arrays: dict[str, dict[tuple[int, int], list[str]]] = {}
    for path in names:
        if path.name == "manifest.ocdbt":
            _collect(path.parent, item, arrays)
    found: dict[str, list[Piece]] = {}
    for path, name in names.items():
        with open(path, "rb") as stream:
            bounds = _bounds(arrays.get(name, {}), path.stat().st_size)
            found[name] = [
                (start, end - start, _checksum(stream, end - start), inside)
                for start, end, inside in bounds
            ]
    return found


def _bounds(
    ranges: dict[tuple[int, int], list[str]], size: int
) -> list[tuple[int, int, list[str]]]:
    """Divide a file into consecutive byte ranges: ranges of arrays, and gaps between arrays.

    Returns:
        Triples of the first byte, the byte after the last, and names of the arrays in the range.
    """
    bounds: list[tuple[int, int, list[str]]] = []
    at = 0
    for (start, end), names in sorted(ranges.items()):
        if start > at:
            bounds.append((at, start, []))
        if bounds and bounds[-1][1] == start and bounds[-1][2] == names:
            bounds[-1] = (bounds[-1][0], end, names)
        elif end > at:
            bounds.append((max(at, start), end, names))
        at = max(at, end)
    return [*bounds, (at, size, [])] if at < size else bounds


def _collect(
    database: Path, item: Path, arrays: dict[str, dict[tuple[int, int], list[str]]]
) -> None:
    """Add to `arrays` the byte ranges that an OCDBT database refers to, with their array names."""
    base = tensorstore.KvStore.open({"driver": "file", "path": f"{database}/"}).result()
    dump = functools.partial(tensorstore.ocdbt.dump, base)

    def add(location: str, names: list[str]) -> None:
        _, folder, file, start, size = location.split(":")
        path = str((database / folder / file).relative_to(item))
        arrays.setdefault(path, {})[int(start), int(start) + int(size)] = names

    nodes = [version["root"]["location"] for version in dump().result()["versions"]]
    while nodes:
        node: str = nodes.pop()
        entries: list[dict[str, Any]] = dump(node).result()["entries"]
        inside = []
        for entry in entries:
            if "location" in entry:
                nodes.append(entry["location"])
                continue
            name = bytes(entry["key"]).decode().rpartition("/")[0]
            inside.append(name)
            if "indirect_value" in entry:
                add(entry["indirect_value"], [name])
        add(node, list(dict.fromkeys(inside)))

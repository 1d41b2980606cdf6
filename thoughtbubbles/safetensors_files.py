"""Read and write safetensors files one tensor at a time, without pickle and without mmap.

The format is eight bytes with the length of a JSON header, then the header with the dtype, shape
and offsets of each tensor, then the bytes of all tensors in row-major order. The `safetensors`
package would be one more dependency, and it maps the whole file into memory. To read the tensors of
a 1.07 GB file one by one raises the peak RAM of the process by 16 MB with this module, and by 1 GB
with the package.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from thoughtbubbles.fields import LARGEST, Fields, cut, parse_object, read_json, shown

# Floating-point dtypes; packed and 8-bit dtypes would need scales, whose layout is unknown.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # as in the reference implementation


class _Location(NamedTuple):
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class SafetensorsFiles:
    """The tensors of a folder, in `model.safetensors` or in the shards listed by its index file.

    The constructor reads only the headers, and checks them against the sizes of the files; `read`
    loads a tensor. Tensors that are in a shard but not in the index are available too, with a
    warning. Copies of a tensor in other shards than the one in the index, and further safetensors
    files in the folder, are ignored with a warning.

    Args:
        folder: Folder with the files.
        single: Name of the file that holds all tensors. If it is not the default,
            `model.safetensors`, index and shards are ignored.

    Attributes:
        shapes: Mapping from tensor name to shape.

    Raises:
        ValueError: A file is missing, damaged or incomplete, or a tensor has an unsupported dtype.
    """

    def __init__(self, folder: Path, single: str = SINGLE):
        self._locations: dict[str, _Location] = {}
        if (folder / single).exists():
            self._locations = _locations(folder / single)
        elif single == SINGLE and (folder / INDEX).exists():
            self._add_shards(folder)
        else:
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            why = f" (pickled weights such as {pickled[0]} are never read)" if pickled else ""
            names = f"{single} and no {INDEX}" if single == SINGLE else single
            raise ValueError(f"{folder} has no {names}{why}: export safetensors")
        files = {location.file.name for location in self._locations.values()}
        others = {path.name for path in folder.glob("*.safetensors")} - files - {SINGLE}
        if others and single == SINGLE:
            _warn(f"{folder}: the weights are in {some(files)}; not read are {some(others)}")
        self.shapes = {name: location.shape for name, location in self._locations.items()}

    def _add_shards(self, folder: Path) -> None:
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(
                f"{folder / INDEX} has no weight_map: copy the index again, or export it anew"
            )
        places = Fields(weight_map, f"{folder / INDEX}: weight_map")
        weight_map = {name: places.text(name) for name in weight_map}
        shards = sorted(set(weight_map.values()))
        missing = [
            name for name in shards if len(name) > 200 or not (folder / Path(name).name).is_file()
        ]
        if missing:
            raise ValueError(
                f"{folder} lacks {cut(missing[0])}, {len(missing)} of the {len(shards)} shards in "
                "its index: copy them too"
            )
        by_shard = {name: _locations(folder / Path(name).name) for name in shards}
        for name, shard in weight_map.items():
            if name not in by_shard[shard]:
                raise ValueError(f"{folder / shard} lacks {name}, which {INDEX} puts there")
            self._locations[name] = by_shard[shard][name]
        unlisted, copies = set(), set()
        for shard, tensors in by_shard.items():
            for name in tensors:
                if name not in self._locations:
                    unlisted.add(name)
                    self._locations[name] = tensors[name]
                elif name in unlisted:
                    raise ValueError(
                        f"{folder}: {name} is in two shards, and {INDEX} does not say which one "
                        "holds: list it there"
                    )
                elif weight_map[name] != shard:
                    copies.add(f"{name} of {shard}")
        if unlisted:
            _warn(f"{folder / INDEX} does not list {some(unlisted)}: read all the same")
        if copies:
            _warn(f"{folder / INDEX} lists another shard for {some(copies)}: not read")

    def read(self, name: str) -> np.ndarray:
        """Read one tensor in its stored dtype and shape."""
        location = self._locations[name]
        count = math.prod(location.shape)
        flat = np.fromfile(location.file, location.dtype, count, offset=location.offset)
        if flat.size < count:
            raise ValueError(f"{location.file} was cut short while it was read")
        return flat.reshape(location.shape)


def some(names: set[str]) -> str:
    """Format a set of names for a message: the first three names, and the number of the others."""
    first = ", ".join(cut(name, 100) for name in sorted(names)[:3])
    return first + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=4)


def _locations(file: Path) -> dict[str, _Location]:
    if not file.is_file():  # a pipe would never end
        raise ValueError(f"{file} is no regular file: put one there")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"{file} is cut short or no safetensors file: copy it again")
        text = stream.read(length)
    header = parse_object(text, f"the header of {file}")
    header.pop("__metadata__", None)
    locations = {}
    spans: list[tuple[int, int, str]] = []
    for name in header:
        if len(name) > 200:
            raise ValueError(f"{file}: the name {shown(name)} is too long: export it anew")
        dtype, shape, first, last = _entry(header, name, str(file))
        if 8 + length + last > size:
            raise ValueError(
                f"{file} is cut short: {name} ends at byte {8 + length + last} of {size}: "
                "copy it again"
            )
        if last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{file} has a damaged header: {name} {shape} fills no {last - first} B"
            )
        spans.append((first, last, name))
        locations[name] = _Location(file, dtype, shape, 8 + length + first)
    end = 0
    for first, last, name in sorted(spans):
        if first != end:  # as in the reference implementation
            raise ValueError(
                f"{file} has a damaged header: {name} begins at byte {first} of the tensors, the "
                f"tensor before it ends at {end}: export it anew"
            )
        end = last
    if 8 + length + end < size:
        raise ValueError(f"{file} has {size - 8 - length - end} bytes after its last tensor")
    return locations


def _entry(
    header: dict[str, Any], name: str, file: str
) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Parse one tensor's header entry: dtype, shape, first byte, and index after the last byte."""
    if not isinstance(header[name], dict):
        raise ValueError(f"{file}: {name}={shown(header[name])} is not an object: export it anew")
    entry = Fields(header[name], f"{file}: {name}")
    kind = entry.text("dtype")
    if kind not in DTYPES:
        raise ValueError(
            f"{file}: {name} has type {shown(kind)[1:-1]}, not one of {', '.join(DTYPES)}: export "
            "the weights without quantisation"
        )
    shape, offsets = entry.list("shape", int), entry.list("data_offsets", int)
    if not all(0 <= axis <= LARGEST for axis in shape) or len(shape) > 8:
        raise ValueError(f"{file}: {name} has shape {shown(shape)}: export it anew")
    if len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1] < 2**63:
        raise ValueError(f"{file}: {name} has data_offsets {shown(offsets)}: export it anew")
    return DTYPES[kind], tuple(shape), offsets[0], offsets[1]


def check_new_folder(path: Path) -> None:
    """Raise a ValueError unless the path does not exist or is an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is there already: pass another folder, or delete it first")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Context manager that writes a folder completely or not at all.

    The caller writes into a temporary folder, which is renamed to `path` if the block ends without
    an error, and deleted otherwise.

    Args:
        path: New or empty folder.

    Yields:
        Temporary folder to write into.

    Raises:
        ValueError: The folder exists and is not empty.
        OSError: The folder can't be written; no part of it remains.
    """
    check_new_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # a temporary folder is private
        unfinished.rename(path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path} could not be written: {reason}; nothing is left of it") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_safetensors(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    tensor_of: Callable[[str], np.ndarray],
) -> None:
    """Write a safetensors file, one tensor at a time; all tensors have the same dtype.

    Args:
        file: File to write; an existing file is overwritten.
        shapes: Mapping from tensor name to shape, in the order of the file.
        dtype: Dtype of all tensors in the file.
        tensor_of: Function from the name of a tensor to its values, which are cast to `dtype`.
    """
    kind = next(name for name, known in DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        first, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = tensor_of(name).astype(dtype, order="C", copy=False)
            assert tensor.shape == shape, f"{name}: {tensor.shape} is not {shape}"
            stream.write(tensor.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())

"""Safetensors files, read one tensor at a time and written as one stream; no pickle, no mmap.

The format is eight bytes with the length of a JSON header, then the header with the type, shape and
offsets of each tensor, then their bytes in row-major order. The `safetensors` package would be one
more dependency, and reads through a map of the whole file: after the tensors of a 1.07 GB file, one
by one, the process had peaked 1 GB higher than with this reader (by 16 MB).
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# Floating-point types of weights; packed and 8-bit types would need scales, of an unknown layout.
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
    """The tensors of a folder: of `model.safetensors`, or of the shards that its index names.

    Headers are read at once and checked against the sizes of the files; tensors are read by `read`.

    Args:
        folder: Folder with the files.

    Attributes:
        shapes: Shape of every tensor, by name.

    Raises:
        ValueError: A file is missing, damaged or cut short, or a tensor has an unsupported type.
    """

    def __init__(self, folder: Path):
        self._locations: dict[str, _Location] = {}
        if (folder / SINGLE).exists():
            self._locations = _locations(folder / SINGLE)
        elif (folder / INDEX).exists():
            self._add_shards(folder)
        else:
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            why = f" (pickled weights such as {pickled[0]} are never read)" if pickled else ""
            raise ValueError(f"{folder} has no {SINGLE} and no {INDEX}{why}: export safetensors")
        self.shapes = {name: location.shape for name, location in self._locations.items()}

    def _add_shards(self, folder: Path) -> None:
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX} has no weight_map: copy the index again")
        shards = sorted(set(weight_map.values()))
        missing = [name for name in shards if not (folder / Path(name).name).is_file()]
        if missing:
            raise ValueError(
                f"{folder} lacks {missing[0]}, {len(missing)} of the {len(shards)} shards in its "
                "index: copy them too"
            )
        by_shard = {name: _locations(folder / Path(name).name) for name in shards}
        for name, shard in weight_map.items():
            if name not in by_shard[shard]:
                raise ValueError(f"{folder / shard} lacks {name}, which {INDEX} puts there")
            self._locations[name] = by_shard[shard][name]

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored type and shape."""
        location = self._locations[name]
        count = math.prod(location.shape)
        flat = np.fromfile(location.file, location.dtype, count, offset=location.offset)
        if flat.size < count:
            raise ValueError(f"{location.file} was cut short while it was read")
        return flat.reshape(location.shape)


def _locations(file: Path) -> dict[str, _Location]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"{file} is cut short or no safetensors file: copy it again")
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = [
            (
                name,
                entry["dtype"],
                tuple(map(int, entry["shape"])),
                *map(int, entry["data_offsets"]),
            )
            for name, entry in header.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} has a damaged header: copy it again") from error
    locations = {}
    for name, dtype, shape, first, last in entries:
        if dtype not in DTYPES:
            raise ValueError(
                f"{file}: {name} has type {dtype}, not one of {', '.join(DTYPES)}: export the "
                "weights without quantisation"
            )
        if min(shape, default=0) < 0 or last - first != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(
                f"{file} has a damaged header: {name} {shape} fills no {last - first} B"
            )
        if first < 0 or 8 + length + last > size:
            raise ValueError(
                f"{file} is cut short: {name} ends at byte {8 + length + last} of {size}: "
                "copy it again"
            )
        locations[name] = _Location(file, DTYPES[dtype], shape, 8 + length + first)
    return locations


def write_safetensors(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    tensor_of: Callable[[str], np.ndarray],
) -> None:
    """Write a file of tensors of one type, one at a time.

    Args:
        file: File to write; an existing one is overwritten.
        shapes: Shape of every tensor by name, in the order of the file.
        dtype: Type of all tensors in the file.
        tensor_of: Function from a name to its tensor.
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
            tensor = np.ascontiguousarray(tensor_of(name).astype(dtype, copy=False))
            assert tensor.shape == shape, f"{name}: {tensor.shape} is not {shape}"
            stream.write(tensor.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a ValueError if it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except ValueError:
        pass
    raise ValueError(f"{path} is not a JSON object: copy it again")

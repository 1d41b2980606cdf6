"""Safetensors files, read one tensor at a time and written as one stream; no pickle, no mmap.

The format is eight bytes, the length of a JSON header, then the header with the type, shape and
place of each tensor, then their bytes in row-major order. The `safetensors` package reads the same
types into NumPy, but through a map of the whole file: after the tensors of a 1.07 GB file, one by
one, the process had peaked 1 GB higher than with this reader (by 16 MB).
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# Floating-point types of weights; packed and 8-bit ones would need scales that we know nothing of.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # as in the reference implementation


class _Place(NamedTuple):
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class SafetensorsFiles:
    """The tensors of a folder: of `model.safetensors`, or of the shards that its index names.

    Headers are read and checked against the sizes of the files at once, tensors when asked for.

    Attributes:
        shapes: of every tensor, by name.

    Raises:
        ValueError: a file is missing, damaged, cut short, or holds what is no weight.
    """

    def __init__(self, folder: Path):
        self._places: dict[str, _Place] = {}
        if (folder / SINGLE).exists():
            self._places = _places(folder / SINGLE)
        elif (folder / INDEX).exists():
            self._add_shards(folder)
        else:
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            why = f" (pickled weights such as {pickled[0]} are never read)" if pickled else ""
            raise ValueError(f"{folder} has no {SINGLE} and no {INDEX}{why}: export safetensors")
        self.shapes = {name: place.shape for name, place in self._places.items()}

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
        held = {name: _places(folder / Path(name).name) for name in shards}
        for name, shard in weight_map.items():
            if name not in held[shard]:
                raise ValueError(f"{folder / shard} lacks {name}, which {INDEX} puts there")
            self._places[name] = held[shard][name]

    def read(self, name: str) -> np.ndarray:
        """One tensor as it is stored."""
        place = self._places[name]
        count = math.prod(place.shape)
        flat = np.fromfile(place.file, place.dtype, count, offset=place.offset)
        if flat.size < count:
            raise ValueError(f"{place.file} was cut short while it was read")
        return flat.reshape(place.shape)


def _places(file: Path) -> dict[str, _Place]:
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
    places = {}
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
        places[name] = _Place(file, DTYPES[dtype], shape, 8 + length + first)
    return places


def write_safetensors(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    read: Callable[[str], np.ndarray],
) -> None:
    """Write tensors of one type, one at a time.

    Args:
        file: to be written; what stood there is lost.
        shapes: of every tensor, by name, in the order of the file.
        dtype: of all of them in the file.
        read: gives a tensor by name.
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
            tensor = np.ascontiguousarray(read(name).astype(dtype, copy=False))
            assert tensor.shape == shape, f"{name}: {tensor.shape} is not {shape}"
            stream.write(tensor.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except ValueError:
        pass
    raise ValueError(f"{path} is not a JSON object: copy it again")

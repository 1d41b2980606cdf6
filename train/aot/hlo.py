"""Parse a compiled program's HLO for its collectives: their kinds, sizes and execution counts."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "c64": 64, "c128": 128}

_COMPUTATION = re.compile(r"^(ENTRY )?%([^ ]+) .*\{$")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%[^ ,)]+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"^(%\S+) = [su]32\[\]\S* constant\((\d+)\)")
_COUNTER = re.compile(r" get-tuple-element\(.*\), index=(\d+)")
_ADD = re.compile(r" add\((%[^ ,]+), (%[^ ,)]+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
        kind: Kind of operation, one of `KINDS`.
        shapes: Shapes of the result on each device, e.g. `("bf16[2048,8192]",)`.
        size: Bytes of the full array that is gathered, scattered, reduced or sent.
        times: Number of executions of the operation in one execution of the program.
        group: Flat mesh indices of the devices in one group of the operation.
        op_name: Name of the traced jax operation that the collective comes from.
    """

    kind: str
    shapes: tuple[str, ...]
    size: int
    times: int
    group: tuple[int, ...]
    op_name: str

    @property
    def received(self) -> float:
        """Minimum number of bytes that a device receives over its links in one execution."""
        if self.kind == "collective-permute":
            return self.size
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.size * (len(self.group) - 1) / len(self.group)


@dataclasses.dataclass(frozen=True)
class Collectives:
    """All collectives of a program.

    Attributes:
        items: Collectives that are executed, in the order of the program.
        unknown_loops: Number of loops that contain collectives and have an unknown trip count; a
            loop of this kind counts as one iteration.
    """

    items: tuple[Collective, ...]
    unknown_loops: int


def collectives_of(text: str, devices: int) -> Collectives:
    """Find the collectives of a compiled program.

    The body of a loop counts once per iteration. The trip count is XLA's own count if the program
    states it; otherwise it is derived from the constants of the loop counter. Every branch of a
    conditional counts. A collective that the compiler has split over several fused computations
    (with the same channel id) counts once.

    Args:
        text: HLO of the program, from `jax.stages.Compiled.as_text()`.
        devices: Number of devices of the mesh.
    """
    computations, entry = _computations(text)
    times, unknown = _times(computations, entry)
    found: dict[tuple, Collective] = {}
    holds: set[str] = set()
    for name, lines in computations.items():
        for index, line in enumerate(lines):
            collective = _collective(name, line, times.get(name, 0), devices)
            if collective is None or not collective.times:
                continue
            holds.add(name)
            channel = _CHANNEL.search(line)
            key = (collective.kind, channel[1]) if channel else (name, index)
            if key not in found or found[key].times < collective.times:
                found[key] = collective
    return Collectives(tuple(found.values()), len(unknown & holds))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return a program's instructions, keyed by computation, and the entry computation's name."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if line.startswith("  "):
            lines.append(line.strip().removeprefix("ROOT "))
        elif head := _COMPUTATION.match(line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
    return computations, entry


def _times(computations: dict[str, list[str]], entry: str) -> tuple[dict[str, int], set[str]]:
    """Count executions of each computation, and find bodies of loops with unknown trip count."""
    callers: dict[str, list[tuple[str, int]]] = {}
    unknown: set[str] = set()
    for name, lines in computations.items():
        for line in lines:
            called = [
                (kind, callee.lstrip("%"))
                for kind, callees in _CALLED.findall(line)
                for callee in callees.strip("{}").replace(" ", "").split(",")
            ]
            rounds = 1
            if any(kind == "body" for kind, _ in called):
                known = _rounds(line, {kind: computations[callee] for kind, callee in called})
                rounds = known or 1
                unknown |= {c for kind, c in called if kind == "body" and not known}
            for _, callee in called:
                callers.setdefault(callee, []).append((name, rounds))

    times = {entry: 1}

    def count(name: str) -> int:
        if name not in times:
            times[name] = sum(count(caller) * rounds for caller, rounds in callers.get(name, ()))
        return times[name]

    for name in computations:
        count(name)
    return times, unknown


def _rounds(line: str, called: dict[str, list[str]]) -> int | None:
    """Return the trip count of a loop that counts from 0 up to a constant; None if unknown."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition, body = called.get("condition", []), called["body"]
    bounds = list(_constants(condition).values())
    indices = [int(found[1]) for text in condition if (found := _COUNTER.search(text))]
    if len(bounds) != 1 or len(indices) != 1:
        return None
    # An addition inside a fusion belongs to lax.scan, which counts by 1.
    results = re.findall(r"%[^ ,)]+", body[-1].rpartition(" tuple(")[2].partition(")")[0])
    counter = results[indices[0]] if indices[0] < len(results) else None
    steps, step = _constants(body), 1
    for text in body:
        if counter and text.startswith(f"{counter} = ") and (added := _ADD.search(text)):
            step = next((steps[term] for term in added.groups() if term in steps), step)
    return math.ceil(bounds[0] / step)


def _constants(lines: list[str]) -> dict[str, int]:
    return {found[1]: int(found[2]) for text in lines if (found := _CONSTANT.match(text))}


def _collective(computation: str, line: str, times: int, devices: int) -> Collective | None:
    _, _, rest = line.partition(" = ")
    result, rest = _split_shape(rest)
    opcode = rest.partition("(")[0]
    kind = opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    arrays = _ARRAY.findall(result)
    if opcode.endswith("-start") and kind != "all-reduce":
        # (operands, results, contexts of the transfer); contexts are scalars.
        arrays = [array for array in arrays if array[1]]
        arrays = arrays[len(arrays) // 2 :]
    group = _pairs(line) if kind == "collective-permute" else _group(line, devices)
    # On a TPU, a reduce-scatter is a fusion around an all-reduce.
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind, scale = "reduce-scatter", 1
    else:
        scale = len(group) if kind == "reduce-scatter" else 1
    size = scale * sum(_bytes(kind_of, shape) for kind_of, shape in arrays)
    name = _OP_NAME.search(line)
    shapes = tuple(f"{kind_of}[{shape}]" for kind_of, shape in arrays)
    return Collective(kind, shapes, size, times, group, name[1] if name else "")


def _split_shape(text: str) -> tuple[str, str]:
    """Split an instruction into its result shape, which may be a nested tuple, and what follows."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = itertools.accumulate((c == "(") - (c == ")") for c in text)
    end = next((index for index, open_ in enumerate(depth) if open_ == 0), len(text) - 1)
    return text[: end + 1], text[end + 2 :]


def _bytes(kind: str, shape: str) -> int:
    bits = BITS.get(kind) or int("".join(filter(str.isdigit, kind.partition("e")[0])) or 8)
    sizes = [int(size.removeprefix("<=")) for size in shape.split(",") if size]
    return math.ceil(math.prod(sizes) * bits / 8)


def _pairs(line: str) -> tuple[int, ...]:
    """Find the first (source, target) of two different devices in a permutation, or else (0,)."""
    found = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    pairs = re.findall(r"(\d+),(\d+)", found[1]) if found else []
    return next(((int(a), int(b)) for a, b in pairs if a != b), (0,))


def _group(line: str, devices: int) -> tuple[int, ...]:
    """Parse the first device group of a collective, in any format in which XLA prints groups."""
    start = line.find("replica_groups=")
    text = line[start + len("replica_groups=") :] if start >= 0 else ""
    if text.startswith("mesh["):
        return _group_of_mesh(text)
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return tuple(int(device) for device in listed[1].split(","))
    if iota := re.match(r"\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", text):
        shape = [int(size) for size in iota[1].split(",")]
        return tuple(int(d) for d in _iota(iota[2]).reshape(shape)[0])
    return tuple(range(devices))


def _group_of_mesh(text: str) -> tuple[int, ...]:
    """Parse the first group of a text like `mesh['a'=2,'b'=4], device_ids=... {'a','b':(2)2}`."""
    head, _, rest = text.partition("]")
    axes = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", head)]
    order = re.match(r", device_ids=\(\[([\d,]+)\](T\([\d,]+\))?\)", rest)
    sizes = [size for _, size in axes]
    ids = _iota(f"<=[{order[1]}]{order[2] or ''}") if order else np.arange(math.prod(sizes))
    rest = rest[order.end() :] if order else rest
    used = re.match(r"\s*\{(.*?)\}", rest)
    chosen = {
        name: (int(before or 1), int(size or 0))
        for name, before, size in re.findall(
            r"'(\w+)'(?::\((\d+)\)(\d+))?", used[1] if used else ""
        )
    }
    parts: list[int] = []
    kept: list[bool] = []
    for name, size in axes:
        before, part = chosen.get(name, (1, 1))
        part = part or size
        parts += [before, part, size // (before * part)]
        kept += [False, name in chosen, False]
    picks = tuple(slice(None) if keep else 0 for keep in kept)
    return tuple(int(device) for device in ids.reshape(parts)[picks].reshape(-1))


def _iota(text: str) -> np.ndarray:
    """Return device ids in the order that a text such as `<=[4,2]T(1,0)` describes."""
    sizes, order = _numbers(text)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(order).reshape(-1) if order else ids.reshape(-1)


def _numbers(text: str) -> Iterator[list[int]]:
    sizes, _, order = text.partition("T(")
    for part in (sizes, order):
        yield [int(number) for number in re.findall(r"\d+", part)]

"""Whether texts fit into memory, known before anything is compiled or allocated."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from thoughtbubbles import Architecture


def needed_bytes(model: Architecture, rows: int, tokens: int, cached: int = 0) -> int:
    """Bytes that a forward pass over rows takes beside the parameters, about.

    Args:
        model: Any architecture. What its config has no `prefill_bytes` for is not counted.
        rows: Number of rows.
        tokens: Number of tokens of each row.
        cached: Number of tokens that a cache of each row has room for; 0 for no cache.
    """
    prefill = getattr(model.config, "prefill_bytes", lambda num_tokens: 0)
    total = rows * prefill(tokens)
    if cached:
        # By differences: a cache of many blocks and tokens need not be traced at its full size.
        small, large = (_cache_bytes(model, rows, size) for size in (64, 128))
        total += small + (large - small) * max(cached - 64, 0) // 64
    return total


def _cache_bytes(model: Architecture, rows: int, tokens: int) -> int:
    cache = jax.eval_shape(lambda: model.init_cache(rows, tokens))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def check_room(
    model: Architecture, rows: int, tokens: int, new: int = 0, cached: bool = True
) -> None:
    """Raise a ValueError for texts that don't fit into memory, which says how long a text may be.

    Args:
        model: Any architecture.
        rows: Number of texts at a time.
        tokens: Number of tokens of the longest of them.
        new: Number of tokens that are added to each.
        cached: Whether keys and values are kept; else every prefix is computed anew.
    """

    def needed(length: int) -> int:
        if not cached:
            return needed_bytes(model, rows, length + new)
        # As `generate` compiles it: for a power of two.
        return needed_bytes(model, rows, _power(length), _power(length + new))

    free = free_bytes()
    if free is None or needed(tokens) <= free:
        return
    fits, above = 0, tokens
    while above - fits > 1:
        middle = (fits + above) // 2
        fits, above = (middle, above) if needed(middle) <= free else (fits, middle)
    also = f" and {new:,} new ones" if new else ""
    way_out = "so shorten them or take fewer at a time" if fits else "so add fewer new ones"
    raise ValueError(
        f"{_texts(rows, tokens)}{also} need about {_gib(needed(tokens))}, {_gib(free)} are free: "
        f"{fits:,} tokens fit, {way_out}"
    )


@contextlib.contextmanager
def memory_errors(model: Architecture, rows: int, tokens: int) -> Iterator[None]:
    """Turn an error of exhausted memory, which `check_room` did not foresee, into one line."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"{_texts(rows, tokens)} ran out of memory (their forward pass alone takes about "
            f"{_gib(needed_bytes(model, rows, tokens))}): shorten them or take fewer at a time"
        ) from error


def free_bytes() -> int | None:
    """Bytes that the first device has left, None if it does not say; a CPU's are the machine's."""
    device = jax.local_devices()[0]
    stats: dict[str, Any] = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform != "cpu":
        return None
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        free = min(free, int(found.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" where a container has no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="utf-8"))
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        free = min(free, max(limit - used, 0))
    return free


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _texts(rows: int, tokens: int) -> str:
    return f"{rows} text{'s' * (rows > 1)} of up to {tokens:,} tokens"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"

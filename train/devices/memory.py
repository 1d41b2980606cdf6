"""Query the memory of devices and of this machine, within the limits of a container."""

import contextlib
import os
from pathlib import Path
from typing import Any

import jax

_CONTAINER = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def host_bytes() -> int:
    """Total bytes of this machine's RAM, or the limit of this process's container if lower."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _container_limit()
    return machine if limit is None else min(machine, limit)


def device_bytes(device: Any) -> int | None:
    """Total bytes of a device's memory, or None if unknown; for a CPU, the host's RAM.

    Args:
        device: JAX device. The memory is unknown for a device of another process, and for a device
            of a topology description.
    """
    if device not in jax.local_devices():  # of another process, or of a topology description
        return None
    known = (device.memory_stats() or {}).get("bytes_limit")
    return host_bytes() if known is None and device.platform == "cpu" else known


def free_bytes() -> int | None:
    """Free bytes of the first local device's memory, or None if unknown; for a CPU, free RAM."""
    device = jax.local_devices()[0]
    stats: dict[str, Any] = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return _free_on_host() if device.platform == "cpu" else None


def size_text(size: int) -> str:
    """Format a number of bytes in GiB, or in MiB below one GiB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _free_on_host() -> int:
    free = host_bytes()
    with contextlib.suppress(OSError, KeyError, ValueError):
        free = min(free, int(_table(_MEMINFO)["MemAvailable:"]) * 1024)
    limit = _container_limit()
    if limit is not None:
        with contextlib.suppress(OSError, KeyError, ValueError):
            used = int((_CONTAINER / "memory.current").read_text(encoding="utf-8"))
            # Pages of files count as used, but the kernel drops them as soon as memory is short.
            stat = _table(_CONTAINER / "memory.stat")
            used -= int(stat["inactive_file"]) + int(stat["active_file"])
            free = min(free, max(limit - max(used, 0), 0))
    return free


def _container_limit() -> int | None:
    """Bytes that the control group (version 2) allows; None where it sets no limit."""
    with contextlib.suppress(OSError, ValueError):  # "max" is no limit
        return int((_CONTAINER / "memory.max").read_text(encoding="utf-8"))
    return None


def _table(path: Path) -> dict[str, str]:
    """Read the first two words of each line, as keys and values."""
    lines = map(str.split, path.read_text(encoding="utf-8").splitlines())
    return {words[0]: words[1] for words in lines if len(words) > 1}

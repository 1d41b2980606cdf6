"""What a command needs of memory at the very least, refused before anything is allocated."""

import dataclasses
import os
from typing import Any

import jax

from train.devices.mesh import shard_bytes
from train.engine.state import Trainable

_PER_TOKEN = 4 + 4 + 4  # ids, targets and weights of a step's rows on the host, int32 and float32


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """What the state and the rows of a training step need; activations come on top of it.

    `thoughtbubbles compile` says what a step needs in all.

    Attributes:
        state: Bytes of parameters, gradients and optimizer state on each device.
        rows: Bytes of the rows of a step on each host.
        device: Bytes of a device's memory; None if that is not known.
        host: Bytes of this machine's memory.
        shape: Number of rows of a step, over all processes, and of tokens of a row.
    """

    state: int
    rows: int
    device: int | None
    host: int
    shape: tuple[int, int]

    def __str__(self) -> str:
        device = "" if self.device is None else f" (here {_gib(self.device)})"
        return (
            f"at least {_gib(self.state)} on each device{device}, {_gib(self.rows)} of rows on "
            f"each host (here {_gib(self.host)})"
        )

    def check(self) -> None:
        """Raise a ValueError if this machine has less."""
        if self.device is not None and self.state > self.device:
            raise ValueError(
                f"parameters, gradients and optimizer state need {_gib(self.state)} on each "
                f"device, which has {_gib(self.device)}: make the model smaller or the mesh larger"
            )
        _check_row_bytes(*self.shape, self.rows, self.host)


def training_memory(trainable: Trainable, rows: int, seq_len: int) -> TrainingMemory:
    """Estimate of a training step.

    Args:
        trainable: Model, optimizer and mesh, of abstract arrays.
        rows: Number of rows of a step, over all processes.
        seq_len: Number of tokens of a row.
    """
    state = trainable.abstract
    # Parameters twice: their gradients are as large.
    needed = 2 * shard_bytes(state.params) + shard_bytes((state.frozen, state.opt_state))
    return TrainingMemory(
        needed,
        _row_bytes(rows, seq_len),
        _device_bytes(trainable.mesh.devices.flat[0]),
        _host_bytes(),
        (rows, seq_len),
    )


def check_row_memory(rows: int, tokens: int) -> None:
    """Raise a ValueError for rows of a step or pass that exceed the memory of a host.

    Args:
        rows: Number of rows, over all processes.
        tokens: Number of tokens of a row.
    """
    _check_row_bytes(rows, tokens, _row_bytes(rows, tokens), _host_bytes())


def _check_row_bytes(rows: int, tokens: int, needed: int, host: int) -> None:
    if needed > host:
        raise ValueError(
            f"the {rows} rows of {tokens} tokens of a step need {_gib(needed)}, this machine has "
            f"{_gib(host)}: make batch_size or the rows smaller"
        )


def _row_bytes(rows: int, tokens: int) -> int:
    return -(-rows // jax.process_count()) * tokens * _PER_TOKEN


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _host_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _device_bytes(device: Any) -> int | None:
    """Memory of a device of this process, if it says so; that of a CPU is the host's."""
    if device not in jax.local_devices():  # of another process, or only described
        return None
    known = (device.memory_stats() or {}).get("bytes_limit")
    return _host_bytes() if known is None and device.platform == "cpu" else known


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"

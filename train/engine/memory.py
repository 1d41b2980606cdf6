"""Lower bounds on the memory that a command needs, checked before anything is allocated."""

import dataclasses

import jax

from train.devices.memory import device_bytes, host_bytes, size_text
from train.devices.mesh import shard_bytes
from train.engine.state import Trainable

_PER_TOKEN = 4 + 4 + 4  # ids, targets and weights of a step's rows on the host, int32 and float32


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Memory that the state and the rows of a train step need, without activations.

    `thoughtbubbles compile` computes the memory of a whole step.

    Attributes:
        state: Bytes of parameters, gradients and optimizer state on each device.
        rows: Bytes of the rows of a step on each host.
        device: Bytes of a device's memory; None if the size is not known.
        host: Bytes of this machine's RAM.
        shape: Number of rows per step, over all processes, and number of tokens per row.
    """

    state: int
    rows: int
    device: int | None
    host: int
    shape: tuple[int, int]

    def __str__(self) -> str:
        device = "" if self.device is None else f" (here {size_text(self.device)})"
        return (
            f"at least {size_text(self.state)} on each device{device}, {size_text(self.rows)} of "
            f"rows on each host (here {size_text(self.host)})"
        )

    def check(self) -> None:
        """Raise a ValueError if `state` does not fit into a device's memory, or `rows` into RAM."""
        if self.device is not None and self.state > self.device:
            raise ValueError(
                f"parameters, gradients and optimizer state need {size_text(self.state)} on each "
                f"device, which has {size_text(self.device)}: make the model smaller or the mesh "
                "larger"
            )
        _check_row_bytes(*self.shape, self.rows, self.host)


def training_memory(
    trainable: Trainable, rows: int, seq_len: int, copies: int = 0
) -> TrainingMemory:
    """Compute a lower bound on the memory of a train step.

    Args:
        trainable: Static side of the run; only shapes and shardings are read.
        rows: Number of rows per step, over all processes.
        seq_len: Number of tokens per row.
        copies: Number of frozen copies of the trained parameters that are kept in memory, such as
            1 for a reference model.
    """
    state = trainable.abstract
    # Parameters twice: their gradients are as large.
    needed = (2 + copies) * shard_bytes(state.params) + shard_bytes((state.frozen, state.opt_state))
    return TrainingMemory(
        needed,
        _row_bytes(rows, seq_len),
        device_bytes(trainable.mesh.devices.flat[0]),
        host_bytes(),
        (rows, seq_len),
    )


def check_row_memory(rows: int, tokens: int) -> None:
    """Raise a ValueError if the rows of one step or forward pass exceed the RAM of this host.

    Args:
        rows: Number of rows, over all processes.
        tokens: Number of tokens per row.
    """
    _check_row_bytes(rows, tokens, _row_bytes(rows, tokens), host_bytes())


def _check_row_bytes(rows: int, tokens: int, needed: int, host: int) -> None:
    if needed > host:
        raise ValueError(
            f"the {rows} rows of {tokens} tokens of a step need {size_text(needed)}, this machine "
            f"has {size_text(host)}: make batch_size or the rows smaller"
        )


def _row_bytes(rows: int, tokens: int) -> int:
    return -(-rows // jax.process_count()) * tokens * _PER_TOKEN

"""What a run needs of memory at the very least, refused before anything is allocated."""

import os

import jax

from train.devices.mesh import shard_bytes
from train.engine.state import Trainable

_PER_TOKEN = 4 + 4 + 4  # ids, targets and weights of a step's rows on the host, int32 and float32


def check_memory(trainable: Trainable, rows: int, seq_len: int) -> None:
    """Raise a ValueError for a run whose state and rows alone exceed what there is.

    Activations come on top of it: `thoughtbubbles compile` says what a step needs in all.

    Args:
        trainable: Model, optimizer and mesh, of abstract arrays.
        rows: Number of rows of a step, over all processes.
        seq_len: Number of tokens of a row.
    """
    state = trainable.abstract
    params = shard_bytes(state.params)
    needed = 2 * params + shard_bytes(state.frozen) + shard_bytes(state.opt_state)  # with gradients
    device = trainable.mesh.devices.flat[0]
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    here = device in jax.local_devices()
    there = (device.memory_stats() or {}).get("bytes_limit", host) if here else None
    if there is not None and needed > there:
        raise ValueError(
            f"parameters, gradients and optimizer state need {_gib(needed)} on each device, which "
            f"has {_gib(there)}: make the model smaller or the mesh larger"
        )
    batch = rows // jax.process_count() * seq_len * _PER_TOKEN
    if batch > host:
        raise ValueError(
            f"the {rows} rows of {seq_len} tokens of a step need {_gib(batch)}, this machine has "
            f"{_gib(host)}: make batch_size smaller"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"

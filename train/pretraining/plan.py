"""Text that describes a run before it starts: its first lines, and the output of a dry run."""

from pathlib import Path
from typing import Any

import jax

from train.cli.config_json import as_json
from train.devices.mesh import shard_bytes
from train.engine.memory import training_memory
from train.engine.state import Trainable, resolved
from train.pretraining.config import RunConfig
from train.runs.instruments import not_recorded
from train.runs.resume import noted_changes


def describe(config: RunConfig, trainable: Trainable, start: int) -> str:
    """Describe the model, devices and steps of a run in one line."""
    model, mesh = config.model, trainable.mesh
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return (
        f"{model.num_params():,} parameters, {model.summary()}; "
        f"{config.step_flops / 1e9:.1f} GFLOP a step; "
        f"attention {trainable.attention}; "
        f"{mesh.size} {mesh.devices.flat[0].device_kind}{processes} ({sizes}); "
        f"steps {start} to {config.steps}"
    )


def plan(config: RunConfig, trainable: Trainable, rows: int, saved: dict[str, Any] | None) -> str:
    """Describe in a few lines what a run would do, without allocating arrays.

    Args:
        config: Config of the run.
        trainable: Static side of the run's state.
        rows: Number of rows in each batch that this process reads.
        saved: Metadata of the checkpoint that the run would resume from; None if there is none.
    """
    model, data = config.model, config.data
    start = saved["step"] if saved else 0
    left = max(config.steps - start, 0)
    batch = config.batch_size * data.seq_len
    goes_on = f"step {start} of the run that it holds" if saved else "the start"
    state = trainable.abstract
    weights = state.params, state.frozen
    params, moments = (shard_bytes(tree) / 2**20 for tree in (weights, state.opt_state))
    meta = {"config": as_json(config), "resolved": resolved(trainable)}
    changes = noted_changes(saved, meta, config) if saved else []
    lines = {
        "run": describe(config, trainable, start),
        "model": model.sizes(),
        "state per device": f"{params:,.1f} MiB of parameters, {moments:,.1f} MiB of optimizer "
        f"state ({config.optimizer.name})",
        "memory": str(training_memory(trainable, config.batch_size, data.seq_len)),
        "batch": f"{config.batch_size} rows of {data.seq_len} tokens in {config.accumulate} "
        f"part(s); process 0 reads {rows} rows of it",
        "data": f"{data.corpus}, tokenizer {data.tokenizer}, prepared in {data.cache}",
        "steps": f"{left:,} of {config.steps:,}, {left * batch:,} tokens; a checkpoint every "
        f"{config.save_every}",
        "writes to": f"{Path(config.out).absolute()}, from {goes_on}",
    }
    if changes:
        lines["changes"] = "; ".join(changes)
    if line := not_recorded(config.profile, start, config.steps):
        lines["profile"] = line
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {line}" for name, line in lines.items())

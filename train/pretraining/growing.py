"""Grow or merge saved runs of Dragon Hatchlings into new run folders."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np
from flax import nnx

from thoughtbubbles.hatchling import Hatchling, HatchlingConfig
from thoughtbubbles.hatchling.growth import merge, plan_growth
from train.cli.config_json import as_json, from_json, model_from_json
from train.devices.mesh import MeshConfig, make_mesh
from train.engine.optim import OptimizerConfig
from train.engine.state import Trainable, TrainState, make_trainable
from train.models.load import load_model
from train.pretraining.job import TRAINED
from train.runs.checkpoint import Checkpointer
from train.runs.files import write_atomically
from train.runs.metadata import load_run_meta
from train.runs.run_folder import run_lock


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowConfig:
    """Grow a Dragon Hatchling: add neurons without changing its function, to train it further.

    Attributes:
        checkpoint: Run folder of a pretraining run.
        num_neurons: Number of neurons of the grown model, a multiple of twice its number of heads.
        out: Folder of the grown run, which `thoughtbubbles pretrain` continues.
        seed: Seed that chooses the neurons that are copied.
    """

    checkpoint: str
    num_neurons: int
    out: str
    seed: int = 0

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is below 0: choose 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Merge Dragon Hatchlings into a model with the neurons of all, and the mean of embeddings.

    Attributes:
        checkpoints: Run folders of two or more pretraining runs with the same tokenizer.
        out: Folder of the merged run, which starts at step 0 with the config of the first run.
        along: Axis along which models are concatenated: "neurons" of each head, as in the paper, or
            "heads".
    """

    checkpoints: tuple[str, ...]
    out: str
    along: Literal["neurons", "heads"] = "neurons"


def grow_run(config: GrowConfig) -> str:
    """Grow the model and optimizer state of a run, and write them as a checkpoint at the same step.

    Returns:
        Line that describes the grown run and how to resume it.

    Raises:
        ValueError: The run is not one of a Dragon Hatchling, it can't have this number of neurons,
            or `out` is a file or holds a run.
    """
    _check_out(config.out)
    meta, shape = _read(config.checkpoint)
    plan = plan_growth(shape, config.num_neurons, config.seed)
    grown = dataclasses.replace(shape, num_neurons=config.num_neurons)
    abstract = _trainable(meta, shape).abstract
    # The lock: a checkpointer clears what it takes for a killed run's half-written checkpoint.
    source = Path(config.checkpoint).expanduser()
    with run_lock(source), Checkpointer(source, 1) as checkpointer:
        step, variables, rest, _ = checkpointer.restore(abstract.variables, abstract.rest)
    state = plan.tree(rest.with_variables(variables))
    state = jax.device_put(state, _trainable(meta, grown).shardings)
    _write(config.out, step, state, meta, grown)
    return (
        f"{config.out}: {shape.num_neurons:,} neurons of {config.checkpoint} at step {step} grown "
        f"to {grown.num_neurons:,}, with their optimizer state; continue it with "
        f"--model.num-neurons {grown.num_neurons} --out {config.out}"
    )


def merge_runs(config: MergeConfig) -> str:
    """Merge runs, and write the result as a checkpoint of step 0 with a new optimizer state.

    Returns:
        Line that describes the merged run.

    Raises:
        ValueError: A run is not one of a Dragon Hatchling, tokenizers or sizes differ, or `out` is
            a file or holds a run.
    """
    _check_out(config.out)
    found = [_read(checkpoint) for checkpoint in config.checkpoints]
    for name, (meta, _) in zip(config.checkpoints, found, strict=True):
        if meta["tokenizer"] != found[0][0]["tokenizer"]:
            raise ValueError(
                f"{config.checkpoints[0]} and {name} have different tokenizers: their ids mean "
                "different texts, so embeddings can't be averaged"
            )
    models = [cast(Hatchling, load_model(checkpoint).model) for checkpoint in config.checkpoints]
    merged = merge(models, config.along)
    meta = found[0][0]
    state = _trainable(meta, merged.config).start(nnx.state(merged))
    _write(config.out, 0, state, meta, merged.config)
    return (
        f"{config.out}: {merged.config.num_neurons:,} neurons in {merged.config.num_heads} heads, "
        f"those of {' and '.join(config.checkpoints)}"
    )


def _read(checkpoint: str) -> tuple[dict[str, Any], HatchlingConfig]:
    """Read the metadata of a pretraining run, and the config of its Dragon Hatchling."""
    meta = load_run_meta(checkpoint)
    if meta is None:
        raise ValueError(f"no checkpoint in {checkpoint}: pass the folder of a run that saved one")
    if "model" not in meta["config"]:
        raise ValueError(
            f"{checkpoint} is no pretraining run: pass the folder of thoughtbubbles pretrain"
        )
    shape = model_from_json(meta["config"]["model"])
    if not isinstance(shape, HatchlingConfig):
        raise ValueError(
            f"{checkpoint} holds a {type(shape).__name__}: only the neurons of a Dragon Hatchling "
            "can be copied or joined"
        )
    return meta, shape


def _trainable(meta: dict[str, Any], shape: HatchlingConfig) -> Trainable:
    config = meta["config"]
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    optimizer = from_json(OptimizerConfig, config["optimizer"], "optimizer")
    trained = TRAINED[config["train"]]
    return make_trainable(shape, optimizer, config["steps"], mesh, config["seed"], trained=trained)


def _check_out(out: str) -> None:
    """Raise a ValueError if a folder holds a run, even a run that was killed before it saved."""
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    for name in ("config.json", "metrics.jsonl"):
        if (folder / name).exists():
            raise ValueError(f"{out} holds a run already ({name}): choose another --out")


def _write(
    out: str, step: int, state: TrainState, meta: dict[str, Any], shape: HatchlingConfig
) -> None:
    folder = Path(out).expanduser()
    with run_lock(folder):
        _check_out(out)
        if load_run_meta(folder) is not None:
            raise ValueError(f"{out} holds a run already: choose another --out")
        config = meta["config"] | {"model": as_json(shape), "out": out}
        meta = meta | {"config": config, "step": step}
        with Checkpointer(folder, 1) as checkpointer:
            rest = dataclasses.replace(state.rest, step=np.asarray(step, np.int32))
            checkpointer.save(step, state.variables, rest, meta, force=True)
        write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")

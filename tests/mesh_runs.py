"""The same training steps on any mesh; as a command, on the mesh of several processes."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from thoughtbubbles import ModelConfig, PrefixRank
from train.data import DataConfig, TrainReader, prepare
from train.devices.distributed import DistributedConfig, distributed_context
from train.devices.mesh import MeshConfig, make_mesh, place_local, rows_here
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable
from train.engine.step import make_train_step
from train.pretraining.config import RunConfig
from train.runs.checkpoint import Checkpointer

MODEL = ModelConfig(
    vocab_size=264, embed_dim=16, num_layers=1, num_heads=8, fork_layers=(0,), policy=PrefixRank(2)
)
STEPS, MORE_STEPS = 16, 6  # of a run, and of one that goes on


def run_config(folder: Path, model: ModelConfig = MODEL) -> RunConfig:
    """A run on the text in `folder`."""
    return RunConfig(
        model=model,
        data=DataConfig(str(folder / "text"), seq_len=16, cache_dir=str(folder / "cache")),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        steps=STEPS,
        batch_size=16,
    )


@dataclasses.dataclass
class Result:
    """Losses and rows `[B]` (this process's) of each step, and the initial parameters."""

    losses: list[float]
    rows: list[np.ndarray]
    initial: list[np.ndarray]


class OnMesh:
    """A run's steps on one mesh."""

    def __init__(self, config: RunConfig, sizes: MeshConfig, devices: int):
        self.mesh = make_mesh(sizes, jax.devices()[:devices])
        self.trainable = make_trainable(config.model, config.optimizer, STEPS, self.mesh)
        self.step = make_train_step(self.trainable)
        self.batch_size = config.batch_size
        self.held = rows_here(config.batch_size, self.mesh)
        rows = prepare(config.data).train
        self.reader = TrainReader(rows, config.batch_size, config.data.seed, self.held)

    def train(self, state: Any, steps: int) -> tuple[Any, Result]:
        whole = jax.jit(lambda tree: tree, out_shardings=jax.sharding.NamedSharding(
            self.mesh, jax.sharding.PartitionSpec()
        ))  # fmt: skip
        result = Result([], [], [np.asarray(leaf) for leaf in jax.tree.leaves(whole(state.params))])
        start = int(state.step)
        for step in range(start, start + steps):
            batch = self.reader.batch(step)
            tokens = place_local(batch["tokens"], self.held, self.batch_size, self.mesh)
            state, metrics = self.step(state, tokens)
            result.losses.append(float(metrics["loss"]))
            result.rows.append(batch["rows"])
        assert self.step._cache_size() == 1, "the step compiles once"
        return state, result

    def restored(self, folder: Path) -> Any:
        abstract = self.trainable.abstract
        with Checkpointer(folder, 1) as checkpointer:
            _, variables, rest, _ = checkpointer.restore(abstract.variables, abstract.rest)
        return rest.with_variables(variables)


def main(folder: Path, port: str, process: int) -> None:
    with distributed_context(DistributedConfig(f"127.0.0.1:{port}", 2, process)):
        run = OnMesh(run_config(folder), MeshConfig(2, 2, 2), 8)
        _, begun = run.train(run.trainable.init(), STEPS)
        _, continued = run.train(run.restored(folder / "saved"), MORE_STEPS)
        np.savez(
            folder / f"process-{process}.npz",
            begun=begun.losses,
            continued=continued.losses,
            rows=continued.rows,
            **{f"initial-{i}": leaf for i, leaf in enumerate(begun.initial)},
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))

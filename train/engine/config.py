"""LoopConfig: options that all training runs share."""

import dataclasses
import math
import os

from train.devices.attention import Attention
from train.devices.distributed import DistributedConfig
from train.devices.mesh import MeshConfig
from train.engine.optim import OptimizerConfig
from train.runs.instruments import parse_window
from train.runs.resume import FREE, NOTED


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Options of the held-out evaluation.

    Attributes:
        every: Number of steps between evaluations; 0 evaluates only at the end of the run.
        rows: Number of held-out rows to score, spread over the split; 0 scores all rows.
        positions: Number of positions to score with only their prefix as input, if the fork policy
            is not causal; 0 scores all positions.
    """

    every: int = 100
    rows: int = 256
    positions: int = 256

    def __post_init__(self):
        if min(self.every, self.rows) < 0 or self.positions < 0 or self.positions == 1:
            raise ValueError(
                f"every={self.every} rows={self.rows} positions={self.positions}: choose 0 or more "
                "(positions: 0 or at least 2)"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Options that all training runs share.

    Attributes:
        optimizer: Optimizer and learning-rate schedule.
        mesh: Sizes of the axes of the device mesh; -1 takes all remaining devices.
        distributed: Options for connecting the processes of the run.
        evaluation: Amount and interval of the held-out evaluation.
        steps: Number of optimizer steps.
        batch_size: Number of rows per step, over all devices and processes.
        accumulate: Number of micro-batches that a batch is divided into; the gradients of all
            micro-batches are added up before the optimizer step.
        seed: Seed of the initial parameters and of the noise of training.
        out: Run folder for config, checkpoints and metrics; a run in this folder is resumed. A
            leading ~ is the user's home.
        log_every: Number of steps between lines of metrics.
        save_every: Number of steps between checkpoints.
        keep: Number of newest checkpoints to keep.
        keep_every: Number of steps at whose multiples checkpoints are never deleted; only steps
            that are multiples of save_every too have a checkpoint. By default old checkpoints are
            deleted.
        attention: Implementation of attention; "auto" chooses an implementation for the devices.
        profile: First and last step recorded with jax's profiler, e.g. "10:20"; "" records none.
        peak_tflops: Peak speed of one device in TFLOP/s, for the MFU (model FLOPs utilisation); by
            default looked up by the name of the device (`train.devices.hardware`).
        dry_run: Whether to only check the options and print what the run would do.
        plugin: User modules, also in the working directory, that are imported before the other
            options are parsed and may register architectures, policies, methods or tasks.
    """

    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = dataclasses.field(default=MeshConfig(), metadata=NOTED)
    distributed: DistributedConfig = dataclasses.field(default=DistributedConfig(), metadata=FREE)
    evaluation: EvalConfig = dataclasses.field(default=EvalConfig(), metadata=FREE)
    steps: int = dataclasses.field(default=300, metadata=NOTED)
    batch_size: int = 16
    accumulate: int = dataclasses.field(default=1, metadata=NOTED)
    seed: int = 0
    out: str = dataclasses.field(default="runs/tiny", metadata=FREE)
    log_every: int = dataclasses.field(default=10, metadata=FREE)
    save_every: int = dataclasses.field(default=100, metadata=FREE)
    keep: int = dataclasses.field(default=3, metadata=FREE)
    keep_every: int | None = dataclasses.field(default=None, metadata=FREE)
    attention: Attention = dataclasses.field(default="auto", metadata=NOTED)
    profile: str = dataclasses.field(default="", metadata=FREE)
    peak_tflops: float | None = dataclasses.field(default=None, metadata=FREE)
    dry_run: bool = dataclasses.field(default=False, metadata=FREE)
    plugin: tuple[str, ...] = dataclasses.field(default=(), metadata=FREE)

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError(f"keep_every={self.keep_every} is below 1")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ValueError(f"peak_tflops={self.peak_tflops} is not positive and finite")
        if parse_window(self.profile)[0] > self.steps:
            raise ValueError(f"profile={self.profile!r} begins after steps={self.steps}")
        # Once, so that lock, metrics and checkpoints are in the same folder.
        object.__setattr__(self, "out", os.path.expanduser(self.out))

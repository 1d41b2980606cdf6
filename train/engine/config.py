"""LoopConfig: what every training run has."""

import dataclasses
import math

from train.devices.attention import Attention
from train.devices.distributed import DistributedConfig
from train.devices.mesh import MeshConfig
from train.engine.optim import OptimizerConfig
from train.runs.instruments import parse_window
from train.runs.resume import FREE, NOTED


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation.

    Attributes:
        every: Steps between evaluations during the run; 0 evaluates at the end alone.
        rows: Number of held-out rows scored, spread over the split; 0 scores all of them.
        positions: Number of positions scored prefix-only where the policy is not causal; 0 scores
            all.
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
    """What every training run has.

    Attributes:
        optimizer: Optimizer and learning-rate schedule.
        mesh: Sizes of the device mesh; -1 takes the devices that are left.
        distributed: How the processes of the run find each other.
        evaluation: How much held-out data is scored, and when.
        steps: Number of optimizer steps, each over `batch_size` rows in `accumulate` parts.
        batch_size: Rows of a step, over all devices and processes.
        accumulate: Number of parts of a batch whose gradients are added up before an optimizer
            step.
        seed: Seed of the initial parameters.
        out: Run folder for config, checkpoints and metrics; a run found there is continued.
        log_every: Steps between lines of metrics.
        save_every: Steps between checkpoints.
        keep: Number of newest checkpoints that are kept.
        keep_every: Steps between checkpoints that are kept for ever; none of them by default.
        attention: Implementation of attention; "auto" takes the kernel of the mesh's devices.
        profile: Steps recorded with jax's profiler, e.g. "10:20" (`train.runs.instruments`).
        peak_tflops: Peak of one device in TFLOP/s, for MFU, where `train.devices.hardware` does not
            know it.
        dry_run: Whether only to print what would be run.
        plugin: Modules of your own, imported before the other options are read, from the working
            directory too; they add architectures, policies, methods or tasks to the registries.
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

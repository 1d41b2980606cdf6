"""Benchmark the train step and forward pass of a forking decoder against a plain decoder."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from thoughtbubbles import PrefixRank
from train.benchmarks.models import ModelSizes, random_tokens
from train.benchmarks.timing import interleaved, ratio, timed
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable
from train.engine.step import make_train_step

PARTS = ("step", "forward")


@dataclasses.dataclass(frozen=True)
class TrainingBenchmark(ModelSizes):
    """Benchmark of a forking and a plain decoder of the same size, timed in turns on one batch.

    Attributes:
        vocab_size: Number of token ids.
        seq_len: Number of tokens per row.
        batch_size: Number of rows per batch.
        ratio: Streams per token after the fork layers, `PrefixRank(ratio)`.
        fork_layers: Indices of the blocks in front of which streams fork; by default the blocks at
            a quarter, half and three quarters of the depth.
        dtype: Dtype of activations, "float32" or "bfloat16".
        repeats: Number of timed calls of each function; the smallest and the median time are
            reported.
    """

    vocab_size: int = 1024
    seq_len: int = 128
    batch_size: int = 8
    ratio: float = 2.0
    fork_layers: tuple[int, ...] | None = None
    dtype: str = "float32"
    repeats: int = 15

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} is below 1")


@dataclasses.dataclass(frozen=True)
class TimedModel:
    """Functions of one model that are timed, and the FLOPs of the model's forward pass.

    Attributes:
        step: Train step on the batch, which updates the model.
        forward: Forward pass to the logits of all positions.
        flops: Model FLOPs of a forward pass.
        xla_flops: FLOPs of a forward pass as XLA counts them; NaN if XLA gives no count.
    """

    step: Callable[[], Any]
    forward: Callable[[], Any]
    flops: int
    xla_flops: float


def main(config: TrainingBenchmark) -> None:
    """Print a table of step and forward times, their ratios, and the ratio of FLOPs."""
    depth = config.num_layers
    forks = config.fork_layers
    if forks is None:
        forks = tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))
    plain, bubbles = prepare(config, ()), prepare(config, forks)
    models = {"plain": plain, "bubbles": bubbles}
    timing = interleaved(
        {
            f"{name} {part}": partial(timed, getattr(model, part))
            for name, model in models.items()
            for part in PARTS
        },
        config.repeats,
    )
    tokens = config.batch_size * config.seq_len
    print(
        f"{config.dtype}, d={config.embed_dim}, {depth} layers, {config.seq_len} tokens, batch "
        f"{config.batch_size}, vocabulary {config.vocab_size}; forks before {forks}, "
        f"ratio {config.ratio}"
    )
    print(
        f"{'':8} {'step ms':>16} {'forward ms':>16} {'tokens/s':>9} {'GFLOP/s':>8}   (min / median)"
    )
    for name, model in models.items():
        found = [timing[f"{name} {part}"] for part in PARTS]
        cells = [f"{t.best.seconds * 1e3:7.1f} /{t.median.seconds * 1e3:7.1f}" for t in found]
        seconds = found[0].best.seconds
        rate = 3 * model.flops / seconds / 1e9
        print(f"{name:8} {cells[0]} {cells[1]} {tokens / seconds:9.0f} {rate:8.1f}")
    flops = bubbles.flops / plain.flops
    for part in PARTS:
        slower = ratio(timing[f"bubbles {part}"], timing[f"plain {part}"])
        print(
            f"{part} ratio {slower.best:.2f} (median {slower.median:.2f}, rounds "
            f"{slower.low:.2f} to {slower.high:.2f}) = {slower.best / flops:.2f} x FLOP ratio"
        )
    print(f"FLOP ratio {flops:.2f} (XLA's count of the forward pass: "
          f"{bubbles.xla_flops / plain.xla_flops:.2f})")  # fmt: skip


def prepare(config: TrainingBenchmark, fork_layers: tuple[int, ...]) -> TimedModel:
    """Make a model's functions to time; only the forward pass is compiled before its first call."""
    model = config.model_config(
        config.vocab_size,
        fork_layers=fork_layers,
        policy=PrefixRank(config.ratio),
        dtype=config.dtype,
    )
    mesh = make_mesh(MeshConfig())
    trainable = make_trainable(model, OptimizerConfig(), steps=1000, mesh=mesh)
    tokens = place(random_tokens(config.vocab_size, config.batch_size, config.seq_len + 1), mesh)
    state = trainable.init()
    params = jax.tree.map(jax.numpy.copy, state.params)
    step = make_train_step(trainable)
    compiled = jax.jit(lambda params, tokens: trainable.model(params)(tokens[:, :-1]))
    compiled = compiled.lower(params, tokens).compile()
    holder = [state]

    def run_step() -> Any:
        holder[0], metrics = step(holder[0], tokens)
        return metrics["loss"], holder[0].params

    return TimedModel(
        run_step,
        lambda: compiled(params, tokens),
        config.batch_size * model.forward_flops(config.seq_len),
        (compiled.cost_analysis() or {}).get("flops", float("nan")),
    )

"""What forks cost in a train step and in a forward pass, beside the plain decoder."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from thoughtbubbles import ModelConfig, PrefixRank
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable
from train.engine.step import make_train_step


@dataclasses.dataclass(frozen=True)
class TrainingBenchmark:
    """What to time. Both models run interleaved, step by step, on the same batch.

    Attributes:
        fork_layers: default: at a quarter, half and three quarters of the depth.
        repeats: timed calls of each function; the smallest time counts, the median is shown too.
    """

    embed_dim: int = 256
    num_layers: int = 6
    num_heads: int = 4
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
class Timed:
    """One model's functions, ready to call, and their FLOPs per call."""

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
    models = {"plain": prepare(config, ()), "bubbles": prepare(config, forks)}
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(config.repeats + 1):
        for name, timed in models.items():
            for part in ("step", "forward"):
                start = time.perf_counter()
                jax.block_until_ready(getattr(timed, part)())
                times.setdefault((name, part), []).append(time.perf_counter() - start)
    best = {key: min(values[1:]) for key, values in times.items()}
    median = {key: float(np.median(values[1:])) for key, values in times.items()}
    tokens = config.batch_size * config.seq_len
    print(
        f"{config.dtype}, d={config.embed_dim}, {depth} layers, {config.seq_len} tokens, batch "
        f"{config.batch_size}, vocabulary {config.vocab_size}; forks before {forks}, "
        f"ratio {config.ratio}"
    )
    print(
        f"{'':8} {'step ms':>16} {'forward ms':>16} {'tokens/s':>9} {'GFLOP/s':>8}   (min / median)"
    )
    for name, timed in models.items():
        cells = [
            f"{best[name, p] * 1e3:7.1f} /{median[name, p] * 1e3:7.1f}" for p in ("step", "forward")
        ]
        rate = 3 * timed.flops / best[name, "step"] / 1e9
        print(f"{name:8} {cells[0]} {cells[1]} {tokens / best[name, 'step']:9.0f} {rate:8.1f}")
    plain, bubbles = models["plain"], models["bubbles"]
    flops = bubbles.flops / plain.flops
    for part in ("step", "forward"):
        ratio = best["bubbles", part] / best["plain", part]
        middle = median["bubbles", part] / median["plain", part]
        print(f"{part} ratio {ratio:.2f} (median {middle:.2f}) = {ratio / flops:.2f} x FLOP ratio")
    print(f"FLOP ratio {flops:.2f} (XLA's count of the forward pass: "
          f"{bubbles.xla_flops / plain.xla_flops:.2f})")  # fmt: skip


def prepare(config: TrainingBenchmark, fork_layers: tuple[int, ...]) -> Timed:
    """Compile the train step and the forward pass (logits of all positions)."""
    model = ModelConfig(
        vocab_size=config.vocab_size,
        embed_dim=config.embed_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        fork_layers=fork_layers,
        policy=PrefixRank(config.ratio),
        dtype=config.dtype,  # pyright: ignore[reportArgumentType] (checked by ModelConfig)
    )
    mesh = make_mesh(MeshConfig())
    trainable = make_trainable(model, OptimizerConfig(), steps=1000, mesh=mesh)
    shape = (config.batch_size, config.seq_len + 1)
    batch = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    tokens = place(batch, mesh)
    state = trainable.init()
    params = jax.tree.map(jax.numpy.copy, state.params)
    step = make_train_step(trainable)
    compiled = jax.jit(lambda params, tokens: trainable.model(params)(tokens[:, :-1]))
    compiled = compiled.lower(params, tokens).compile()
    holder = [state]

    def run_step() -> Any:
        holder[0], metrics = step(holder[0], tokens)
        return metrics["loss"], holder[0].params

    return Timed(
        run_step,
        lambda: compiled(params, tokens),
        config.batch_size * model.forward_flops(config.seq_len),
        (compiled.cost_analysis() or {}).get("flops", float("nan")),
    )

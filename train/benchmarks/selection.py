"""What choosing streams costs: score, policy, scan, compaction and gather in a forward pass."""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from thoughtbubbles import ModelConfig, PrefixRank, Streams, Thoughtbubbles, Threshold, TopK


@dataclasses.dataclass(frozen=True)
class SelectionBenchmark:
    """Times each policy's fork layers alone, on the streams that they get, and the whole forward.

    Attributes:
        fork_layers: before which blocks streams fork.
        repeats: timed calls of each; the smallest time counts.
    """

    embed_dim: int = 512
    num_layers: int = 6
    num_heads: int = 8
    vocab_size: int = 1024
    seq_len: int = 1024
    batch_size: int = 1
    ratio: float = 2.0
    fork_layers: tuple[int, ...] = (1, 3, 4)
    repeats: int = 10


def main(config: SelectionBenchmark) -> None:
    """Print a line for each policy."""
    print(
        f"d={config.embed_dim}, {config.num_layers} layers, {config.seq_len} tokens, batch "
        f"{config.batch_size}, forks before {config.fork_layers}, ratio {config.ratio}"
    )
    tokens = np.random.default_rng(0).integers(
        0, config.vocab_size, (config.batch_size, config.seq_len), dtype=np.int32
    )
    for policy in (TopK(config.ratio), PrefixRank(config.ratio), Threshold(config.ratio)):
        model = Thoughtbubbles(
            ModelConfig(
                vocab_size=config.vocab_size,
                embed_dim=config.embed_dim,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                fork_layers=config.fork_layers,
                policy=policy,
            ),
            rngs=nnx.Rngs(0),
        )
        forward = jax.jit(lambda model, tokens: model(tokens))
        before = jax.jit(streams_before_forks)(model, tokens)
        selection = jax.jit(
            lambda model, before: [
                fork(streams) for fork, streams in zip(model.forks, before, strict=True)
            ]
        )
        times = {"forward": [], "selection": []}
        for _ in range(config.repeats + 1):
            times["forward"].append(seconds(forward, model, tokens))
            times["selection"].append(seconds(selection, model, before))
        forward_ms, selection_ms = (1e3 * min(values[1:]) for values in times.values())
        print(
            f"{policy}: selection {selection_ms:.1f} ms of a forward pass of {forward_ms:.0f} ms "
            f"= {selection_ms / forward_ms:.1%}",
            flush=True,
        )


def streams_before_forks(model: Thoughtbubbles, tokens: Any) -> list[Streams]:
    """The streams that each fork layer gets."""
    streams, before = Streams.start(model.embed_tokens(tokens)), []
    for (start, end), fork in zip(model.config.groups(), model.forks, strict=False):
        before.append(model.run_blocks(streams, start, end))
        streams = fork(before[-1])
    return before


def seconds(function: Any, *args: Any) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start

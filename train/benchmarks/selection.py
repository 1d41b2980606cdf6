"""Benchmark the selection of streams in a forward pass: score, policy, scan, compaction, gather."""

import dataclasses
from functools import partial
from typing import Any

import jax

from thoughtbubbles import PrefixRank, Streams, Thoughtbubbles, Threshold, TopK
from train.benchmarks.models import ModelSizes, random_model, random_tokens
from train.benchmarks.timing import interleaved, timed


@dataclasses.dataclass(frozen=True)
class SelectionBenchmark(ModelSizes):
    """Benchmark of the fork layers alone and of the whole forward pass, for each policy.

    Attributes:
        vocab_size: Number of token ids.
        seq_len: Number of tokens per row.
        batch_size: Number of rows per batch.
        ratio: Streams per token of each policy.
        fork_layers: Indices of the blocks in front of which streams fork.
        repeats: Number of timed calls of each function; the smallest time is reported.
    """

    embed_dim: int = 512
    num_heads: int = 8
    vocab_size: int = 1024
    seq_len: int = 1024
    batch_size: int = 1
    ratio: float = 2.0
    fork_layers: tuple[int, ...] = (1, 3, 4)
    repeats: int = 10

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} is below 1")


def main(config: SelectionBenchmark) -> None:
    """Print the time of stream selection and of a forward pass, a line for each policy."""
    print(
        f"d={config.embed_dim}, {config.num_layers} layers, {config.seq_len} tokens, batch "
        f"{config.batch_size}, forks before {config.fork_layers}, ratio {config.ratio}"
    )
    tokens = random_tokens(config.vocab_size, config.batch_size, config.seq_len)
    for policy in (TopK(config.ratio), PrefixRank(config.ratio), Threshold(config.ratio)):
        model = random_model(
            config.model_config(config.vocab_size, fork_layers=config.fork_layers, policy=policy)
        )
        forward = jax.jit(lambda model, tokens: model(tokens))
        before = jax.jit(streams_before_forks)(model, tokens)
        selection = jax.jit(
            lambda model, before: [
                fork(streams) for fork, streams in zip(model.forks, before, strict=True)
            ]
        )
        timing = interleaved(
            {
                "forward": partial(timed, forward, model, tokens),
                "selection": partial(timed, selection, model, before),
            },
            config.repeats,
        )
        forward_ms, selection_ms = (1e3 * found.best.seconds for found in timing.values())
        print(
            f"{policy}: selection {selection_ms:.1f} ms of a forward pass of {forward_ms:.0f} ms "
            f"= {selection_ms / forward_ms:.1%}",
            flush=True,
        )


def streams_before_forks(model: Thoughtbubbles, tokens: Any) -> list[Streams]:
    """Compute the input of each fork layer, for token ids `[B, T]` int32."""
    streams, before = Streams.start(model.embed_tokens(tokens)), []
    for (start, end), fork in zip(model.config.groups(), model.forks, strict=False):
        before.append(model.run_blocks(streams, start, end))
        streams = fork(before[-1])
    return before

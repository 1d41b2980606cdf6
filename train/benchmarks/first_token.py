"""Benchmark the time to the first token, with blocks scanned as one stack or unrolled."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from thoughtbubbles import Thoughtbubbles
from train.benchmarks.models import SmolLM2Sizes, random_model, random_tokens
from train.benchmarks.timing import interleaved, ratio, timed


@dataclasses.dataclass(frozen=True)
class FirstTokenBenchmark(SmolLM2Sizes):
    """Benchmark of a prefill with random parameters.

    Attributes:
        batch_size: Number of rows per batch.
        prompts: Prompt lengths in tokens; one line is printed for each length.
        repeats: Number of rounds of each measurement; the smallest time is reported.
    """

    batch_size: int = 1
    prompts: tuple[int, ...] = (32, 128, 512)
    repeats: int = 5

    def __post_init__(self):
        if min(self.batch_size, self.repeats, *self.prompts) < 1:
            raise ValueError("batch_size, repeats and prompts must be 1 or more")


def main(config: FirstTokenBenchmark) -> None:
    """Time the prefill with stacked and unrolled blocks; print times and temporary memory."""
    stacked = random_model(config.model_config())
    models = {"stacked": stacked, "one by one": stacked.for_decoding()}
    print(f"{stacked.config.num_params():,} parameters, batch {config.batch_size}; ms, and "
          "temporaries of the program in MB")  # fmt: skip
    print("prompt   stacked        MB   one by one        MB   times as fast (median)")
    for length in config.prompts:
        tokens = jnp.asarray(random_tokens(config.vocab_size, config.batch_size, length))
        runs, temporaries = {}, {}
        for name, model in models.items():
            compiled = jax.jit(first_token).lower(model, tokens).compile()
            stats: Any = compiled.memory_analysis()
            temporaries[name] = stats.temp_size_in_bytes / 1e6
            runs[name] = partial(timed, compiled, model, tokens)
        timing = interleaved(runs, config.repeats)
        cells = [
            f"{1e3 * found.best.seconds:10.1f} {temporaries[name]:9.0f}  "
            for name, found in timing.items()
        ]
        faster = ratio(timing["stacked"], timing["one by one"])
        print(f"{length:6}{' '.join(cells)} {faster.best:10.2f} ({faster.median:.2f})", flush=True)


def first_token(model: Thoughtbubbles, tokens: jax.Array) -> tuple[jax.Array, Any]:
    """Prefill prompts `[B, T]` as `generate` does.

    Returns:
        The most probable next token of each row, `[B]` int32, and the cache.
    """
    rows, length = tokens.shape
    lengths = jnp.full((rows,), length, jnp.int32)
    cache = model.init_cache(rows, 2 * length)
    output, cache = model.advance(cache, tokens, lengths, fresh=True)
    return model.logits_at(output, lengths - 1).argmax(axis=-1), cache

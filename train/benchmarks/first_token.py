"""Benchmark the time to the first token, with blocks scanned as one stack or unrolled."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from thoughtbubbles import ModelConfig, Thoughtbubbles
from train.benchmarks.models import random_model, random_tokens
from train.benchmarks.timing import interleaved, ratio, timed


@dataclasses.dataclass(frozen=True)
class FirstTokenBenchmark:
    """Benchmark of a prefill with random parameters; default sizes are those of SmolLM2-135M.

    Attributes:
        vocab_size: Number of token ids.
        embed_dim: Width of the residual streams.
        num_layers: Number of blocks.
        num_heads: Number of attention heads of a block.
        num_kv_heads: Number of key/value heads of a block.
        mlp_dim: Hidden width of the MLP.
        batch_size: Number of rows per batch.
        prompts: Prompt lengths in tokens; one line is printed for each length.
        repeats: Number of rounds of each measurement; the smallest time is reported.
    """

    vocab_size: int = 49_152
    embed_dim: int = 576
    num_layers: int = 30
    num_heads: int = 9
    num_kv_heads: int = 3
    mlp_dim: int = 1536
    batch_size: int = 1
    prompts: tuple[int, ...] = (32, 128, 512)
    repeats: int = 5

    def __post_init__(self):
        if min(self.batch_size, self.repeats, *self.prompts) < 1:
            raise ValueError("batch_size, repeats and prompts must be 1 or more")


def main(config: FirstTokenBenchmark) -> None:
    """Time the prefill with stacked and unrolled blocks; print times and temporary memory."""
    sizes = {
        name: getattr(config, name)
        for name in (
            "vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "mlp_dim"
        )
    }  # fmt: skip
    stacked = random_model(ModelConfig(**sizes, norm="rmsnorm", mlp="swiglu", biases="none"))
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

"""Benchmark cached decoding against recomputing the prefix, and against a plain decoder."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from thoughtbubbles import PrefixRank, Thoughtbubbles
from thoughtbubbles.cache import Cache, decode_step, init_cache, prefill
from train.benchmarks.models import ModelSizes, random_model, random_tokens
from train.benchmarks.timing import Clock, Cost, interleaved, timed
from train.models.load import load_weights


@dataclasses.dataclass(frozen=True)
class DecodeBenchmark(ModelSizes):
    """Benchmark of greedy decoding with random prompts and, without `model`, random parameters.

    Attributes:
        model: Pretrained model in place of random parameters: "smollm2", a Hugging Face folder, or
            a .gguf file. With a pretrained model, the options of sizes and forks are ignored.
        num_kv_heads: Number of key/value heads of a block.
        vocab_size: Number of token ids.
        batch_size: Number of rows per batch.
        ratio: Streams per token after the fork layers, `PrefixRank(ratio)`.
        fork_layers: Indices of the blocks in front of which streams fork.
        contexts: Context lengths: numbers of tokens in the cache when the timed steps begin. One
            line is printed for each length.
        new_tokens: Number of consecutive decoding steps that are timed at each context length.
        repeats: Number of rounds of each measurement; the smallest time is reported.
    """

    embed_dim: int = 512
    num_heads: int = 8
    model: str | None = None
    num_kv_heads: int = 2
    vocab_size: int = 1024
    batch_size: int = 1
    ratio: float = 2.0
    fork_layers: tuple[int, ...] = (2, 4)
    contexts: tuple[int, ...] = (128, 512, 2048)
    new_tokens: int = 32
    repeats: int = 5

    def __post_init__(self):
        if min(self.new_tokens, self.repeats, self.batch_size, *self.contexts) < 1:
            raise ValueError("new_tokens, repeats, batch_size and contexts must be 1 or more")


def main(config: DecodeBenchmark) -> None:
    """Time cached and recomputed decoding, and print the times per token by context length."""
    if config.model is not None:
        return pretrained(config, config.model)
    plain, bubbles = (
        random_model(
            config.model_config(
                config.vocab_size,
                num_kv_heads=config.num_kv_heads,
                fork_layers=forks,
                policy=PrefixRank(config.ratio),
            )
        )
        for forks in ((), config.fork_layers)
    )
    print(
        f"d={config.embed_dim}, {config.num_layers} layers, {config.num_heads} heads, "
        f"{config.num_kv_heads} of keys, batch {config.batch_size}; forks before "
        f"{config.fork_layers}, {bubbles.config.policy}; ms per token"
    )
    print("context  cached  recomputed  ratio |  plain cached  bubbles/plain  streams/token")
    for context in config.contexts:
        runs = {
            "cached": CachedRun(bubbles, config, context),
            "plain": CachedRun(plain, config, context),
            "recomputed": RecomputedRun(bubbles, config, context),
        }
        timing = interleaved(runs, config.repeats)
        cached, plain_time, recomputed = (
            1e3 * timing[name].best.seconds for name in ("cached", "plain", "recomputed")
        )
        print(
            f"{context:7} {cached:7.2f} {recomputed:11.1f} {recomputed / cached:6.1f} | "
            f"{plain_time:13.2f} {cached / plain_time:14.2f} {runs['cached'].streams():14.2f}",
            flush=True,
        )


def pretrained(config: DecodeBenchmark, name: str) -> None:
    """Time a pretrained model with and without cache, and print tokens/s by context length."""
    model = load_weights(name).model
    assert isinstance(model, Thoughtbubbles)
    print(
        f"{name}: {model.config.num_params():,} parameters, {model.config.num_layers} layers, "
        f"{model.config.dtype}, batch {config.batch_size}; tokens per second / per CPU-second"
    )
    print("context            cached        recomputed  ratio")
    for context in config.contexts:
        runs = {
            "cached": CachedRun(model, config, context),
            "recomputed": RecomputedRun(model, config, context),
        }
        timing = interleaved(runs, config.repeats)
        costs = {name: found.best for name, found in timing.items()}
        cells = [
            f"{config.batch_size / cost.seconds:8.2f} /{config.batch_size / cost.cpu_seconds:8.2f}"
            for cost in costs.values()
        ]
        ratio = costs["recomputed"].seconds / costs["cached"].seconds
        print(f"{context:7} {' '.join(cells)} {ratio:6.1f}", flush=True)


class CachedRun:
    """Timed greedy decoding after a prefill of `context` tokens, in one compiled loop."""

    def __init__(self, model: Thoughtbubbles, config: DecodeBenchmark, context: int):
        self._model, self._config, self._context = model, config, context

        def steps(model: Thoughtbubbles, cache: Cache, token: jax.Array) -> Cache:
            def step(carry: Any, _: None) -> tuple[Any, None]:
                cache, token = carry
                logits, cache = decode_step(model, cache, token)
                return (cache, logits.argmax(axis=-1).astype(jnp.int32)), None

            return jax.lax.scan(step, (cache, token), length=config.new_tokens)[0][0]

        self._steps = jax.jit(steps, donate_argnums=1)
        self._prefill = jax.jit(prefill)
        self._cache: Cache | None = None

    def __call__(self) -> Cost:
        """Decode `new_tokens` tokens in each row, and return the mean cost of a step."""
        config, context = self._config, self._context
        cache = init_cache(self._model, config.batch_size, context + config.new_tokens)
        tokens = jnp.asarray(
            random_tokens(self._model.config.vocab_size, config.batch_size, context)
        )
        lengths = jnp.full((config.batch_size,), context, jnp.int32)
        logits, cache = self._prefill(self._model, cache, tokens, lengths)
        token = jax.block_until_ready(logits.argmax(axis=-1).astype(jnp.int32))
        clock = Clock()
        self._cache = jax.block_until_ready(self._steps(self._model, cache, token))
        return clock.read().per(config.new_tokens)

    def streams(self) -> float:
        """Mean number of live streams per token after the last fork layer, in the last call."""
        assert self._cache is not None
        return float((self._cache.streams / self._cache.length).mean())


class RecomputedRun:
    """Timed forward pass over a prefix of `context` tokens, the cost of a token without a cache."""

    def __init__(self, model: Thoughtbubbles, config: DecodeBenchmark, context: int):
        self._model = model
        self._tokens = jnp.asarray(
            random_tokens(model.config.vocab_size, config.batch_size, context)
        )

        def last(model: Thoughtbubbles, tokens: jax.Array) -> jax.Array:
            streams = model.run(tokens).streams
            return model.logits_at(streams, jnp.full(tokens.shape[:1], tokens.shape[1] - 1))

        self._last = jax.jit(last)

    def __call__(self) -> Cost:
        """Run the forward pass, which gives one token per row, and return the cost of the pass."""
        return timed(self._last, self._model, self._tokens)

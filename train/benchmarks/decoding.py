"""Cached decoding against recomputing the prefix for every token, and against a plain decoder."""

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from thoughtbubbles import ModelConfig, PrefixRank, Thoughtbubbles
from thoughtbubbles.cache import Cache, decode_step, init_cache, prefill
from train.models.load import load_weights


@dataclasses.dataclass(frozen=True)
class DecodeBenchmark:
    """Random weights and random prompts: speed does not depend on what is said.

    Attributes:
        model: pretrained weights in place of random ones: "smollm2", a Hugging Face folder, or a
            .gguf file; the sizes and forks below are then not used.
        contexts: tokens in the cache when the timed steps begin.
        new_tokens: timed steps at each context, one after another.
        repeats: of each measurement, interleaved; the smallest time counts.
    """

    model: str | None = None
    embed_dim: int = 512
    num_layers: int = 6
    num_heads: int = 8
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
    """Print a row for each context."""
    if config.model is not None:
        return pretrained(config, config.model)
    plain, bubbles = (build(config, forks) for forks in ((), config.fork_layers))
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
        costs = least(config.repeats, runs)
        cached, plain_time, recomputed = (
            1e3 * costs[name].seconds for name in ("cached", "plain", "recomputed")
        )
        print(
            f"{context:7} {cached:7.2f} {recomputed:11.1f} {recomputed / cached:6.1f} | "
            f"{plain_time:13.2f} {cached / plain_time:14.2f} {runs['cached'].streams():14.2f}",
            flush=True,
        )


def pretrained(config: DecodeBenchmark, name: str) -> None:
    """Print tokens per second of a pretrained model, a row for each context."""
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
        costs = least(config.repeats, runs)
        cells = [
            f"{config.batch_size / cost.seconds:8.2f} /{config.batch_size / cost.cpu_seconds:8.2f}"
            for cost in costs.values()
        ]
        ratio = costs["recomputed"].seconds / costs["cached"].seconds
        print(f"{context:7} {' '.join(cells)} {ratio:6.1f}", flush=True)


class Cost(NamedTuple):
    """Of a step, which is a token of each row: on the clock, and of all cores."""

    seconds: float
    cpu_seconds: float


def least(repeats: int, runs: "dict[str, CachedRun | RecomputedRun]") -> dict[str, Cost]:
    """The smallest costs of each run's steps, measured in turns."""
    costs: dict[str, list[Cost]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            costs[name].append(run.cost())
    return {name: Cost(*map(min, zip(*found, strict=True))) for name, found in costs.items()}


def build(config: DecodeBenchmark, fork_layers: tuple[int, ...]) -> Thoughtbubbles:
    """A model with random weights."""
    model = ModelConfig(
        vocab_size=config.vocab_size,
        embed_dim=config.embed_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        fork_layers=fork_layers,
        policy=PrefixRank(config.ratio),
    )
    return jax.jit(lambda: Thoughtbubbles(model, rngs=nnx.Rngs(0)))()


def prompts(model: Thoughtbubbles, config: DecodeBenchmark, context: int) -> np.ndarray:
    """Random tokens `[B, context]`."""
    shape = (config.batch_size, context)
    return np.random.default_rng(0).integers(0, model.config.vocab_size, shape, dtype=np.int32)


class CachedRun:
    """Greedy steps behind a prefill of `context` tokens, in one compiled loop as in `generate`."""

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
        self._cache = self._run()[1]  # compiles

    def cost(self) -> Cost:
        cost, self._cache = self._run()
        return Cost(*(part / self._config.new_tokens for part in cost))

    def _run(self) -> tuple[Cost, Cache]:
        config, context = self._config, self._context
        cache = init_cache(self._model, config.batch_size, context + config.new_tokens)
        tokens = jnp.asarray(prompts(self._model, config, context))
        lengths = jnp.full((config.batch_size,), context, jnp.int32)
        logits, cache = self._prefill(self._model, cache, tokens, lengths)
        token = jax.block_until_ready(logits.argmax(axis=-1).astype(jnp.int32))
        start, cpu = time.perf_counter(), time.process_time()
        cache = jax.block_until_ready(self._steps(self._model, cache, token))
        return Cost(time.perf_counter() - start, time.process_time() - cpu), cache

    def streams(self) -> float:
        """Live streams per token after the last fork layer."""
        return float((self._cache.groups[-1].count / self._cache.length).mean())


class RecomputedRun:
    """The forward pass over the whole prefix that each new token costs without a cache."""

    def __init__(self, model: Thoughtbubbles, config: DecodeBenchmark, context: int):
        self._model, self._tokens = model, jnp.asarray(prompts(model, config, context))

        def last(model: Thoughtbubbles, tokens: jax.Array) -> jax.Array:
            streams = model.run(tokens).streams
            return model.logits_at(streams, jnp.full(tokens.shape[:1], tokens.shape[1] - 1))

        self._last = jax.jit(last)
        jax.block_until_ready(self._last(self._model, self._tokens))

    def cost(self) -> Cost:
        start, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(self._last(self._model, self._tokens))
        return Cost(time.perf_counter() - start, time.process_time() - cpu)

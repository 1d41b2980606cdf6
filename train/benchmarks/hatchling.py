"""Benchmark a Dragon Hatchling against a plain decoder with about as many parameters."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from thoughtbubbles import Architecture, ModelConfig
from thoughtbubbles.architecture import architecture_of
from thoughtbubbles.hatchling import HatchlingConfig
from train.benchmarks.models import random_tokens
from train.benchmarks.timing import Clock, Cost, interleaved, ratio, timed
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable
from train.engine.step import make_train_step


@dataclasses.dataclass(frozen=True)
class HatchlingBenchmark:
    """Benchmark of a Dragon Hatchling and a plain decoder of equal width and similar size.

    Attributes:
        vocab_size: Number of token ids.
        embed_dim: Width of both models (d).
        num_neurons: Number of neurons (n).
        num_layers: Number of times that the Hatchling's layer is applied.
        num_heads: Number of heads of both models.
        chunk: Number of tokens of a chunk of the Hatchling.
        batch_size: Number of rows per batch.
        contexts: Context lengths: numbers of tokens of a training row, of a prefill, and in front
            of decoded tokens.
        longest: Maximum context length at which training steps and prefills are timed, because the
            plain decoder's attention scores of 16,384 tokens fill gigabytes.
        new_tokens: Number of consecutive decoding steps that are timed at each context length.
        repeats: Number of rounds of each measurement; the smallest time and the spread of ratios
            over rounds are reported.
    """

    vocab_size: int = 256
    embed_dim: int = 128
    num_neurons: int = 4096
    num_layers: int = 4
    num_heads: int = 4
    chunk: int = 512
    batch_size: int = 1
    contexts: tuple[int, ...] = (128, 2048, 16_384)
    longest: int = 2048
    new_tokens: int = 16
    repeats: int = 5

    def __post_init__(self):
        for name in ("batch_size", "longest", "new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1")
        if min(self.contexts) < 1:
            raise ValueError(f"contexts={self.contexts}: choose 1 or more")

    def configs(self) -> dict[str, Any]:
        """Return the configs of both models, under the names "plain" and "hatchling".

        The plain decoder has the depth at which its number of parameters is closest to the
        Hatchling's.
        """
        hatchling = HatchlingConfig(
            vocab_size=self.vocab_size,
            embed_dim=self.embed_dim,
            num_neurons=self.num_neurons,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            chunk=self.chunk,
        )
        plain = ModelConfig(
            vocab_size=self.vocab_size,
            embed_dim=self.embed_dim,
            num_layers=1,
            num_heads=self.num_heads,
            tied_head=False,
            scan_layers=True,
        )
        block = dataclasses.replace(plain, num_layers=2).num_params() - plain.num_params()
        more = round((hatchling.num_params() - plain.num_params()) / block)
        plain = dataclasses.replace(plain, num_layers=1 + max(more, 0))
        return {"plain": plain, "hatchling": hatchling}


def main(config: HatchlingBenchmark) -> None:
    """Print the times of both models and their ratio, a row per part and context length."""
    configs = config.configs()
    models = {name: random_architecture(shape) for name, shape in configs.items()}
    print(
        f"{jax.devices()[0].device_kind}, batch {config.batch_size}; "
        + "; ".join(
            f"{name}: {shape.num_params():,} parameters, {shape.num_layers} layers"
            for name, shape in configs.items()
        )
    )
    print("part     context   plain ms  hatchling ms  hatchling / plain (median, rounds)")
    for part, make in (("step", step_of), ("prefill", prefill_of), ("decode", decode_of)):
        for context in config.contexts:
            if part != "decode" and context > config.longest:
                continue
            runs = {name: make(model, config, context) for name, model in models.items()}
            timing = interleaved(runs, config.repeats)
            slower = ratio(timing["hatchling"], timing["plain"])
            plain, hatchling = (1e3 * timing[name].best.seconds for name in models)
            print(
                f"{part:8} {context:7} {plain:10.2f} {hatchling:13.2f}  {slower.best:6.2f} "
                f"({slower.median:.2f}, {slower.low:.2f} to {slower.high:.2f})",
                flush=True,
            )


def random_architecture(config: Any) -> Architecture:
    """Make a model with random parameters from an `ArchitectureConfig`."""
    return jax.jit(lambda: architecture_of(config)(config, rngs=nnx.Rngs(0)))()


def step_of(model: Architecture, config: HatchlingBenchmark, context: int) -> Callable[[], Cost]:
    """Return a function that takes a training step on rows of `context` tokens and times it."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    trainable = make_trainable(model.config, OptimizerConfig(), steps=1000, mesh=mesh)
    rows = place(random_tokens(config.vocab_size, config.batch_size, context + 1), mesh)
    step, holder = make_train_step(trainable), [trainable.init()]

    def run() -> Any:
        holder[0], metrics = step(holder[0], rows)
        return metrics["loss"], holder[0].params

    return partial(timed, run)


def prefill_of(model: Architecture, config: HatchlingBenchmark, context: int) -> Callable[[], Cost]:
    """Return a function that times a prefill: a forward pass of `context` tokens into a cache.

    The pass also computes the logits of the last token.
    """
    tokens = jnp.asarray(random_tokens(config.vocab_size, config.batch_size, context))
    length = jnp.full((config.batch_size,), context, jnp.int32)

    @jax.jit
    def prefill(model: Architecture, tokens: jax.Array) -> tuple[jax.Array, Any]:
        cache = model.init_cache(config.batch_size, context)
        output, cache = model.advance(cache, tokens, length, fresh=True)
        return model.logits_at(output, length - 1), cache

    return partial(timed, prefill, model, tokens)


def decode_of(model: Architecture, config: HatchlingBenchmark, context: int) -> Callable[[], Cost]:
    """Return a function that times greedy decoding steps after `context` tokens.

    The steps are one compiled loop, as in `generate`. The time does not depend on the content of
    the cache, so only the cache's length is set to `context`, and no tokens are prefilled.
    """
    rows, decoder = config.batch_size, model.for_decoding()
    one = jnp.ones((rows,), jnp.int32)

    def steps(decoder: Architecture, cache: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            cache, token = carry
            output, cache = decoder.advance(cache, token[:, None], one)
            logits = decoder.logits_at(output, jnp.zeros_like(one))
            return (cache, logits.argmax(axis=-1).astype(jnp.int32)), None

        return jax.lax.scan(step, (cache, token), length=config.new_tokens)[0]

    compiled = jax.jit(steps, donate_argnums=1)
    full = lambda: jnp.full((rows,), context, jnp.int32)  # noqa: E731 (each is donated)

    def run() -> Cost:
        cache: Any = model.init_cache(rows, context + config.new_tokens)
        cache = jax.block_until_ready(dataclasses.replace(cache, length=full()))
        clock = Clock()
        jax.block_until_ready(compiled(decoder, cache, one))
        return clock.read().per(config.new_tokens)

    return run

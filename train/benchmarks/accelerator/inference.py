"""Measure decoding with a cache, and rollouts and updates of reinforcement learning."""

import functools
import tempfile
import time
from typing import Any

import jax

from thoughtbubbles import ModelConfig, Thoughtbubbles
from thoughtbubbles.decoding import generate
from train.benchmarks.accelerator.record import Record
from train.benchmarks.accelerator.sizes import Sizes
from train.benchmarks.decoding import CachedRun, DecodeBenchmark
from train.benchmarks.models import random_model, random_tokens
from train.benchmarks.rl import best_step
from train.data import ByteTokenizer
from train.models.load import LanguageModel
from train.rl.config import RLConfig
from train.rl.job import RLJob


def measure_decoding(record: Record, sizes: Sizes) -> None:
    """Measure tokens per second and time to the first token, for each decoder and batch size."""
    for name, config in sizes.decoders.items():
        model = functools.cache(functools.partial(random_model, config))
        for batch in sizes.decode_batches:
            record.measure(
                f"{name} batch {batch}",
                functools.partial(decoding_speed, model, batch, sizes),
            )


def decoding_speed(model: Any, batch: int, sizes: Sizes) -> dict[str, Any]:
    """Measure greedy decoding after prompts of random tokens.

    Args:
        model: Function without arguments that returns the model.
        batch: Number of rows.
        sizes: Sizes with the lengths of prompt and continuation.

    Returns:
        Dict of the number of `parameters`, `seconds_per_token` (of one step of all rows),
        `tokens_per_second` (over all rows), and `first_token_seconds` (prefill and first token).
    """
    decoder: Thoughtbubbles = model()
    config = DecodeBenchmark(batch_size=batch, new_tokens=sizes.new_tokens, repeats=1)
    run = CachedRun(decoder, config, sizes.context)
    run()  # compiles
    seconds = min(run().seconds for _ in range(3))
    prompts = random_tokens(decoder.config.vocab_size, batch, sizes.context).tolist()
    first = []
    for _ in range(3):
        started = time.perf_counter()
        generate(decoder, prompts, 1)
        first.append(time.perf_counter() - started)
    return {
        "parameters": decoder.config.num_params(),
        "seconds_per_token": seconds,
        "tokens_per_second": batch / seconds,
        "first_token_seconds": min(first[1:]),
    }


def measure_rl(record: Record, sizes: Sizes) -> None:
    """Measure rollouts and updates of GRPO on a built-in task."""
    record.measure("reverse", functools.partial(rl_speed, sizes.rl_model, sizes))


def rl_speed(model: ModelConfig, sizes: Sizes) -> dict[str, Any]:
    """Measure a GRPO step of a model with random parameters, whose rollouts seldom end early.

    Returns:
        Dict of the number of `parameters` and of `rollouts` of a step; `rollout_seconds`,
        `update_seconds` and their sum `step_seconds`; `rollout_tokens_per_second` and
        `update_tokens_per_second`.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = RLConfig(
            weights="random",
            train="all",
            task="reverse(length=8)",
            batch_size=sizes.rl_prompts,
            num_generations=sizes.rl_generations,
            max_new_tokens=sizes.rl_tokens,
            max_rows=sizes.rl_prompts * sizes.rl_generations,
            out=folder,
        )
        lm = LanguageModel(random_model(model), ByteTokenizer())
        job = RLJob(config, lm, devices=jax.devices()[:1])
        found = best_step(job, repeats=2)
    seconds = found["rollout_seconds"] + found["update_seconds"]
    return {
        "parameters": model.num_params(),
        "rollouts": config.rollouts,
        "rollout_seconds": found["rollout_seconds"],
        "update_seconds": found["update_seconds"],
        "step_seconds": seconds,
        "rollout_tokens_per_second": found["tokens"] / found["rollout_seconds"],
        "update_tokens_per_second": found["tokens"] / found["update_seconds"],
    }

"""Test on random bits whether a trained model leaks later tokens through which streams survive.

python -m train.experiments.random_bits

Every possible string is scored, so that the losses are exact expectations. By Gibbs' inequality, a
model that predicts each bit from earlier bits alone cannot have a loss below ln 2, whatever its
parameters. A lower loss therefore shows a leak.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from thoughtbubbles import ModelConfig, Policy, PrefixRank, Threshold, TopK
from train.cli.command import run_command
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.optim import OptimizerConfig
from train.engine.state import Trainable, TrainState, make_trainable
from train.engine.step import make_train_step
from train.experiments.study import check_options


@dataclasses.dataclass(frozen=True)
class RandomBits:
    """Trains a model with each fork policy on uniform random bits, and scores it on all strings.

    Attributes:
        length: Number of input bits of a string; each input bit predicts the next bit.
        ratio: Streams per token; at 2 the first fork layer keeps every fork, and nothing leaks.
        steps: Number of training steps.
        batch_size: Number of new strings in a step.
        seeds: Seeds of initial parameters and strings.
    """

    length: int = 12
    ratio: float = 1.5
    steps: int = 3000
    batch_size: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self):
        check_options(self)


def main(config: RandomBits) -> None:
    """Train and score a model with each policy and seed, and print a line for each model."""
    policies = (TopK(config.ratio), PrefixRank(config.ratio), Threshold(config.ratio))
    print(f"ln 2 = {math.log(2):.6f} nats; {config.steps} steps on strings of {config.length} bits")
    for policy in policies:
        for seed in config.seeds:
            trainable, state = trained(model_config(policy), config, seed)
            scores = all_strings(trainable, state, config.length)
            parallel, prefix_only = scores["parallel"], scores["prefix_only"]
            print(
                f"{policy} seed {seed}: parallel {parallel:.6f}, prefix-only {prefix_only:.6f}, "
                f"difference {prefix_only - parallel:.6f}",
                flush=True,
            )


def model_config(policy: Policy) -> ModelConfig:
    """Return the config of a model with five layers of width 32, and with two fork layers."""
    return ModelConfig(
        vocab_size=2, embed_dim=32, num_layers=5, num_heads=2, fork_layers=(1, 3), policy=policy
    )


def trained(model: ModelConfig, config: RandomBits, seed: int) -> tuple[Trainable, TrainState]:
    """Train a model on new random strings in each step."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    trainable = make_trainable(model, OptimizerConfig(), config.steps, mesh, seed)
    step, state = make_train_step(trainable), trainable.init()
    rng = np.random.default_rng(seed)
    for _ in range(config.steps):
        bits = rng.integers(0, 2, (config.batch_size, config.length + 1), dtype=np.int32)
        state, _ = step(state, place(bits, mesh))
    return trainable, state


def all_strings(trainable: Trainable, state: TrainState, length: int) -> dict[str, float]:
    """Compute the mean nats per bit over all strings of `length + 1` bits.

    Returns:
        Dict of `parallel`, from teacher-forced forward passes over whole strings, and
        `prefix_only`, from a separate forward pass over each prefix.
    """
    rows = strings(length + 1)

    @jax.jit
    def parallel(variables: Any, rows: jax.Array) -> jax.Array:
        return trainable.model(variables).token_losses(rows)[0].sum()

    @jax.jit
    def next_bit(variables: Any, prefixes: jax.Array) -> jax.Array:
        """Compute the expected nats of the next bit, whose two values are equally likely."""
        model = trainable.model(variables)
        streams = model.run(prefixes).streams
        logits = model.logits_at(streams, jnp.full(prefixes.shape[:1], prefixes.shape[1] - 1))
        return -jax.nn.log_softmax(logits, axis=-1).mean()

    parts = [parallel(state.variables, part) for part in np.array_split(rows, 8)]
    prefixes = [next_bit(state.variables, strings(count + 1)) for count in range(length)]
    return {
        "parallel": float(np.sum(parts)) / (len(rows) * length),
        "prefix_only": float(np.mean(prefixes)),
    }


def strings(length: int) -> np.ndarray:
    """Return all strings of `length` bits, `[2 ** length, length]` int32."""
    numbers = np.arange(2**length)[:, None]
    return (numbers >> np.arange(length) & 1).astype(np.int32)


def command() -> None:
    run_command(main, RandomBits)


if __name__ == "__main__":
    command()

"""Does training read the future through the survivor pattern? On random bits nobody may beat ln 2.

python -m train.experiments.random_bits

All strings are scored, each as often as every other, so the numbers are exact expectations: by
Gibbs' inequality a model whose prediction of a bit depends on the bits before it alone cannot
score below ln 2, whatever its weights.
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


@dataclasses.dataclass(frozen=True)
class RandomBits:
    """Train each policy on uniform random bits and score it on all strings.

    Attributes:
        length: bits that are read; each predicts the next.
        ratio: streams per token; both fork layers must choose, or there is nothing to leak.
        steps: of `batch_size` fresh strings.
        seeds: of initial parameters and strings.
    """

    length: int = 12
    ratio: float = 1.5
    steps: int = 3000
    batch_size: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)


def main(config: RandomBits) -> None:
    """Print a line for each policy and seed."""
    policies = (TopK(config.ratio), PrefixRank(config.ratio), Threshold(config.ratio))
    print(f"ln 2 = {math.log(2):.6f} nats; {config.steps} steps on strings of {config.length} bits")
    for policy in policies:
        for seed in config.seeds:
            trainable, state = trained(model_config(policy), config, seed)
            scores = all_strings(trainable, state, config.length)
            blockwise, prefix_only = scores["blockwise"], scores["prefix_only"]
            print(
                f"{policy} seed {seed}: blockwise {blockwise:.6f}, prefix-only {prefix_only:.6f}, "
                f"difference {prefix_only - blockwise:.6f}",
                flush=True,
            )


def model_config(policy: Policy) -> ModelConfig:
    """Five layers of width 32, forks before the second and the fourth."""
    return ModelConfig(
        vocab_size=2, embed_dim=32, num_layers=5, num_heads=2, fork_layers=(1, 3), policy=policy
    )


def trained(model: ModelConfig, config: RandomBits, seed: int) -> tuple[Trainable, TrainState]:
    """A model trained on fresh random strings."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    trainable = make_trainable(model, OptimizerConfig(), config.steps, mesh, seed)
    step, state = make_train_step(trainable), trainable.init()
    rng = np.random.default_rng(seed)
    for _ in range(config.steps):
        bits = rng.integers(0, 2, (config.batch_size, config.length + 1), dtype=np.int32)
        state, _ = step(state, place(bits, mesh))
    return trainable, state


def all_strings(trainable: Trainable, state: TrainState, length: int) -> dict[str, float]:
    """Mean nats a bit over all strings of `length + 1` bits: `blockwise` and `prefix_only`."""
    rows = strings(length + 1)

    @jax.jit
    def blockwise(variables: Any, rows: jax.Array) -> jax.Array:
        return trainable.model(variables).token_losses(rows)[0].sum()

    @jax.jit
    def next_bit(variables: Any, prefixes: jax.Array) -> jax.Array:
        """Nats of the next bit, both values being as likely."""
        model = trainable.model(variables)
        streams = model.run(prefixes).streams
        logits = model.logits_at(streams, jnp.full(prefixes.shape[:1], prefixes.shape[1] - 1))
        return -jax.nn.log_softmax(logits, axis=-1).mean()

    parts = [blockwise(state.weights, part) for part in np.array_split(rows, 8)]
    prefixes = [next_bit(state.weights, strings(count + 1)) for count in range(length)]
    return {
        "blockwise": float(np.sum(parts)) / (len(rows) * length),
        "prefix_only": float(np.mean(prefixes)),
    }


def strings(length: int) -> np.ndarray:
    """All bit strings, `[2 ** length, length]` int32."""
    numbers = np.arange(2**length)[:, None]
    return (numbers >> np.arange(length) & 1).astype(np.int32)


def command() -> None:
    run_command(main, RandomBits)


if __name__ == "__main__":
    command()

"""The small policies and tasks that the tests of reinforcement learning share."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import memgen_tiny
import numpy as np
from flax import nnx

from memgen import MemGenConfig, TriggerConfig, WeaverConfig
from thoughtbubbles import PrefixRank, Thoughtbubbles, Threshold
from train.data import ByteTokenizer
from train.models.finetunable import FinetunableModel
from train.models.load import LanguageModel
from train.rl.rollout.sampler import Sampling
from train.rl.types import Problem, Reward, Turn

PLAIN = dataclasses.replace(memgen_tiny.PLAIN, vocab_size=ByteTokenizer.vocab_size)
ONE_FORK: dict[str, Any] = {"num_layers": 1, "fork_layers": (0,), "merge": "residual"}
MODELS = {
    "plain": PLAIN,
    "rank": dataclasses.replace(PLAIN, **memgen_tiny.FORKS, policy=PrefixRank(2.0)),
    "threshold": dataclasses.replace(PLAIN, **memgen_tiny.FORKS, policy=Threshold(2.0)),
    # The least that reads, and that forks: less to compile, where depth is not what is tested.
    "shallow": dataclasses.replace(PLAIN, num_layers=1),
    "one rank": dataclasses.replace(PLAIN, **ONE_FORK, policy=PrefixRank(2.0)),
    "one threshold": dataclasses.replace(PLAIN, **ONE_FORK, policy=Threshold(2.0)),
}
LORA = memgen_tiny.LORA
MEMGEN = MemGenConfig(
    WeaverConfig(3, 2, lora=LORA), TriggerConfig("tokens", lora=LORA), max_inference_events=2
)
BOUNDARY = (np.arange(PLAIN.vocab_size) % 2 == 0).astype(np.uint8)


def language_model(model: str = "plain") -> LanguageModel:
    build = lambda: Thoughtbubbles(MODELS[model], rngs=nnx.Rngs(0))  # noqa: E731
    return LanguageModel(filled(nnx.eval_shape(build)), ByteTokenizer())


def filled(abstract: Any, seed: int = 0, scale: float = 0.25) -> Any:
    """All parameters random, so that each of them matters; made by NumPy: nothing to compile."""
    graphdef, state = nnx.split(abstract)
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        if "boundary" in name:
            return jnp.asarray(BOUNDARY)
        values = rng.normal(size=leaf.shape) * scale
        if "threshold" in name:
            values = np.full(leaf.shape, 0.3)
        elif "scale" in name or "gain" in name:
            values = 1 + values
        return jnp.asarray(values, leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, state))


@functools.cache
def finetunable(
    method: Any = "all",
    model: str = "shallow",
    seed: int = 0,
    memgen: MemGenConfig = MEMGEN,
    value_head: bool = False,
) -> FinetunableModel:
    """A policy, all of whose parameters matter."""
    build = lambda: FinetunableModel(  # noqa: E731
        Thoughtbubbles(MODELS[model], rngs=nnx.Rngs(0)),
        method,
        lora=LORA,
        memgen=memgen,
        boundary=BOUNDARY,
        rngs=nnx.Rngs(1),
        value_head=value_head,
    )
    return filled(nnx.eval_shape(build), seed)


def sampling(**changes: Any) -> Sampling:
    """At temperature 1 over all ids, a text ends with the separator."""
    how = Sampling(1.0, ByteTokenizer.vocab_size, (ByteTokenizer.separator,))
    return dataclasses.replace(how, **changes)


class Vowels:
    """A task of one response that even random weights meet sometimes: write a low byte first."""

    name = "vowels"
    sizes: Any = {"train": None, "test": None}

    def problem(self, split: str, index: int) -> Problem:
        return Problem(f"{split}{index}", f"{split} {index * 7919}:")

    def score(self, completion: Any) -> Reward:
        good = completion.tokens[0] < 128
        return Reward(float(good), good, {"first": float(completion.tokens[0])})


class Echo:
    """An environment that says how long an answer was, for some turns."""

    name = "echo"
    sizes: Any = {"train": None, "test": None}

    def problem(self, split: str, index: int) -> Problem:
        return Problem(f"{split}{index}", f"say {index}!", answer=1 + index % 3)

    def reset(self, problem: Problem) -> Any:
        return problem.answer

    def step(self, state: Any, action: Any) -> Turn:
        over = state == 1
        value = len(action.tokens) / 4
        return Turn(state - 1, f"<{len(action.tokens)}>", value, over, success=over)

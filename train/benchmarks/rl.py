"""What reinforcement learning costs: rollouts, updates, and prompts that many rows begin with."""

import dataclasses
import tempfile
import time

import numpy as np
from flax import nnx

from thoughtbubbles import ModelConfig, Thoughtbubbles
from train.benchmarks.memgen import interleaved
from train.data import ByteTokenizer
from train.models.load import LanguageModel
from train.rl.config import RLConfig
from train.rl.job import RLJob
from train.rl.rollout.sampler import Sampled, Sampler, row_keys
from train.rl.types import Completion, Problem, Reward, Split


@dataclasses.dataclass(frozen=True)
class RLBenchmark:
    """Random weights over bytes; few texts end before their last token.

    Attributes:
        prompts: tokens of a prompt; one measurement each.
        new_tokens: of a rollout.
        num_generations: of a prompt.
        problems: of a step.
        accumulate: parts of an update.
        repeats: of each measurement; the smallest time counts.
    """

    embed_dim: int = 128
    num_layers: int = 4
    num_heads: int = 2
    prompts: tuple[int, ...] = (224, 992)
    new_tokens: int = 32
    num_generations: int = 64
    problems: int = 1
    accumulate: int = 8
    repeats: int = 3

    def __post_init__(self):
        if min(self.repeats, self.new_tokens, self.problems) < 1 or min(self.prompts) < 2:
            raise ValueError("repeats, new_tokens and problems: 1 or more; prompts: 2 or more")


@dataclasses.dataclass(frozen=True)
class LongPrompts:
    """Random letters; a rollout is worth its share of low bytes.

    Attributes:
        length: tokens of a prompt, with the separator that it begins with.
    """

    length: int
    name: str = "long prompts"

    @property
    def sizes(self) -> dict[Split, int | None]:
        return {"train": None, "test": None}

    def problem(self, split: Split, index: int) -> Problem:
        rng = np.random.default_rng([split == "test", index])
        return Problem(
            f"{split}{index}", bytes(rng.integers(97, 123, self.length - 1).tolist()).decode()
        )

    def score(self, completion: Completion) -> Reward:
        low = float(np.mean([token < 128 for token in completion.tokens]))
        return Reward(low, low > 0.5)


def main(config: RLBenchmark) -> None:
    """Print where the time of a step goes, and what it saves that a prompt is read once."""
    print(
        f"d={config.embed_dim}, {config.num_layers} layers, {config.new_tokens} new tokens; "
        f"{config.problems} x {config.num_generations} rollouts a step, "
        f"{config.num_generations} of one prompt"
    )
    print("prompt  rollout tok/s  update tok/s  share of rollouts | prompt read once s  "
          "by each row s  times as fast")  # fmt: skip
    for length in config.prompts:
        with tempfile.TemporaryDirectory() as folder:
            work = reinforcing(config, length, folder)
            step = best_step(work, config.repeats)
            once = Reading(work, config, shared=True)
            each = Reading(work, config, shared=False)
            best = interleaved({"once": once, "each": each}, config.repeats)
        for mine, other in zip(once.found, each.found, strict=True):
            if mine.tokens.tolist() != other.tokens.tolist():
                raise RuntimeError("rows that share a prompt wrote other texts")
        rollout, update = step["rollout_seconds"], step["update_seconds"]
        print(
            f"{length:6} {step['tokens'] / rollout:14,.0f} {step['tokens'] / update:13,.0f} "
            f"{rollout / (rollout + update):18.0%} | {best['once']:18.2f} {best['each']:14.2f} "
            f"{best['each'] / best['once']:14.2f}",
            flush=True,
        )


def reinforcing(config: RLBenchmark, length: int, folder: str) -> RLJob:
    """GRPO on prompts of that many tokens."""
    model = ModelConfig(
        vocab_size=ByteTokenizer.vocab_size,
        embed_dim=config.embed_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
    )
    run = RLConfig(
        weights="random",
        train="all",
        task="long prompts",
        batch_size=config.problems,
        num_generations=config.num_generations,
        accumulate=config.accumulate,
        max_new_tokens=config.new_tokens,
        max_rows=config.problems * config.num_generations,
        out=folder,
    )
    lm = LanguageModel(Thoughtbubbles(model, rngs=nnx.Rngs(0)), ByteTokenizer())
    return RLJob(run, lm, LongPrompts(length))


def best_step(work: RLJob, repeats: int) -> dict[str, float]:
    """Tokens written in a step, and the smallest seconds of each half after a first one."""
    state, steps = work.first_state(), []
    for _ in range(repeats + 1):
        state, metrics, collected = work.step(state)
        steps.append(metrics | {"tokens": collected.written})
    steps = steps[1:]
    return {"tokens": float(np.mean([step["tokens"] for step in steps]))} | {
        name: min(step[name] for step in steps) for name in ("rollout_seconds", "update_seconds")
    }


class Reading:
    """All rollouts of one prompt, timed: it is read once for all, or by each row for itself."""

    def __init__(self, work: RLJob, config: RLBenchmark, shared: bool):
        self._sampler: Sampler = work.sampler(work.first_state().weights)
        problem = work.problems("test", 0, 1)[0]
        prompt, rows = work.lm.prompt(problem.prompt), config.num_generations
        self._prompts, self._source = [prompt] * rows, list(range(rows))
        if shared:
            self._prompts, self._source = [prompt], [0] * rows
        self._keys = row_keys((0,), [problem.uid] * rows, list(range(rows)))
        self._new_tokens = config.new_tokens
        self.found: list[Sampled] = []

    def __call__(self) -> float:
        start = time.perf_counter()
        conversation = self._sampler.open(self._prompts, self._source, self._keys, self._new_tokens)
        self.found = conversation.respond(self._new_tokens)
        return time.perf_counter() - start

"""Benchmark rollouts and updates of reinforcement learning, with and without prompt sharing."""

import dataclasses
import tempfile
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from train.benchmarks.models import ModelSizes, random_model
from train.benchmarks.timing import Clock, Cost, interleaved, ratio, timed
from train.data import ByteTokenizer
from train.models.load import LanguageModel
from train.rl.config import RLConfig
from train.rl.job import RLJob
from train.rl.rollout.sampler import Sampled, Sampler, row_keys
from train.rl.types import Completion, Problem, Reward, Split, Trajectory


@dataclasses.dataclass(frozen=True)
class RLBenchmark(ModelSizes):
    """Benchmark of GRPO on a byte-level model with random parameters, which seldom stops early.

    Attributes:
        prompts: Prompt lengths in tokens; one line is printed for each length.
        new_tokens: Maximum number of tokens of a rollout.
        problems: Number of prompts per step.
        num_generations: Number of rollouts per prompt.
        train: Parameters that are trained, "all" or a "lora" adapter.
        accumulate: Number of micro-batches that the rows of an update are divided into.
        repeats: Number of rounds of each measurement; the smallest time is reported.
    """

    embed_dim: int = 128
    num_layers: int = 4
    num_heads: int = 2
    prompts: tuple[int, ...] = (224, 992)
    new_tokens: int = 32
    problems: int = 1
    num_generations: int = 64
    train: Literal["all", "lora"] = "all"
    accumulate: int = 8
    repeats: int = 3

    def __post_init__(self):
        if min(self.repeats, self.new_tokens) < 1 or min(self.prompts) < 2:
            raise ValueError("repeats and new_tokens: 1 or more; prompts: 2 or more")
        if min(self.problems, self.num_generations) < 1:
            raise ValueError("problems and num_generations: 1 or more")


@dataclasses.dataclass(frozen=True)
class LongPrompts:
    """Task with random letters as prompts; the reward is a response's fraction of tokens below 128.

    Attributes:
        length: Number of tokens per prompt, including the separator at its beginning.
        name: Name of the task.
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
    """Print the times of rollouts and updates, and the time saved by computing a prompt once."""
    print(
        f"d={config.embed_dim}, {config.num_layers} layers, {config.train} trained, "
        f"{config.new_tokens} new tokens; {config.problems} x {config.num_generations} rollouts a "
        "step; seconds with a prompt computed once, and in each row"
    )
    print("prompt  rollout tok/s  update tok/s  share of rollouts | prefill once    each  times | "
          "update once    each  times  FLOPs  step, times")  # fmt: skip
    for length in config.prompts:
        with tempfile.TemporaryDirectory() as folder:
            job = make_job(config, length, folder)
            step = best_step(job, config.repeats)
            once = Rollouts(job, config, shared=True)
            each = Rollouts(job, config, shared=False)
            timing = interleaved({"once": once, "each": each}, config.repeats)
            updates = update_pair(job, make_job(config, length, folder, share_prompts=False))
            updating = interleaved(updates, config.repeats)
        for mine, other in zip(once.found, each.found, strict=True):
            if mine.tokens.tolist() != other.tokens.tolist():
                raise RuntimeError("rows that share a prompt wrote other texts")
        rollout, update = step["rollout_seconds"], step["update_seconds"]
        shared, whole = (updating[name].best.seconds for name in ("once", "each"))
        print(
            f"{length:6} {step['tokens'] / rollout:14,.0f} {step['tokens'] / update:13,.0f} "
            f"{rollout / (rollout + update):18.0%} | {timing['once'].best.seconds:12.2f} "
            f"{timing['each'].best.seconds:7.2f} "
            f"{ratio(timing['each'], timing['once']).best:6.2f} | {shared:12.2f} {whole:7.2f} "
            f"{whole / shared:6.2f} {updates['each'].flops / updates['once'].flops:6.2f} "
            f"{(rollout + whole) / (rollout + shared):12.2f}",
            flush=True,
        )


def make_job(config: RLBenchmark, length: int, folder: str, **options: Any) -> RLJob:
    """Make a GRPO job on prompts of `length` tokens.

    Args:
        config: Options of the benchmark.
        length: Number of tokens per prompt.
        folder: Folder of the run.
        options: Further fields of `RLConfig`.
    """
    model = random_model(config.model_config(ByteTokenizer.vocab_size))
    run = RLConfig(
        weights="random",
        train=config.train,
        task="long prompts",
        batch_size=config.problems,
        num_generations=config.num_generations,
        accumulate=config.accumulate,
        max_new_tokens=config.new_tokens,
        max_rows=config.problems * config.num_generations,
        out=folder,
        **options,
    )
    return RLJob(run, LanguageModel(model, ByteTokenizer()), LongPrompts(length))


def best_step(job: RLJob, repeats: int) -> dict[str, float]:
    """Time `repeats` steps of a job, after a first step that compiles and is not counted.

    Returns:
        Dict of "tokens", the mean number of generated tokens per step, and of the smallest
        "rollout_seconds" and "update_seconds" of a step.
    """
    state, steps = job.first_state(), []
    for _ in range(repeats + 1):
        state, metrics, collected = job.step(state)
        steps.append(metrics | {"tokens": collected.generated})
    steps = steps[1:]
    return {"tokens": float(np.mean([step["tokens"] for step in steps]))} | {
        name: min(step[name] for step in steps) for name in ("rollout_seconds", "update_seconds")
    }


def update_pair(job: RLJob, other: RLJob) -> dict[str, "Updates"]:
    """Make timed updates of two jobs on the same rollouts, under the names "once" and "each"."""
    trajectories = job.collect(job.first_state().variables).trajectories
    return {"once": Updates(job, trajectories), "each": Updates(other, trajectories)}


class Updates:
    """Timed update of a job, which can be repeated on the same rollouts.

    Attributes:
        flops: Number of FLOPs of an update as XLA counts them, with one iteration of each loop.
    """

    def __init__(self, job: RLJob, trajectories: Sequence[Trajectory]):
        self._learner, self._state = job.learner, job.first_state()
        self._rows = job.rows(trajectories, self._state.variables)
        self.flops = self._learner.update_flops(self._state, self._rows)

    def __call__(self) -> Cost:
        clock = Clock()
        self._state, _ = self._learner.update(
            self._state, self._rows, np.random.default_rng(0)
        )  # `update` waits for its metrics
        return clock.read()


class Rollouts:
    """Timed rollouts of one prompt, which is prefilled once if `shared`, else in each row."""

    def __init__(self, job: RLJob, config: RLBenchmark, shared: bool):
        self._sampler: Sampler = job.sampler(job.first_state().variables)
        problem = job.collector.problems("test", 0, 1)[0]
        prompt, rows = job.lm.prompt(problem.prompt), config.num_generations
        self._prompts, self._source = [prompt] * rows, list(range(rows))
        if shared:
            self._prompts, self._source = [prompt], [0] * rows
        self._keys = row_keys((0,), [problem.uid] * rows, list(range(rows)))
        self._new_tokens = config.new_tokens
        self.found: list[Sampled] = []

    def __call__(self) -> Cost:
        return timed(self._sample)

    def _sample(self) -> None:
        conversation = self._sampler.open(self._prompts, self._source, self._keys, self._new_tokens)
        self.found = conversation.respond(self._new_tokens)

"""Collector, which takes the next problems of a task and collects rollouts of these problems."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.rl.config import RLConfig
from train.rl.rollout.budgets import BudgetAllocator, budget_metrics
from train.rl.rollout.formatter import PromptFormatter
from train.rl.rollout.sampler import Sampler
from train.rl.rollout.strategies import OneResponse, RolloutStrategy, Turns
from train.rl.step_metrics import mixed_groups
from train.rl.types import Collected, Episodes, Problem, Split, Trajectory

_FINGERPRINTED = 32  # number of problems of an endless split that a fingerprint hashes
_ENDLESS = 256  # number of held-out problems of an endless split if the config sets none

_ENDLESS_SKIPS = 10_000  # maximum number of problems of an endless task skipped in a row


class Collector:
    """Collects the rollouts of each step; its position in the task is part of a checkpoint.

    Args:
        config: Config of the run.
        task: Task or environment.
        strategy: Rollout strategy of this run (`strategy_for`).
        allocator: Budget allocator of this run.

    Raises:
        ValueError: The allocator needs problems that repeat, but the task is endless and the config
            has no `pool`.
    """

    def __init__(
        self, config: RLConfig, task: Any, strategy: RolloutStrategy, allocator: BudgetAllocator
    ):
        if allocator.needs_repeats and task.sizes["train"] is None and config.pool is None:
            raise ValueError(
                f"allocator {allocator.word} learns from problems that come again, those of "
                f"{task.name} never do: set pool (--pool), or choose another allocator"
            )
        self._config, self._task = config, task
        self.strategy, self.allocator = strategy, allocator
        self.position = 0  # number of problems drawn so far

    @property
    def state(self) -> dict[str, Any]:
        """Dict of `position`, `allocator` and `strategy`, JSON-serialisable, for checkpoints.

        `position` is the number of problems taken so far; `allocator` and `strategy` are the
        `state` of the allocator and of the strategy.
        """
        return {
            "position": self.position,
            "allocator": self.allocator.state,
            "strategy": self.strategy.state,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the `state` that a checkpoint has stored."""
        self.position = state["position"]
        self.allocator.restore(state["allocator"])
        self.strategy.restore(state["strategy"])

    def problems(self, split: Split, start: int, count: int) -> list[Problem]:
        """Return `count` problems from position `start` on.

        The problems of a finite split, or of the training pool, are shuffled anew in each epoch.

        Raises:
            ValueError: The split has no problems.
        """
        size = self._epoch_size if split == "train" else self._task.sizes[split]
        if size is None:
            return [self._task.problem(split, start + offset) for offset in range(count)]
        if size < 1:
            raise ValueError(
                f"{self._task.name} has {size} problems of the split {split!r}: give it 1 or more"
            )
        found = []
        for position in range(start, start + count):
            epoch, index = divmod(position, size)
            order = _order(self._config.seed, epoch, size)
            found.append(self._task.problem(split, int(order[index])))
        return found

    def collect(self, sampler: Sampler) -> Collected:
        """Collect the rollouts of one step, and advance the position.

        If the method filters groups (dynamic sampling), the collector draws batches of problems
        until `batch_size` groups have mixed outcomes, but at most `max_batches` batches.

        Raises:
            ValueError: The allocator's plan is invalid, or the strategy sets all problems aside.
        """
        config = self._config
        filtering = config.recipe.filter_groups
        kept: list[Trajectory] = []
        drawn: list[Trajectory] = []
        classes: list[str] = []
        planned: list[int] = []
        groups = found = 0
        before = sampler.generated
        for _ in range(config.max_batches if filtering else 1):
            start = self.position
            problems = self._draw(config.batch_size)
            uids = [problem.uid for problem in problems]
            counts = self._plan(uids)
            classes += self.allocator.classes(uids)
            planned += counts
            rows = self.strategy.collect(
                sampler, self._task, problems, counts, (config.seed, start)
            )
            self._observe(problems, rows)
            rows = [row for row in rows if row.source != "probe"]
            rows = [dataclasses.replace(row, group=groups + row.group) for row in rows]
            groups += len(problems)
            drawn += rows
            usable = mixed_groups(rows) if filtering else list(range(groups))
            usable = usable[: config.batch_size - found]
            found += len(usable)
            chosen = set(usable)
            kept += [row for row in rows if row.group in chosen]
            if found >= config.batch_size:
                break
        budget = budget_metrics(classes, planned) | self.strategy.metrics()
        return Collected(kept, drawn, groups, found, budget, sampler.generated - before)

    def _draw(self, count: int) -> list[Problem]:
        """Take the next problems that the strategy has not set aside, and advance the position.

        A problem is taken twice only if too few other problems are left. If all problems are set
        aside, the strategy is asked to take them back (`requeue`).

        Raises:
            ValueError: The strategy still sets all problems aside after `requeue`.
        """
        found: list[Problem] = []
        # Each epoch has a new order: up to 2 * epoch - 2 problems lie between two visits of one.
        passed, most = 0, _ENDLESS_SKIPS if self._epoch_size is None else 2 * self._epoch_size - 1
        while len(found) < count:
            [problem] = self.problems("train", self.position, 1)
            self.position += 1
            if not self.strategy.sets_aside(problem.uid):
                found.append(problem)
                passed = 0
                continue
            passed += 1
            if passed == most:
                self.strategy.requeue()
            if passed == 2 * most:
                raise ValueError(
                    f"strategy {self.strategy.word} has set aside {passed} problems of "
                    f"{self._task.name} one after the other and takes none back: end the run, or "
                    "choose a larger pool"
                )
        return found

    @property
    def _epoch_size(self) -> int | None:
        """Number of training problems in an epoch; None for an endless split without a pool."""
        size, pool = self._task.sizes["train"], self._config.pool
        return size if pool is None else pool if size is None else min(size, pool)

    def held_out(self, sampler: Sampler) -> list[Trajectory]:
        """Make one rollout of each of the first `evaluation.rows` problems of the test split.

        If `evaluation.rows` is 0, all test problems are used, or 256 of an endless split. The
        rollouts do not change the strategy's state, so training learns nothing from held-out
        problems.
        """
        size, rows = self._task.sizes["test"], self._config.evaluation.rows
        count = min(rows or size or _ENDLESS, size or rows or _ENDLESS)
        problems = self.problems("test", 0, count)
        strategy = self.strategy.for_held_out
        return strategy.collect(sampler, self._task, problems, [1] * count, (self._config.seed, 1))

    def _plan(self, uids: list[str]) -> list[int]:
        total = self._config.rollouts
        counts = self.allocator.plan(uids, total)
        if len(counts) != len(uids) or min(counts) < 0 or sum(counts) != total:
            raise ValueError(
                f"{type(self.allocator).__name__}.plan gave {sum(counts)} rollouts to "
                f"{len(counts)} problems, the budget is {total} for {len(uids)}: plan all of it, "
                "none below 0"
            )
        return list(counts)

    def _observe(self, problems: Sequence[Problem], rows: Sequence[Trajectory]) -> None:
        episodes = Episodes.from_trajectories(rows)
        # Searched and replayed rollouts are biased estimates of the success rate.
        direct = np.array(
            [rows[turns[0]].source in ("direct", "probe") for turns in episodes.rows], bool
        )
        for group, problem in enumerate(problems):
            successes = episodes.success[(episodes.group == group) & direct]
            self.allocator.observe(problem.uid, successes.tolist())


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the order of the problems in an epoch, `[size]` int."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def strategy_for(config: RLConfig, task: Any, formatter: PromptFormatter) -> RolloutStrategy:
    """Return the rollout strategy of one run, bound to its task.

    The strategy is taken from the config. If the config has none, it is `Turns` for an environment
    and `OneResponse` for a task of one response.

    Args:
        config: Config of the run.
        task: Task or environment.
        formatter: Formatter that translates texts to token ids.

    Raises:
        ValueError: The strategy, one of its options or a reward shaping does not fit the task.
    """
    episodic = hasattr(task, "step")
    strategy = config.parts.strategy or (Turns() if episodic else OneResponse())
    if strategy.episodic not in (None, episodic):
        kind, word = ("an environment", "turns") if episodic else ("a task", "one_response")
        raise ValueError(
            f"strategy {strategy.word} does not fit {task.name}, which is {kind}: leave strategy "
            f"out, or choose one such as {word}"
        )
    for shaping in config.parts.reward:
        if shaping.one_response and episodic:
            raise ValueError(
                f"reward {shaping.word} is for tasks of one response, {task.name} has turns: "
                "leave it out"
            )
    return strategy.for_run(formatter, config).for_task(task)


def fingerprint(task: Any) -> str:
    """Return the name of a task and a hash of its problems, which a resumed run compares.

    Only the first 32 problems of an endless split are hashed.
    """
    found = hashlib.blake2b(digest_size=8)
    for split in ("train", "test"):
        size = task.sizes[split]
        for index in range(_FINGERPRINTED if size is None else size):
            problem = task.problem(split, index)
            found.update(f"{problem.prompt}\0{problem.answer}\0".encode())
    for uid in sorted(getattr(task, "unsolved", ())):  # from a probe: these change rewards
        found.update(f"{uid}\0".encode())
    return f"{task.name} {found.hexdigest()}"

"""Budget allocators by name, which decide how many rollouts each problem of a step gets."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from thoughtbubbles.registry import Registry
from train.rl.rollout import knapsack


@dataclasses.dataclass(frozen=True)
class BudgetAllocator:
    """Base of all budget allocators, which decide the number of rollouts of each problem.

    A subclass is a frozen dataclass with a `word`, options as fields, and `plan`. Register it as
    `ALLOCATORS[word]` to make it available to `--allocator`. State that an allocator learns belongs
    in a field that is not an option,
    `field(default_factory=dict, init=False, repr=False, compare=False)`, and must be part of
    `state` and `restore`. Each run has its own copy.
    """

    word: ClassVar[str]
    """Name of the allocator on the command line and in configs."""

    needs_repeats: ClassVar[bool] = False
    """Whether problems must repeat. If so, an endless task without `RLConfig.pool` is refused."""

    def check(self, config: Any) -> None:
        """Raise a `ValueError` if this allocator does not fit the config of a run (`RLConfig`)."""

    def plan(self, uids: Sequence[str], total: int) -> list[int]:
        """Distribute the rollouts of a step among its problems.

        Args:
            uids: `Problem.uid` of each group.
            total: Number of rollouts of the step.

        Returns:
            The number of rollouts of each problem, 0 or more, whose sum is `total`.
        """
        raise NotImplementedError(f"{type(self).__name__} plans no rollouts")

    def observe(self, uid: str, successes: Sequence[bool]) -> None:
        """Learn from the outcomes of a problem's rollouts in a step.

        Args:
            uid: Name of the problem (`Problem.uid`).
            successes: Success of each rollout that was sampled directly from the policy.
        """

    def classes(self, uids: Sequence[str]) -> list[str]:
        """Classify each problem by what is known before the step, for metrics and figures.

        Returns:
            The class of each problem, or an empty list if this allocator has no classes. With
            classes, a step's metrics have the mean number of rollouts per problem of each class,
            `budget/CLASS`, and the maximum number of rollouts of a problem, `budget/most`.
        """
        return []

    @property
    def state(self) -> Any:
        """JSON-serialisable state for checkpoints, learned by `observe`; None without a state."""
        return None

    def restore(self, state: Any) -> None:
        """Restore the `state` that a checkpoint has stored."""


@dataclasses.dataclass(frozen=True)
class Uniform(BudgetAllocator):
    """Allocator of equal shares: all problems get the same number, the first may get one more."""

    word: ClassVar[str] = "uniform"

    def plan(self, uids: Sequence[str], total: int) -> list[int]:
        each, left = divmod(total, len(uids))
        return [each + (index < left) for index in range(len(uids))]


NEWEST = 16
"""Number of newest rollouts that estimate a success rate if the last visit had fewer."""

ENOUGH = 8
"""Minimum number of rollouts of a problem with which its success rate counts as known."""

_QUARTERS = ("below_25", "below_50", "below_75", "below_100")


@dataclasses.dataclass(frozen=True)
class Knapsack(BudgetAllocator):
    """Allocator that favours problems whose rollouts probably have mixed outcomes (Knapsack RL).

    It maximises sum_i (1 - p_i^N_i - (1-p_i)^N_i) p_i (1-p_i)^2 exactly, where p_i is the success
    rate and N_i the number of rollouts of problem i, with the fallback of
    `train.rl.rollout.knapsack.plan`. The success rate is estimated from the problem's last visit,
    or from its 16 newest rollouts if that visit had fewer. The rate counts as known after 8
    rollouts; until then the problem gets as many rollouts as with `uniform`. Problems must
    therefore repeat: an endless task without a pool (`RLConfig.pool`) is refused.

    Attributes:
        low: Minimum number of rollouts of a problem whose success rate is known, 2 or more.
        high: Maximum number of rollouts of a problem (N_up).

    Raises:
        ValueError: `low` is below 2, or `high` is below `low`.
    """

    word: ClassVar[str] = "knapsack"
    needs_repeats: ClassVar[bool] = True

    low: int = 2
    high: int = 128
    _outcomes: dict[str, str] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self):
        if self.low < 2:
            raise ValueError(
                f"low={self.low}: choose 2 or more, as a lone rollout is compared with nothing"
            )
        if self.high < self.low:
            raise ValueError(f"high={self.high} is less than low={self.low}: choose it larger")

    def check(self, config: Any) -> None:
        self._check_share(config.num_generations, config.num_generations)

    def _check_share(self, least: int, most: int) -> None:
        if not self.low <= least <= most <= self.high:
            raise ValueError(
                f"num_generations={least if least < self.low else most}: knapsack gives a problem "
                f"from low={self.low} to high={self.high} rollouts: choose an average between them"
            )

    def plan(self, uids: Sequence[str], total: int) -> list[int]:
        shares = Uniform().plan(uids, total)
        self._check_share(min(shares), max(shares))
        return knapsack.plan([self.rate(uid) for uid in uids], shares, self.low, self.high)

    def observe(self, uid: str, successes: Sequence[bool]) -> None:
        visit = "".join("01"[bool(success)] for success in successes)
        newest = max(len(visit), NEWEST)
        self._outcomes[uid] = (self._outcomes.get(uid, "") + visit)[-newest:]

    def rate(self, uid: str) -> float | None:
        """Return the estimated success rate of a problem; None with fewer than 8 rollouts."""
        outcomes = self._outcomes.get(uid, "")
        return outcomes.count("1") / len(outcomes) if len(outcomes) >= ENOUGH else None

    def classes(self, uids: Sequence[str]) -> list[str]:
        return [_class_of(self.rate(uid)) for uid in uids]

    @property
    def state(self) -> dict[str, str]:
        """Mapping from problem uid to outcomes, oldest first: "1" is a success, "0" a failure."""
        return dict(self._outcomes)

    def restore(self, state: Mapping[str, str]) -> None:
        self._outcomes.clear()
        self._outcomes.update(state)


def _class_of(rate: float | None) -> str:
    """Name the class of a success rate: "unknown", "never", "always", or its quarter."""
    if rate is None:
        return "unknown"
    if rate in (0, 1):
        return "always" if rate else "never"
    return _QUARTERS[int(4 * rate)]


def budget_metrics(classes: Sequence[str], counts: Sequence[int]) -> dict[str, float]:
    """Compute metrics of the allocation of rollouts.

    Args:
        classes: Class of each problem (`BudgetAllocator.classes`), or an empty list.
        counts: Number of rollouts of each problem.

    Returns:
        A dict of `budget/CLASS`, the mean number of rollouts per problem of each class, and
        `budget/most`, the maximum number of rollouts of a problem; empty without classes.
    """
    if not classes:
        return {}
    of_class: dict[str, list[int]] = {}
    for name, count in zip(classes, counts, strict=True):
        of_class.setdefault(name, []).append(count)
    means = {f"budget/{name}": float(np.mean(some)) for name, some in sorted(of_class.items())}
    return means | {"budget/most": max(counts)}


ALLOCATORS = Registry[BudgetAllocator](
    "allocator", {allocator.word: allocator for allocator in (Uniform, Knapsack)}
)

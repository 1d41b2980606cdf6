"""Budget allocators by name: how many rollouts each problem of a step gets."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from train.rl.rollout import knapsack


@dataclasses.dataclass(frozen=True)
class BudgetAllocator:
    """Base of all allocators.

    A new one is a frozen dataclass with a `word`, options as fields, and `plan`.
    `ALLOCATORS[word]` makes it known to `--allocator`. What it learns of problems stands in a field
    that is no option, `field(default_factory=dict, init=False, repr=False, compare=False)`, and is
    saved by `state` and `restore`; each run has a copy of its own.
    """

    word: ClassVar[str]
    """Name of the allocator on the command line and in configs."""

    needs_repeats: ClassVar[bool] = False
    """Whether problems have to come again: an endless task without `RLConfig.pool` is refused."""

    def check(self, config: Any) -> None:
        """Raise a `ValueError` for a run (`RLConfig`) that this allocator does not fit."""

    def plan(self, uids: Sequence[str], total: int) -> list[int]:
        """Number of rollouts of each problem, `total` together and none below 0.

        Args:
            uids: Problem of each group, by `Problem.uid`.
            total: Number of rollouts of the step.
        """
        raise NotImplementedError(f"{type(self).__name__} plans no rollouts")

    def observe(self, uid: str, successes: Sequence[bool]) -> None:
        """Take note of the outcomes of all rollouts of a problem."""

    def classes(self, uids: Sequence[str]) -> list[str]:
        """Class of each problem by what is known of it before the step, for metrics and figures.

        None are told apart where the list is empty. Otherwise a step's metrics have the mean number
        of rollouts of the problems of each class, `budget/CLASS`, and the largest of a problem,
        `budget/most`.
        """
        return []

    @property
    def state(self) -> Any:
        """What `observe` has learned, as JSON for checkpoints."""
        return None

    def restore(self, state: Any) -> None:
        """Continue from the `state` of a checkpoint."""


@dataclasses.dataclass(frozen=True)
class Uniform(BudgetAllocator):
    """The same number of rollouts for each problem; the first ones get the remainder."""

    word: ClassVar[str] = "uniform"

    def plan(self, uids: Sequence[str], total: int) -> list[int]:
        each, left = divmod(total, len(uids))
        return [each + (index < left) for index in range(len(uids))]


NEWEST = 16
"""Number of newest rollouts of a problem that its success rate is estimated from, at least."""

ENOUGH = 8
"""Number of rollouts of a problem from which on its success rate counts as known."""

_QUARTERS = ("below_25", "below_50", "below_75", "below_100")


@dataclasses.dataclass(frozen=True)
class Knapsack(BudgetAllocator):
    """Rollouts where a mixed group is likely and worth most, by success rates so far (Knapsack RL).

    Maximises sum_i (1 - p_i^N_i - (1-p_i)^N_i) p_i (1-p_i)^2 exactly, with the fallback of
    `train.rl.rollout.knapsack.plan`. The success rate of a problem is that of its last visit, or of
    its 16 newest rollouts where that visit had fewer, and is known from 8 rollouts on; until then
    the problem gets as many as all would get evenly. So problems have to come again: an endless
    task without a pool (`RLConfig.pool`) is refused.

    Attributes:
        low: Least number of rollouts of a problem whose success rate is known, 2 or more.
        high: Greatest number of rollouts of a problem (N_up).
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
        """Estimated success rate of a problem; None while it is not known."""
        outcomes = self._outcomes.get(uid, "")
        return outcomes.count("1") / len(outcomes) if len(outcomes) >= ENOUGH else None

    def classes(self, uids: Sequence[str]) -> list[str]:
        return [_class_of(self.rate(uid)) for uid in uids]

    @property
    def state(self) -> dict[str, str]:
        """Outcomes of each problem, oldest first: "1" a success, "0" a failure."""
        return dict(self._outcomes)

    def restore(self, state: Mapping[str, str]) -> None:
        self._outcomes.clear()
        self._outcomes.update(state)


def _class_of(rate: float | None) -> str:
    """Class of a success rate: unknown, never, always, or the quarter that it is in."""
    if rate is None:
        return "unknown"
    if rate in (0, 1):
        return "always" if rate else "never"
    return _QUARTERS[int(4 * rate)]


def budget_metrics(classes: Sequence[str], counts: Sequence[int]) -> dict[str, float]:
    """Mean number of rollouts of the problems of each class, and the largest of a problem.

    Args:
        classes: Class of each problem (`BudgetAllocator.classes`), or none.
        counts: Number of rollouts of each problem.
    """
    if not classes:
        return {}
    of_class: dict[str, list[int]] = {}
    for name, count in zip(classes, counts, strict=True):
        of_class.setdefault(name, []).append(count)
    means = {f"budget/{name}": float(np.mean(some)) for name, some in sorted(of_class.items())}
    return means | {"budget/most": max(counts)}


ALLOCATORS: dict[str, type[BudgetAllocator]] = {
    allocator.word: allocator for allocator in (Uniform, Knapsack)
}

"""Budget allocators by name: how many rollouts each problem of a step gets."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar


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

    def plan(self, uids: Sequence[str], total: int) -> list[int]:
        """Number of rollouts of each problem, `total` together and none below 0.

        Args:
            uids: Problem of each group, by `Problem.uid`.
            total: Number of rollouts of the step.
        """
        raise NotImplementedError(f"{type(self).__name__} plans no rollouts")

    def observe(self, uid: str, successes: Sequence[bool]) -> None:
        """Take note of the outcomes of all rollouts of a problem."""

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


ALLOCATORS: dict[str, type[BudgetAllocator]] = {Uniform.word: Uniform}

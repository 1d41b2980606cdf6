"""Knapsack RL: rollouts allocated by an exact knapsack (arXiv 2509.25849)."""

import dataclasses
from typing import ClassVar

from train.rl.learning.losses import Aggregate
from train.rl.methods.grpo import GRPO
from train.rl.rollout.budgets import BudgetAllocator, Knapsack


@dataclasses.dataclass(frozen=True)
class KnapsackGRPO(GRPO):
    """GRPO whose rollouts go to the problems that a mixed group is likely of and worth most.

    A large group with one success gives it an advantage of about the square root of the group's
    size, hence the bound on advantages.

    Attributes:
        low: Least number of rollouts of a problem whose success rate is known, 2 or more.
        high: Greatest number of rollouts of a problem (N_up).
    """

    word: ClassVar[str] = "knapsack"

    clip_high: float = 0.28
    dual_clip: float | None = 10.0
    aggregate: Aggregate = "token"
    advantage_clip: float | None = 5.0
    low: int = 2
    high: int = 128

    def __post_init__(self):
        super().__post_init__()
        _ = self.allocator  # which checks the options that are its own

    @property
    def allocator(self) -> BudgetAllocator:
        return Knapsack(self.low, self.high)

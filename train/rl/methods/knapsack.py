"""Knapsack RL: rollouts allocated by an exact knapsack (arXiv 2509.25849)."""

import dataclasses
from typing import ClassVar

from train.rl.learning.losses import Aggregate
from train.rl.methods.grpo import GRPO
from train.rl.rollout.budgets import BudgetAllocator, Knapsack


@dataclasses.dataclass(frozen=True)
class KnapsackGRPO(GRPO):
    """GRPO whose rollouts are allocated to problems by the expected value of their groups.

    A knapsack maximises the sum over problems of the probability of a mixed group, in which both
    successes and failures occur, times the value of such a group. The only success of a large group
    has an advantage of about the square root of the group's size; advantages are therefore clipped
    by `advantage_clip`.

    Attributes:
        low: Minimum number of rollouts of a problem whose success rate is known, 2 or more.
        high: Maximum number of rollouts of a problem (N_up).
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
        _ = self.allocator  # the allocator checks its options

    @property
    def allocator(self) -> BudgetAllocator:
        return Knapsack(self.low, self.high)

"""RLOO: REINFORCE with a leave-one-out baseline (arXiv 2402.14740)."""

import dataclasses
from typing import ClassVar

from train.rl.learning.estimators import Advantage, LeaveOneOut
from train.rl.methods.method import Method


@dataclasses.dataclass(frozen=True)
class RLOO(Method):
    """Deviation from the mean of the other rollouts of the group; clipped surrogate."""

    word: ClassVar[str] = "rloo"

    @property
    def advantage(self) -> Advantage:
        return LeaveOneOut()

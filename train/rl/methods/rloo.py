"""RLOO: REINFORCE with a leave-one-out baseline (arXiv 2402.14740)."""

import dataclasses
from typing import ClassVar

from train.rl.learning.estimators import Advantage, LeaveOneOut
from train.rl.methods.method import Method


@dataclasses.dataclass(frozen=True)
class RLOO(Method):
    """Advantages that are rewards minus the mean of the group's other rewards; clipped loss."""

    word: ClassVar[str] = "rloo"

    @property
    def advantage(self) -> Advantage:
        return LeaveOneOut()

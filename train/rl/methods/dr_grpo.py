"""Dr. GRPO: GRPO done right (arXiv 2503.20783)."""

import dataclasses
from typing import ClassVar

from train.rl.learning.estimators import Advantage, GroupCentered
from train.rl.learning.losses import Aggregate
from train.rl.methods.method import Method


@dataclasses.dataclass(frozen=True)
class DrGRPO(Method):
    """Deviation from the mean of the group, and tokens summed over a constant length.

    Without the standard deviation easy and hard problems weigh alike; without the row's own length
    wrong answers gain nothing by being long.
    """

    word: ClassVar[str] = "dr_grpo"

    aggregate: Aggregate = "constant"

    @property
    def advantage(self) -> Advantage:
        return GroupCentered()

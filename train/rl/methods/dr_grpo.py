"""Dr. GRPO: GRPO done right (arXiv 2503.20783)."""

import dataclasses
from typing import ClassVar

from train.rl.learning.estimators import Advantage, GroupCentered
from train.rl.learning.losses import Aggregate
from train.rl.methods.method import Method


@dataclasses.dataclass(frozen=True)
class DrGRPO(Method):
    """Deviation from the mean of the group, and losses of tokens divided by a constant length.

    Advantages are not divided by the standard deviation, which would give more weight to problems
    that are very easy or very hard. Losses are not divided by the length of the row, which would
    weaken the penalty of long wrong answers.
    """

    word: ClassVar[str] = "dr_grpo"

    aggregate: Aggregate = "constant"

    @property
    def advantage(self) -> Advantage:
        return GroupCentered()

"""Dr. GRPO: GRPO done right (arXiv 2503.20783)."""

import dataclasses
from typing import ClassVar

from train.rl.learning.estimators import Advantage, GroupCentered
from train.rl.learning.losses import Aggregate
from train.rl.methods.method import Method


@dataclasses.dataclass(frozen=True)
class DrGRPO(Method):
    """Advantages that are rewards minus group means; token losses divided by a constant length.

    Dividing advantages by the standard deviation, as GRPO does, would give more weight to problems
    that are very easy or very hard. Dividing losses by the length of the row would weaken the
    penalty of long wrong answers.
    """

    word: ClassVar[str] = "dr_grpo"

    aggregate: Aggregate = "constant"

    @property
    def advantage(self) -> Advantage:
        return GroupCentered()

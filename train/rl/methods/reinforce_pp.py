"""REINFORCE++ with a baseline (arXiv 2501.03262)."""

import dataclasses
from typing import ClassVar

from train.rl.learning.estimators import Advantage, BatchNormalized
from train.rl.learning.losses import Aggregate
from train.rl.methods.method import Method


@dataclasses.dataclass(frozen=True)
class ReinforcePP(Method):
    """Deviation from the mean of the group, divided by its standard deviation in the batch.

    The method also has a wider clipping range above, a mean over all tokens, and dynamic sampling.
    """

    word: ClassVar[str] = "reinforce_pp"

    clip_high: float = 0.28
    aggregate: Aggregate = "token"
    filter_groups: bool = True

    @property
    def advantage(self) -> Advantage:
        return BatchNormalized()

"""REINFORCE++ with a baseline (arXiv 2501.03262)."""

import dataclasses
from typing import ClassVar

from train.rl.learning.estimators import Advantage, BatchNormalized
from train.rl.learning.losses import Aggregate
from train.rl.methods.method import Method


@dataclasses.dataclass(frozen=True)
class ReinforcePP(Method):
    """Advantages that are rewards minus the group's mean, over their std in the whole batch.

    The method also has a wider clipping range above, a mean over all tokens, and dynamic sampling.
    """

    word: ClassVar[str] = "reinforce_pp"

    clip_high: float = 0.28
    aggregate: Aggregate = "token"
    filter_groups: bool = True

    @property
    def advantage(self) -> Advantage:
        return BatchNormalized()

"""ReBN: return batch normalization for environments of several turns (GEM, arXiv 2510.01051)."""

import dataclasses
from typing import ClassVar

from train.rl.learning.estimators import Advantage, ReturnBatchNormalized
from train.rl.learning.losses import Aggregate
from train.rl.methods.method import Method


@dataclasses.dataclass(frozen=True)
class ReBN(Method):
    """Advantages that are discounted returns of turns, normalised over all turns of the batch.

    Attributes:
        gamma: Discount of the rewards of later turns (γ), above 0 and at most 1.
    """

    word: ClassVar[str] = "rebn"

    aggregate: Aggregate = "constant"
    gamma: float = 1.0

    @property
    def advantage(self) -> Advantage:
        return ReturnBatchNormalized(self.gamma)

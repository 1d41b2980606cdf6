"""Dr. GRPO: GRPO done right (arXiv 2503.20783)."""

import dataclasses
from typing import ClassVar

import numpy as np

from train.rl.learning import advantages
from train.rl.learning.losses import Aggregate
from train.rl.methods.method import Method


@dataclasses.dataclass(frozen=True)
class DrGRPO(Method):
    """Advantage: deviation from the mean of the group; tokens are summed over a constant length.

    Without the standard deviation easy and hard problems weigh alike, without the row's own length
    wrong answers gain nothing by being long.
    """

    word: ClassVar[str] = "dr_grpo"

    aggregate: Aggregate = "constant"

    def estimate(self, reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return advantages.dr_grpo(reward, group, valid)

"""REINFORCE++ with a baseline (arXiv 2501.03262)."""

import dataclasses
from typing import ClassVar

import numpy as np

from train.rl.learning import advantages
from train.rl.learning.losses import Aggregate
from train.rl.methods.method import Method


@dataclasses.dataclass(frozen=True)
class ReinforcePP(Method):
    """Advantage: deviation from the mean of the group over the standard deviation of the batch."""

    word: ClassVar[str] = "reinforce_pp"

    clip_high: float = 0.28
    aggregate: Aggregate = "token"
    filter_groups: bool = True

    def estimate(self, reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return advantages.reinforce_pp_baseline(reward, group, valid)

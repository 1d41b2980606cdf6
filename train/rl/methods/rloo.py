"""RLOO: REINFORCE with a leave-one-out baseline (arXiv 2402.14740)."""

import dataclasses
from typing import ClassVar

import numpy as np

from train.rl.learning import advantages
from train.rl.methods.method import Method


@dataclasses.dataclass(frozen=True)
class RLOO(Method):
    """Advantage: deviation from the mean of the other rollouts of the group."""

    word: ClassVar[str] = "rloo"

    def estimate(self, reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return advantages.rloo(reward, group, valid)

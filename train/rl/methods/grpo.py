"""GRPO: group relative policy optimization (arXiv 2402.03300)."""

import dataclasses
from typing import ClassVar

import numpy as np

from train.rl.learning import advantages
from train.rl.methods.method import Method


@dataclasses.dataclass(frozen=True)
class GRPO(Method):
    """Advantage: deviation from the mean of the group over its standard deviation."""

    word: ClassVar[str] = "grpo"

    def estimate(self, reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return advantages.grpo(reward, group, valid)

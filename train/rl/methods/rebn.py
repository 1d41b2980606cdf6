"""ReBN: return batch normalization for environments of several turns (GEM, arXiv 2510.01051)."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from train.rl.learning.credit import Episodes, turn_advantages
from train.rl.learning.losses import Aggregate
from train.rl.methods.method import Method
from train.rl.types import Trajectory


@dataclasses.dataclass(frozen=True)
class ReBN(Method):
    """Advantage of a turn: its discounted return, normalised over all turns of the batch.

    Attributes:
        gamma: Discount of the rewards of later turns (γ), above 0 and at most 1.
    """

    word: ClassVar[str] = "rebn"
    compares: ClassVar[bool] = False
    by_turn: ClassVar[bool] = True

    aggregate: Aggregate = "constant"
    gamma: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}: choose more than 0 and at most 1")

    def advantages(
        self, trajectories: Sequence[Trajectory], episodes: Episodes, reward: np.ndarray
    ) -> list[np.ndarray]:
        return turn_advantages(trajectories, episodes, self.gamma)

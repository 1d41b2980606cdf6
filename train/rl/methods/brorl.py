"""BroRL: many rollouts of each problem in place of more steps (arXiv 2510.01180)."""

import dataclasses
from typing import ClassVar

from train.rl.methods.reinforce_pp import ReinforcePP

FEW = 16
"""Rollouts of a problem that a learning rate is usually chosen for (ProRL)."""


@dataclasses.dataclass(frozen=True)
class BroRL(ReinforcePP):
    """Up to 512 rollouts of a problem, as many optimizer steps as with few (ProRL's recipe).

    Deviation from the mean of the group, whitened over the batch after dynamic sampling; a wider
    clipping range above, truncated importance weights, and a KL penalty whose reference policy is
    reset. The run's `minibatches` stays what it is with few rollouts, so each holds more of them,
    and the learning rate grows by the square root of the number of rollouts. The paper prints
    neither clipping range nor KL weight nor the period of the reset: these are ProRL's or ours.

    Attributes:
        base_rollouts: Number of rollouts of a step that the learning rate was chosen for, by whose
            ratio to those of this run it is scaled; None for 16 of each problem.
    """

    word: ClassVar[str] = "brorl"

    clip_high: float = 0.4
    kl: float = 0.0001
    importance_cap: float | None = 2.0
    reference_reset: int | None = 200
    num_generations: int | None = 512
    base_rollouts: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.base_rollouts is not None and self.base_rollouts < 1:
            raise ValueError(f"base_rollouts={self.base_rollouts}: choose 1 or more, or None")

    def rate_scale(self, batch_size: int, num_generations: int) -> float:
        base = batch_size * FEW if self.base_rollouts is None else self.base_rollouts
        return (batch_size * num_generations / base) ** 0.5

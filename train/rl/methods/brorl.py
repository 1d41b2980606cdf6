"""BroRL: many rollouts of each problem in place of more steps (arXiv 2510.01180)."""

import dataclasses
from typing import ClassVar

from train.rl.methods.reinforce_pp import ReinforcePP

FEW = 16
"""Number of rollouts of a problem for which a learning rate is usually chosen (ProRL)."""


@dataclasses.dataclass(frozen=True)
class BroRL(ReinforcePP):
    """REINFORCE++ with many rollouts of each problem (512) and ProRL's recipe (BroRL).

    The advantage is the reward minus the group's mean, divided by the standard deviation of these
    differences in the batch after dynamic sampling. ProRL's recipe adds a wider clipping range
    above, truncated importance weights, and a KL penalty whose reference policy is reset. The
    number of optimizer steps does not depend on the number of rollouts: with the same
    `minibatches`, each minibatch holds more rollouts. The learning rate is multiplied by the square
    root of the ratio of the step's rollouts to `base_rollouts`. The paper gives no clipping range,
    KL weight or period of resets: these defaults are ProRL's or this project's.

    Attributes:
        base_rollouts: Number of rollouts per step for which the learning rate was chosen; None for
            16 rollouts of each problem.
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

    def learning_rate_scale(self, batch_size: int, num_generations: int) -> float:
        base = batch_size * FEW if self.base_rollouts is None else self.base_rollouts
        return (batch_size * num_generations / base) ** 0.5

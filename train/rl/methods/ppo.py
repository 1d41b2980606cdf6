"""PPO: proximal policy optimization with a value head (arXiv 1707.06347)."""

import dataclasses
from typing import ClassVar

from train.rl.learning.estimators import GAE, Advantage
from train.rl.learning.losses import Aggregate
from train.rl.methods.method import Method


@dataclasses.dataclass(frozen=True)
class PPO(Method):
    """Advantages of tokens by GAE with a value head, whitened over the batch; clipped value loss.

    The value head is a linear layer, initialised to zeros, on the last hidden state of the policy.
    Policy and values share all other trained parameters, which get gradients of both losses.
    Rollouts of a problem are not compared, so one rollout of each problem (`num_generations=1`) is
    enough.

    Attributes:
        gamma: Discount of the rewards of later turns (γ), above 0 and at most 1; there is no
            discount within a turn.
        lam: Decay of the TD errors of later tokens (λ), from 0 to 1.
        whiten: Whether advantages are normalised to mean 0 and standard deviation 1 over all
            generated tokens of the batch.
        value_clip: Clipping range of a value around its value when the batch was collected, in
            units of the reward (TRL: 0.2); None for no clipping.
        value_coef: Weight of the value loss, half a squared error, relative to the policy's loss.
        value_learning_rate: Peak learning rate of the value head, with the policy's schedule; None
            for the policy's learning rate.
    """

    word: ClassVar[str] = "ppo"

    aggregate: Aggregate = "token"
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    value_clip: float | None = 0.2
    value_coef: float = 0.5
    value_learning_rate: float | None = None

    @property
    def advantage(self) -> Advantage:
        return GAE(
            self.gamma, self.lam, self.whiten, self.value_clip, self.value_coef,
            self.value_learning_rate,
        )  # fmt: skip

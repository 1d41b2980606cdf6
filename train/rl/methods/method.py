"""What a method of reinforcement learning is: a preset of parts, each of which it may replace."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from train.rl.learning.credit import Episodes, spread_over_tokens
from train.rl.learning.losses import Aggregate, LossConfig
from train.rl.protocols import BudgetAllocator, RolloutStrategy
from train.rl.rollout.budgets import Uniform
from train.rl.types import Trajectory


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of all methods.

    A new method is one file: a frozen dataclass that inherits from this one, has a `word`, changes
    defaults, adds options of its own, and overrides `estimate` or another part. `METHODS[word]`
    makes it known to `--method`.

    Attributes:
        clip_low: Clipping range below 1 of the probability ratio (ε_low): a ratio under
            1 - clip_low gets no gradient from a negative advantage.
        clip_high: Clipping range above 1 of the probability ratio (ε_high): a ratio over
            1 + clip_high gets no gradient from a positive advantage.
        dual_clip: Bound on the loss of a token with a negative advantage, in multiples of that
            advantage (c of dual-clip PPO, above 1); None for no bound.
        aggregate: Reduction over tokens: "sequence" averages the means of rows (GRPO), "token"
            averages all tokens of the batch (DAPO), "constant" averages the sums of rows over the
            greatest possible length (Dr. GRPO).
        kl: Weight of the KL penalty (β, estimator k3) towards the weights that the run began with.
        importance_cap: Upper bound on the truncated importance weight between the sampler's and
            the trainer's probability of a token; None for no correction.
        filter_groups: Whether problems whose rollouts all succeed or all fail are left out and
            others drawn in their place (dynamic sampling).
        advantage_clip: Bound on the magnitude of an advantage; None for no bound.
    """

    word: ClassVar[str]
    """Name of the method on the command line and in configs."""

    compares: ClassVar[bool] = True
    """Whether rollouts of one problem are compared, so that a problem needs two or more."""

    by_turn: ClassVar[bool] = False
    """Whether advantages are made of the rewards of turns, which know no penalties of episodes."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    aggregate: Aggregate = "sequence"
    kl: float = 0.0
    importance_cap: float | None = None
    filter_groups: bool = False
    advantage_clip: float | None = None

    def __post_init__(self):
        if self.advantage_clip is not None and not self.advantage_clip > 0:
            raise ValueError(f"advantage_clip={self.advantage_clip}: choose more than 0")
        _ = self.loss  # checks the options that are its own

    @property
    def loss(self) -> LossConfig:
        """The clipped surrogate and its reduction."""
        names = [field.name for field in dataclasses.fields(LossConfig)]
        return LossConfig(**{name: getattr(self, name) for name in names})

    def allocator(self) -> BudgetAllocator:
        """How many rollouts each problem gets: as many as any other."""
        return Uniform()

    def strategy(self, default: RolloutStrategy) -> RolloutStrategy:
        """How trajectories are made.

        Args:
            default: Strategy that fits the task: one response, or the turns of an environment.
        """
        return default

    def estimate(self, reward: np.ndarray, group: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Advantage of each episode, `[N]` float64 (`train.rl.learning.advantages`).

        Args:
            reward: `[N]` float64, penalties taken off.
            group: `[N]` int, the problem of each episode.
            valid: `[N]` bool.
        """
        raise NotImplementedError(f"{type(self).__name__} estimates no advantages")

    def advantages(
        self, trajectories: Sequence[Trajectory], episodes: Episodes, reward: np.ndarray
    ) -> list[np.ndarray]:
        """Advantages `[L]` float64 of the tokens of each trajectory: those of its episode.

        Args:
            trajectories: Rows that are trained on.
            episodes: The episodes that the rows are parts of, `N` of them.
            reward: `[N]` float64, penalties taken off.
        """
        found = self.estimate(reward, episodes.group, episodes.valid)
        return spread_over_tokens(found, trajectories, episodes)

    def assign_advantages(
        self, trajectories: Sequence[Trajectory], episodes: Episodes, reward: np.ndarray
    ) -> list[np.ndarray]:
        """`advantages`, clipped; trajectories that bring their own keep them."""
        found = self.advantages(trajectories, episodes, reward)
        if self.advantage_clip is not None:
            found = [np.clip(a, -self.advantage_clip, self.advantage_clip) for a in found]
        own: list[Any] = [row.advantages for row in trajectories]
        return [mine if given is None else given for mine, given in zip(found, own, strict=True)]

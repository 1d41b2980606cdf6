"""What a method of reinforcement learning is: a preset of parts, each of which it may replace."""

import dataclasses
from typing import ClassVar

from train.rl.learning.estimators import Advantage
from train.rl.learning.losses import LOSS_OPTIONS, Aggregate, ClippedLoss, PolicyLoss
from train.rl.learning.penalties import RewardShaping
from train.rl.rollout.budgets import BudgetAllocator, Uniform
from train.rl.rollout.strategies import RolloutStrategy


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of all methods.

    A new method is one file: a frozen dataclass that inherits from this one, has a `word`, changes
    defaults, adds options of its own, and says which parts it is made of (`advantage` at least).
    `METHODS[word]` makes it known to `--method`.

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
        kl: Weight of the KL penalty (β, estimator k3) towards the reference policy: the weights
            that the run began with, or those of the last `reference_reset`.
        importance_cap: Upper bound on the truncated importance weight between the sampler's and
            the trainer's probability of a token; None for no correction.
        filter_groups: Whether problems whose rollouts all succeed or all fail are left out and
            others drawn in their place (dynamic sampling).
        advantage_clip: Bound on the magnitude of an advantage; None for no bound.
        reference_reset: Number of steps after which the reference policy of the KL penalty becomes
            the present policy, again and again (ProRL); None keeps the weights of the beginning.
        num_generations: Number of rollouts of each problem where the run's config leaves it out;
            None for 8.
    """

    word: ClassVar[str]
    """Name of the method on the command line and in configs."""

    may_be_infinite: ClassVar[frozenset[str]] = ClippedLoss.may_be_infinite | {"advantage_clip"}
    """Names of the options for which infinity means no clipping."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    aggregate: Aggregate = "sequence"
    kl: float = 0.0
    importance_cap: float | None = None
    filter_groups: bool = False
    advantage_clip: float | None = None
    reference_reset: int | None = None
    num_generations: int | None = None

    def __post_init__(self):
        if self.advantage_clip is not None and not self.advantage_clip > 0:
            raise ValueError(f"advantage_clip={self.advantage_clip}: choose more than 0")
        if self.reference_reset is not None and self.reference_reset < 1:
            raise ValueError(f"reference_reset={self.reference_reset}: choose 1 or more, or None")
        _ = self.advantage, self.loss  # which check the options that are theirs

    @property
    def allocator(self) -> BudgetAllocator:
        """How many rollouts each problem gets: as many as any other."""
        return Uniform()

    @property
    def strategy(self) -> RolloutStrategy | None:
        """How rollouts are made; None for one response to a task and turns in an environment."""
        return None

    @property
    def reward(self) -> tuple[RewardShaping, ...]:
        """Changes of the rewards of episodes, in order: none."""
        return ()

    @property
    def advantage(self) -> Advantage:
        """Estimator of advantages."""
        raise NotImplementedError(f"{type(self).__name__} has no advantage")

    @property
    def loss(self) -> PolicyLoss:
        """Clipped surrogate loss with the method's options."""
        return ClippedLoss(**{name: getattr(self, name) for name in LOSS_OPTIONS})

    def rate_scale(self, batch_size: int, num_generations: int) -> float:
        """Factor on the learning rate of the run's config.

        Args:
            batch_size: Number of problems of a step.
            num_generations: Number of rollouts of each problem.
        """
        return 1.0


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of: parts of its method, or what its config has in their place."""

    allocator: BudgetAllocator
    strategy: RolloutStrategy | None
    reward: tuple[RewardShaping, ...]
    advantage: Advantage
    loss: PolicyLoss

"""Base of methods of reinforcement learning: presets of the parts that a run is made of."""

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

    A new method is a frozen dataclass that inherits from this one and has a `word`. It may change
    defaults and add options. It overrides the properties of the parts that differ, `advantage` at
    least. Adding the class as `METHODS[word]` makes it known to `--method`.

    Attributes:
        clip_low: Clipping range below 1 of the probability ratio (ε_low): a ratio under
            1 - clip_low gets no gradient from a negative advantage.
        clip_high: Clipping range above 1 of the probability ratio (ε_high): a ratio over
            1 + clip_high gets no gradient from a positive advantage.
        dual_clip: Bound on the loss of a token with a negative advantage, in multiples of that
            advantage (c of dual-clip PPO, above 1); None for no bound.
        aggregate: Reduction over tokens: "sequence" averages the means of rows (GRPO), "token"
            averages all tokens of the batch (DAPO), "constant" averages the sums of rows, each
            divided by the maximum length of a row (Dr. GRPO).
        kl: Weight of the KL penalty (β, estimator k3) towards the reference policy, whose weights
            are the initial weights of the run, or the weights at the last `reference_reset`.
        importance_cap: Upper bound on the truncated importance weight between the sampler's and
            the trainer's probability of a token; None for no correction.
        filter_groups: Whether problems whose rollouts all have the same verdict, e.g. all succeed
            or all fail, are replaced by newly drawn problems (dynamic sampling).
        advantage_clip: Bound on the magnitude of an advantage; None for no bound.
        reference_reset: Number of steps between resets of the KL penalty's reference policy to the
            present policy (ProRL); None always keeps the weights that the run began with.
        num_generations: Number of rollouts of each problem, unless the run's config sets the
            number; None for 8.
    """

    word: ClassVar[str]
    """Name of the method on the command line and in configs."""

    may_be_infinite: ClassVar[frozenset[str]] = ClippedLoss.may_be_infinite | {"advantage_clip"}
    """Names of the options that may be infinite, which means no clipping."""

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
        _ = self.advantage, self.loss  # these parts check their options

    @property
    def allocator(self) -> BudgetAllocator:
        """Allocator of rollouts to problems; by default all problems get the same number."""
        return Uniform()

    @property
    def strategy(self) -> RolloutStrategy | None:
        """Rollout strategy; None for one response to a task and turns in an environment."""
        return None

    @property
    def reward(self) -> tuple[RewardShaping, ...]:
        """Reward shapings in the order in which they are applied; none by default."""
        return ()

    @property
    def advantage(self) -> Advantage:
        """Estimator of advantages."""
        raise NotImplementedError(f"{type(self).__name__} has no advantage")

    @property
    def loss(self) -> PolicyLoss:
        """Policy loss; by default the clipped surrogate loss with the method's options."""
        return ClippedLoss(**{name: getattr(self, name) for name in LOSS_OPTIONS})

    def learning_rate_scale(self, batch_size: int, num_generations: int) -> float:
        """Return the factor on the learning rate of the run's config; 1 by default.

        Args:
            batch_size: Number of problems per step.
            num_generations: Number of rollouts of each problem.
        """
        return 1.0


@dataclasses.dataclass(frozen=True)
class Parts:
    """Parts that a run is made of: parts that the config sets, and the method's other parts.

    Attributes:
        allocator: Allocator of rollouts to problems.
        strategy: Rollout strategy; None for one response to a task and turns in an environment.
        reward: Reward shapings in the order in which they are applied.
        advantage: Estimator of advantages.
        loss: Policy loss.
    """

    allocator: BudgetAllocator
    strategy: RolloutStrategy | None
    reward: tuple[RewardShaping, ...]
    advantage: Advantage
    loss: PolicyLoss

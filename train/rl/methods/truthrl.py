"""TruthRL: a reward that lets a policy abstain (arXiv 2509.25760)."""

import dataclasses
from typing import ClassVar

from train.rl.learning.penalties import RewardShaping, Ternary
from train.rl.methods.grpo import GRPO
from train.rl.tasks.truthful import Reasoning


@dataclasses.dataclass(frozen=True)
class TruthRL(GRPO):
    """GRPO on the ternary reward: 1 if right, `abstain` (0) if abstained, -1 if wrong.

    If the policy's confidence is above a threshold, answering has a higher expected reward than
    abstaining. Dividing advantages by the standard deviation of small groups moves this threshold
    towards 1/2. If `abstain` is neither 0 nor -1, choose `--advantage dr_grpo` or groups of 64.

    Attributes:
        abstain: Reward of abstaining (r_abstain), from -1 (a binary reward) to below 1.
        boxed: Whether an answer counts only inside of `\\boxed{...}`.
        knowledge: Whether only abstaining is rewarded on problems out of knowledge.
        probe: File of `thoughtbubbles probe` that says which problems are out of knowledge; empty
            if the task itself marks these problems.
        reasoning: Rule that combines the reward with the task's score of the reasoning: "none",
            "multiplicative", "additive" or "conditional" (see the reward "ternary").
    """

    word: ClassVar[str] = "truthrl"

    kl: float = 0.001
    abstain: float = 0.0
    boxed: bool = False
    knowledge: bool = False
    probe: str = ""
    reasoning: Reasoning = "none"

    def __post_init__(self):
        super().__post_init__()
        _ = self.reward  # the reward checks its options

    @property
    def reward(self) -> tuple[RewardShaping, ...]:
        options = ("abstain", "boxed", "knowledge", "probe", "reasoning")
        return (Ternary(**{name: getattr(self, name) for name in options}),)

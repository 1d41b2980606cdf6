"""GRPO: group relative policy optimization (arXiv 2402.03300)."""

import dataclasses
from typing import ClassVar

from train.rl.learning.estimators import Advantage, GroupNormalized
from train.rl.methods.method import Method


@dataclasses.dataclass(frozen=True)
class GRPO(Method):
    """Advantages that are rewards standardised within the group; clipped surrogate loss."""

    word: ClassVar[str] = "grpo"

    @property
    def advantage(self) -> Advantage:
        return GroupNormalized()

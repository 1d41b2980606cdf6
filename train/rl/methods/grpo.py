"""GRPO: group relative policy optimization (arXiv 2402.03300)."""

import dataclasses
from typing import ClassVar

from train.rl.learning.estimators import Advantage, GroupNormalized
from train.rl.methods.method import Method


@dataclasses.dataclass(frozen=True)
class GRPO(Method):
    """Deviation from the mean of the group over its standard deviation; clipped surrogate."""

    word: ClassVar[str] = "grpo"

    @property
    def advantage(self) -> Advantage:
        return GroupNormalized()

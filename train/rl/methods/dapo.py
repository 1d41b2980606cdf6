"""DAPO: decoupled clip and dynamic sampling (arXiv 2503.14476)."""

import dataclasses
from typing import ClassVar

from train.rl.learning.losses import Aggregate
from train.rl.methods.grpo import GRPO


@dataclasses.dataclass(frozen=True)
class DAPO(GRPO):
    """GRPO with a wider clipping range above, a mean over all tokens, and dynamic sampling.

    The paper's soft overlong punishment is not included: add `--reward "overlong(buffer=4096)"`.
    """

    word: ClassVar[str] = "dapo"

    clip_high: float = 0.28
    aggregate: Aggregate = "token"
    filter_groups: bool = True

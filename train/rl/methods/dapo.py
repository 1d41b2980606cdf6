"""DAPO: decoupled clip and dynamic sampling (arXiv 2503.14476)."""

import dataclasses
from typing import ClassVar

from train.rl.learning.losses import Aggregate
from train.rl.methods.grpo import GRPO


@dataclasses.dataclass(frozen=True)
class DAPO(GRPO):
    """GRPO's advantage with a wider clipping range above, a mean over all tokens of the batch, and
    dynamic sampling. Its overlong penalty is `overlong_buffer` of the run."""

    word: ClassVar[str] = "dapo"

    clip_high: float = 0.28
    aggregate: Aggregate = "token"
    filter_groups: bool = True

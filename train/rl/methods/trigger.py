"""GRPO for decisions that have a price: whether MemGen's trigger invokes the weaver."""

import dataclasses
from typing import ClassVar

from train.rl.learning.losses import Aggregate
from train.rl.methods.dr_grpo import DrGRPO


@dataclasses.dataclass(frozen=True)
class TriggerGRPO(DrGRPO):
    """Deviation from the mean of the group, means of rows, and a KL penalty (for a trigger).

    Advantages are not divided by the standard deviation: where all answers of a group are right,
    the smallest price would have full strength and silence the trigger. The KL penalty holds the
    trigger near its start, since where nobody invokes nothing is learned.
    """

    word: ClassVar[str] = "trigger"

    aggregate: Aggregate = "sequence"
    kl: float = 0.02

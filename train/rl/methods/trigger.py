"""GRPO for MemGen's trigger, which decides whether to invoke the weaver at a price."""

import dataclasses
from typing import ClassVar

from train.rl.learning.losses import Aggregate
from train.rl.methods.dr_grpo import DrGRPO


@dataclasses.dataclass(frozen=True)
class TriggerGRPO(DrGRPO):
    """Deviation from the mean of the group, means of rows, and a KL penalty (for a trigger).

    Advantages are not divided by the standard deviation. Otherwise, where all answers of a group
    are right, even a tiny price of an invocation would become a large advantage, and the trigger
    would learn never to invoke. The KL penalty keeps the trigger near its initial weights, because
    a trigger that never invokes learns nothing more.
    """

    word: ClassVar[str] = "trigger"

    aggregate: Aggregate = "sequence"
    kl: float = 0.02

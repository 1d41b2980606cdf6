"""GRPO for MemGen's trigger, which decides whether to invoke the weaver at a price."""

import dataclasses
from typing import ClassVar

from train.rl.learning.losses import Aggregate
from train.rl.methods.dr_grpo import DrGRPO


@dataclasses.dataclass(frozen=True)
class TriggerGRPO(DrGRPO):
    """GRPO without division by the standard deviation, with a KL penalty, to train a trigger.

    If all answers of a group are right, division by the standard deviation would turn even a tiny
    price of an invocation into a large advantage, and the trigger would learn never to invoke. The
    KL penalty keeps the trigger close to its initial weights, because a trigger that never invokes
    learns nothing more.
    """

    word: ClassVar[str] = "trigger"

    aggregate: Aggregate = "sequence"
    kl: float = 0.02

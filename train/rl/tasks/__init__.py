"""Registry of tasks of one response by name, as in `reverse(length=4)`."""

from typing import Any

from thoughtbubbles.registry import Registry
from train.rl.tasks.arithmetic import Arithmetic, ChainSum
from train.rl.tasks.gsm8k import GSM8K
from train.rl.tasks.hidden_facts import HiddenFacts
from train.rl.tasks.math_problems import MathProblems
from train.rl.tasks.reasoning_gym import ReasoningGym
from train.rl.tasks.strings import Copy, Reverse, Sort

__all__ = ["TASKS"]

TASKS = Registry[Any](
    "task",
    {
        task.word: task
        for task in (
            Arithmetic,
            ChainSum,
            Copy,
            Reverse,
            Sort,
            HiddenFacts,
            GSM8K,
            MathProblems,
            ReasoningGym,
        )  # fmt: skip
    },
)

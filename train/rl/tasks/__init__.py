"""Tasks for reinforcement learning by name, with options: `reverse(length=4)`."""

from typing import Any

from train.cli.calls import from_text
from train.rl.protocols import Environment, Task
from train.rl.tasks.arithmetic import Arithmetic, ChainSum
from train.rl.tasks.gsm8k import GSM8K
from train.rl.tasks.guessing import GuessNumber
from train.rl.tasks.hidden_facts import HiddenFacts
from train.rl.tasks.reasoning_gym import ReasoningGym
from train.rl.tasks.shaping import format_bonus, safe_score, safe_step, ternary
from train.rl.tasks.strings import Copy, Reverse, Sort

__all__ = [
    "TASKS",
    "format_bonus",
    "make_task",
    "safe_score",
    "safe_step",
    "ternary",
]

TASKS: dict[str, type[Any]] = {
    task.word: task
    for task in (
        Arithmetic, ChainSum, Copy, Reverse, Sort, GuessNumber, HiddenFacts, GSM8K, ReasoningGym,
    )
}  # fmt: skip

_AFTER_COLON = {"gsm8k": "path", "reasoning_gym": "dataset"}


def make_task(spec: str, seed: int) -> Task | Environment:
    """The task that a text asks for.

    Args:
        spec: a name, with options in brackets where some are to differ from their defaults:
            "arithmetic", "reverse(length=4)", "gsm8k:problems.jsonl", "reasoning_gym:chain_sum",
            "gsm8k(path='problems.jsonl', bonus=0.1)".
        seed: of the order of problems, 0 or more.

    Raises:
        ValueError: no such task or option, or a value that it cannot have.
    """
    if seed < 0:
        raise ValueError(f"seed={seed}: choose 0 or more")
    text = spec.strip()
    name, colon, rest = text.partition(":")
    if colon and name in _AFTER_COLON:
        if not rest:
            raise ValueError(f"task {spec!r}: write {name}:{_AFTER_COLON[name].upper()}")
        return TASKS[name](**{_AFTER_COLON[name]: rest}, seed=seed)
    return from_text(text, TASKS, "task", seed=seed)

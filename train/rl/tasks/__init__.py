"""Tasks for reinforcement learning by name, with options: `reverse(length=4)`."""

import ast
import dataclasses
import difflib
from typing import Any, get_type_hints

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
    "signature",
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
    name = text.partition("(")[0].partition(":")[0].strip()
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, 1, 0.5)
        hint = f" (perhaps {close[0]}?)" if close else ""
        raise ValueError(f"unknown task {name!r}{hint}: choose one of {', '.join(TASKS)}")
    task = TASKS[name]
    try:
        values = _values(text, task)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"task {spec!r}: write {signature(name)}") from None
    return task(**values, seed=seed)


def signature(name: str) -> str:
    """How a task is asked for, with all options and their defaults."""
    written = []
    for field in _options(TASKS[name]):
        default = {} if field.default_factory is dict else field.default
        missing = default is dataclasses.MISSING
        written.append(f"{field.name}={'...' if missing else repr(default)}")
    return f"{name}({', '.join(written)})"


def _options(task: type[Any]) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(task) if field.repr]


def _values(text: str, task: type[Any]) -> dict[str, Any]:
    """Options in brackets; a TypeError, ValueError or SyntaxError where they are not the task's."""
    call = ast.parse(text, mode="eval").body
    types = get_type_hints(task)
    fields = {field.name: field for field in _options(task)}
    values = {}
    if isinstance(call, ast.Call) and not call.args:
        for keyword in call.keywords:
            if keyword.arg not in fields:
                raise TypeError("no such option")
            values[keyword.arg] = _value(ast.literal_eval(keyword.value), types[keyword.arg])
        if len(values) < len(call.keywords):
            raise TypeError("an option is given twice")
    elif not isinstance(call, ast.Name):
        raise TypeError("not a call")
    needed = [f.name for f in fields.values() if f.default is f.default_factory]
    if set(needed) - set(values):  # both are MISSING
        raise TypeError("an option without default is left out")
    return values


def _value(value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise TypeError(f"{value!r} is not {kind}")
    return value

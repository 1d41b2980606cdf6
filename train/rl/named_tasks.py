"""What `--task` takes: a task of one response or an environment, by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from train.cli.calls import from_text, signature
from train.rl.environments import ENVIRONMENTS
from train.rl.protocols import Environment, Task
from train.rl.tasks import TASKS

_AFTER_COLON = {"gsm8k": "path", "math": "path", "reasoning_gym": "dataset", "gem": "id"}


def tasks_by_name() -> Mapping[str, type[Any]]:
    """All tasks and environments."""
    return {**TASKS, **ENVIRONMENTS}


def tasks_help() -> str:
    """All tasks and environments, with their options and what they are, for `--task help`."""
    lines = []
    for heading, registry in (
        ("tasks of one response", TASKS),
        ("environments of several turns (thoughtbubbles play NAME plays one)", ENVIRONMENTS),
    ):
        lines.append(f"{heading}:")
        for name, task in registry.items():
            purpose = " ".join((task.__doc__ or "").partition("\n\n")[0].split())
            lines += [f"  {signature(name, task)}", f"      {purpose}"]
    return "\n".join(lines)


def has_turns(spec: str) -> bool:
    """Whether a text asks for an environment of several turns; the task itself isn't made.

    Args:
        spec: Name with options, as `make_task` takes it; an unknown name has no turns.
    """
    name = spec.partition("(")[0].partition(":")[0].strip()
    return hasattr(tasks_by_name().get(name), "step")


def make_task(spec: str, seed: int) -> Task | Environment:
    """The task or environment that a text asks for.

    Args:
        spec: Name, with options in brackets where some are to differ from their defaults:
            "arithmetic", "reverse(length=4)", "gsm8k:problems.jsonl", "reasoning_gym:chain_sum",
            "gsm8k(path='problems.jsonl', bonus=0.1)", "guess_number(high=50)",
            "gem:game:Mastermind-v0-easy".
        seed: Seed of the order of problems, 0 or more.

    Raises:
        ValueError: There is no such task or option, or an option cannot have its value.
    """
    if seed < 0:
        raise ValueError(f"seed={seed}: choose 0 or more")
    text = spec.strip()
    name, colon, rest = text.partition(":")
    if colon and name in _AFTER_COLON:
        if not rest:
            raise ValueError(f"task {spec!r}: write {name}:{_AFTER_COLON[name].upper()}")
        return tasks_by_name()[name](**{_AFTER_COLON[name]: rest}, seed=seed)
    chosen = tasks_by_name().get(name.partition("(")[0].strip())
    seeded = chosen is not None and "seed" in {field.name for field in dataclasses.fields(chosen)}
    return from_text(text, tasks_by_name(), "task", **({"seed": seed} if seeded else {}))

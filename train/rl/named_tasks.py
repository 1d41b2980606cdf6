"""Registry of tasks and environments by name, for `--task`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from train.cli.calls import from_text, signature
from train.cli.entries import check_dataclass
from train.rl.environments import ENVIRONMENTS
from train.rl.protocols import Environment, Task
from train.rl.tasks import TASKS

_AFTER_COLON = {"gsm8k": "path", "math": "path", "reasoning_gym": "dataset", "gem": "id"}


def tasks_by_name() -> Mapping[str, type[Any]]:
    """Return the classes of all tasks and environments by name.

    Raises:
        ValueError: A plugin's task and an environment have one name.
    """
    if both := TASKS.keys() & ENVIRONMENTS.keys():
        raise ValueError(
            f"{min(both)} is a task and an environment: register one of them by another name"
        )
    return {**TASKS, **ENVIRONMENTS}


def tasks_help() -> str:
    """List all tasks and environments with their options and summaries, for `--task help`.

    Raises:
        ValueError: A task that a plugin registers is not a dataclass.
    """
    lines = []
    for heading, registry in (
        ("tasks of one response", TASKS),
        ("environments of several turns (thoughtbubbles play NAME plays one)", ENVIRONMENTS),
    ):
        lines.append(f"{heading}:")
        for name, task in registry.items():
            check_dataclass("task", name, task)
            purpose = " ".join((task.__doc__ or "").partition("\n\n")[0].split())
            lines += [f"  {signature(name, task)}", f"      {purpose}"]
    return "\n".join(lines)


def has_turns(spec: str) -> bool:
    """Return whether a text names an environment, without making the environment.

    Args:
        spec: Name with options, as for `make_task`. For an unknown name the result is False.
    """
    name = spec.partition("(")[0].partition(":")[0].strip()
    return hasattr(tasks_by_name().get(name), "step")


def make_task(spec: str, seed: int) -> Task | Environment:
    """Make the task or environment that a text describes.

    Args:
        spec: Name, with options in brackets where they differ from their defaults:
            "arithmetic", "reverse(length=4)", "gsm8k:problems.jsonl", "reasoning_gym:chain_sum",
            "gsm8k(path='problems.jsonl', bonus=0.1)", "guess_number(high=50)",
            "gem:game:Mastermind-v0-easy".
        seed: Seed of the order of problems, 0 or more.

    Raises:
        ValueError: The seed is negative, there is no such task or option, a value is invalid, or
            the task of a plugin is not a dataclass, or its `name` does not begin with the name that
            it is registered by.
    """
    if seed < 0:
        raise ValueError(f"seed={seed}: choose 0 or more")
    text = spec.strip()
    name, colon, rest = text.partition(":")
    if colon and name in _AFTER_COLON:
        if not rest:
            raise ValueError(f"task {spec!r}: write {name}:{_AFTER_COLON[name].upper()}")
        return tasks_by_name()[name](**{_AFTER_COLON[name]: rest}, seed=seed)
    name = name.partition("(")[0].strip()
    chosen = tasks_by_name().get(name)
    if chosen is not None:
        check_dataclass("task", name, chosen)
    seeded = chosen is not None and "seed" in {field.name for field in dataclasses.fields(chosen)}
    made = from_text(text, tasks_by_name(), "task", **({"seed": seed} if seeded else {}))
    known_as = getattr(made, "name", None)
    if str(known_as).partition("(")[0].partition(":")[0] != name:
        way_out = f"`name` to {name!r}, or to {name}(...)"
        if getattr(made, "word", name) != name:  # of which tasks of the library make their name
            way_out = f"`word` to {name!r}"
        raise ValueError(
            f"task {name!r} has the name {known_as!r}, which a run would save: set its {way_out}"
        )
    return made

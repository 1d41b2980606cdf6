"""What tasks and environments make problems with: stable hashes, names, checks of options."""

import dataclasses
import hashlib
from typing import Any

TEST_SHARE = 5
"""One problem of so many is held out."""


def digest(text: str) -> int:
    """64 bits of a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def options(task: Any) -> str:
    """Options of a task as they are written, e.g. `(length=4)`; those at their default left out."""
    changed = [
        f"{field.name}={value!r}"
        for field in dataclasses.fields(task)
        if field.repr
        and ((value := getattr(task, field.name)) != field.default)
        and not (
            field.default_factory is not dataclasses.MISSING and value == field.default_factory()
        )
    ]
    return f"({', '.join(changed)})" if changed else ""


def answer_of(text: str) -> str:
    """The first line that is not empty, without space around it."""
    return text.strip().partition("\n")[0].strip()


def at_least(task: Any, **least: int) -> None:
    """Raise a `ValueError` for an option that is below its bound."""
    for name, bound in least.items():
        if getattr(task, name) < bound:
            raise ValueError(f"{task.word}: {name}={getattr(task, name)}: choose {bound} or more")

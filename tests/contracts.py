"""Entries of registries as contract tests make them: by their name, or as `--example` writes it."""

from typing import Any

import pytest

from thoughtbubbles.typed_json import fields_of, required_options
from train.cli.calls import from_text

OPTION = "--example"
EXAMPLES: dict[str, str] = {}
"""Mapping from the name of an entry to the text that makes it, as the command line gave it."""


def registries() -> dict[str, dict[str, Any]]:
    """Return the registries that a plugin may add to, by the noun for their entries."""
    from thoughtbubbles import ARCHITECTURES
    from thoughtbubbles.policies import POLICIES
    from train.data import SOURCES
    from train.rl.environments import ENVIRONMENTS
    from train.rl.parts import KINDS
    from train.rl.tasks import TASKS

    found = {"architecture": ARCHITECTURES, "policy": POLICIES, "data source": SOURCES}
    parts: dict[str, Any] = {kind: registry for kind, (_, registry) in KINDS.items()}
    return {**found, "task": TASKS, "environment": ENVIRONMENTS, **parts}


def take_examples(texts: list[str]) -> None:
    """Keep the texts of `--example` for the tests.

    Args:
        texts: Calls such as `mine(path='problems.jsonl')`.

    Raises:
        ValueError: No registry has an entry of that name.
    """
    for text in texts:
        name = text.partition("(")[0].strip()
        if not any(name in registry for registry in registries().values()):
            raise ValueError(
                f"{OPTION} {text!r}: no registry has an entry {name!r}: write the name that a "
                '--plugin registers, with options, such as "mine(length=2)"'
            )
        EXAMPLES[name] = text


def example(name: str, entry: type) -> str:
    """Return the text that makes an entry; the test fails if that needs options nobody gave.

    Args:
        name: Name of the entry in its registry.
        entry: Dataclass of the entry's options.
    """
    missing = required_options(entry)
    if missing and name not in EXAMPLES:
        options = ", ".join(f"{f.name}=..." for f in fields_of(entry) if f.name in missing)
        pytest.fail(
            f"{name} has options without a default: say how tests shall make it, by "
            f'{OPTION} "{name}({options})" with values for ...',
            pytrace=False,
        )
    return EXAMPLES.get(name, name)


def make_example(name: str, entry: type, kind: str) -> Any:
    """Make an entry as `example` writes it.

    Args:
        name: Name of the entry in its registry.
        entry: Dataclass of the entry's options.
        kind: Noun for the entry in error messages.
    """
    return from_text(example(name, entry), {name: entry}, kind)

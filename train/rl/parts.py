"""Methods and their parts by name, for options such as `--method` and `--advantage`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from train.cli.calls import from_text, signature, text_of
from train.cli.option_rules import one_word, option_rule
from train.rl.learning.estimators import ADVANTAGES, Advantage
from train.rl.learning.losses import LOSSES, PolicyLoss
from train.rl.learning.penalties import REWARDS, RewardShaping
from train.rl.methods import METHODS, Method
from train.rl.rollout.budgets import ALLOCATORS, BudgetAllocator
from train.rl.rollout.strategies import STRATEGIES, RolloutStrategy

if TYPE_CHECKING:
    from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

KINDS: dict[str, tuple[type, Mapping[str, type[Any]]]] = {
    "method": (Method, METHODS),
    "allocator": (BudgetAllocator, ALLOCATORS),
    "strategy": (RolloutStrategy, STRATEGIES),
    "reward": (RewardShaping, REWARDS),
    "advantage": (Advantage, ADVANTAGES),
    "loss": (PolicyLoss, LOSSES),
}
"""Base class and registry of methods and of each kind of part, by the name of the option."""


def part_from_text(kind: str, text: str) -> Any:
    """Make the method or part that a text describes, e.g. `dapo(clip_high=0.3, kl=0.01)`.

    Args:
        kind: Name of the option, a key of `KINDS`.
        text: Name with options in brackets.

    Raises:
        ValueError: The name or an option is unknown, a value is invalid, or the class is registered
            under another name than its `word`.
    """
    part = from_text(text, KINDS[kind][1], kind)
    word, name = getattr(part, "word", None), text.partition("(")[0].strip()
    if word != name:
        raise ValueError(f"{kind} {text!r} has the word {word!r}: set its `word` to {name!r}")
    return checked(kind, part)


def checked(kind: str, part: Any) -> Any:
    """Return a method or part unchanged, after checking its class and its `word`.

    Args:
        kind: Name of the option, a key of `KINDS`.
        part: Method or part, registered or not.

    Raises:
        ValueError: The part does not inherit from the base class of its kind, has no `word`, or has
            the `word` of another registered class.
    """
    base, registry = KINDS[kind]
    name = type(part).__name__
    if not isinstance(part, base):
        raise ValueError(f"{kind}={part!r}: {name} is no {base.__name__}: inherit from it")
    if getattr(part, "word", None) is None:
        raise ValueError(f"{kind} {name} has no word: give it the name that it is registered by")
    if registry.get(part.word, type(part)) is not type(part):
        raise ValueError(
            f"{kind} {name} has the word {part.word!r} of another {kind}: give it one of its own, "
            "the name that it is registered by"
        )
    return part


def choices() -> str:
    """List all methods and parts with options and summaries, one per line, for `--help`."""
    lines = []
    for kind, (_, registry) in KINDS.items():
        lines.append(f"choices of --{kind}:")
        for name, part in registry.items():
            purpose = " ".join((part.__doc__ or "").partition("\n\n")[0].split())
            written = _preset(name, part) if kind == "method" else signature(name, part)
            lines.append(f"  {written}: {purpose}")
    lines.insert(1 + len(METHODS), f"  options of all: {signature('method', Method)}")
    return "\n".join(lines)


def _preset(name: str, method: type[Any]) -> str:
    """Format a method with the options whose defaults differ from those of `Method`."""
    common = {field.name: field.default for field in dataclasses.fields(Method)}
    own = [
        f"{field.name}={field.default!r}"
        for field in dataclasses.fields(method)
        if field.name not in common or field.default != common[field.name]
    ]
    return f"{name}({', '.join(own)})"


@option_rule
def part_option(option: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Return the rule that parses a method or a part from one word; None for other options."""
    for kind, (base, _) in KINDS.items():
        if base in getattr(option.type, "__args__", ()):
            read = lambda text, kind=kind: part_from_text(kind, text)  # noqa: E731
            show = lambda part: text_of(part.word, part) if part else "None"  # noqa: E731
            return one_word(option, (base, str), kind.upper(), read, show)
    return None


@option_rule
def reward_option(option: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Return the rule that parses reward shapings, one a word; None for other options."""
    from tyro.constructors import PrimitiveConstructorSpec

    if tuple[RewardShaping | str, ...] not in getattr(option.type, "__args__", ()):
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[REWARD [REWARD ...]]",
        instance_from_str=lambda words: tuple(part_from_text("reward", word) for word in words),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [text_of(part.word, part) for part in value or ()],
    )

"""Stable hashes, names, checks of options and a base class for tasks and environments."""

import dataclasses
import hashlib
import numbers
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from train.rl.types import Problem, Split

TEST_SHARE = 5
"""Inverse of the expected fraction of problems that are held out for the test split."""


def digest(text: str) -> int:
    """Hash a text to an integer of 64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def options(task: Any) -> str:
    """Format the options of a task that differ from their defaults, e.g. `(length=4)` or ""."""
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
    """Return the first line of a response that is not blank, without surrounding white space."""
    return text.strip().partition("\n")[0].strip()


def at_least(task: Any, **least: int) -> None:
    """Raise a `ValueError` if an option of a task is below its minimum.

    Args:
        task: Task with a `word` and the options as attributes.
        least: Minimum of each option, keyed by name.
    """
    for name, bound in least.items():
        if getattr(task, name) < bound:
            raise ValueError(f"{task.word}: {name}={getattr(task, name)}: choose {bound} or more")


def at_most(task: Any, **most: int) -> None:
    """Raise a `ValueError` if an option of a task is above its maximum.

    Args:
        task: Task with a `word` and the options as attributes.
        most: Maximum of each option, keyed by name.
    """
    for name, bound in most.items():
        if getattr(task, name) > bound:
            raise ValueError(f"{task.word}: {name}={getattr(task, name)}: choose {bound} or less")


def _is_finite(value: Any) -> bool:
    number = isinstance(value, (int, float, np.floating, np.integer))
    return bool(number and -sys.float_info.max <= value <= sys.float_info.max)


_KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    "int": (lambda value: isinstance(value, numbers.Integral), "a whole number"),
    "float": (_is_finite, "a finite number"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "str": (lambda value: isinstance(value, str), "a text"),
}


def check_types(task: Any) -> None:
    """Raise a `ValueError` if an option of a task is not of the type that its field declares.

    Only fields that are declared as int, float, bool or str are checked; an int fits a float, and a
    float has to be finite.
    """
    for field in dataclasses.fields(task):
        kind = getattr(field.type, "__name__", field.type)
        value = getattr(task, field.name)
        fits, noun = _KINDS.get(kind, (lambda value: True, ""))
        if not fits(value) or (isinstance(value, bool) and kind in ("int", "float")):
            raise ValueError(f"{task.word}: {field.name}={value!r}: choose {noun}")


def is_held_out(text: str) -> bool:
    """Return whether a problem with this text belongs to the test split, by a hash of the text."""
    return digest(text) % TEST_SHARE == 0


_ATTEMPTS = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedProblems:
    """Base of tasks and environments whose problems are generated at random.

    A problem depends on the options, the seed, the split and the index alone. A hash of the problem
    decides its split for all seeds, so that no seed trains on the test problems of another seed. A
    subclass defines `draw`, `split_key` and `made`.

    Attributes:
        seed: Seed of the order of problems, 0 or more.

    Raises:
        ValueError: An option is invalid, or a split has no problem.
    """

    word: ClassVar[str] = ""
    """Name on the command line."""

    seed: int = dataclasses.field(default=0, repr=False)

    def __post_init__(self):
        check_types(self)
        at_least(self, seed=0)
        self.check()
        self.prepare()
        for split in ("train", "test"):
            self.problem(split, 0)

    def check(self) -> None:
        """Raise a `ValueError` for options with which no problem can be generated."""

    def prepare(self) -> None:
        """Precompute what `draw` needs; called once, after `check`. Does nothing by default."""

    def draw(self, rng: np.random.Generator) -> tuple[Any, ...]:
        """Draw the random contents of a problem, which may belong to either split.

        Args:
            rng: Generator of all random numbers of the problem.
        """
        raise NotImplementedError(f"{type(self).__name__} draws no problems")

    def split_key(self, drawn: tuple[Any, ...]) -> str:
        """Return a text that identifies a problem, whose hash decides the problem's split.

        Args:
            drawn: Contents of the problem, from `draw`.
        """
        raise NotImplementedError

    def made(self, drawn: tuple[Any, ...]) -> Problem:
        """Make a problem from the contents that `draw` returned."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        return self.word + options(self)

    @property
    def sizes(self) -> Mapping[Split, int | None]:
        return {"train": None, "test": None}

    def problem(self, split: Split, index: int) -> Problem:
        """Generate the problem of a split and an index; different indices may give equal problems.

        Raises:
            ValueError: There are so few problems that none is found in the split.
        """
        return self.made(self.drawn(split, index, self.draw))

    def drawn(
        self, split: Split, index: int, draw: Callable[[np.random.Generator], tuple[Any, ...]]
    ) -> tuple[Any, ...]:
        """Draw contents repeatedly, until they belong to the split, and return them.

        Args:
            split: Split of the problem.
            index: Index of the problem in the split.
            draw: Function that draws contents from a generator, such as `self.draw`.

        Raises:
            ValueError: None of 2000 drawn contents belongs to the split.
        """
        rng = np.random.default_rng([self.seed, split == "test", index])
        for _ in range(_ATTEMPTS):
            drawn = draw(rng)
            if is_held_out(self.split_key(drawn)) == (split == "test"):
                return drawn
        raise ValueError(
            f"{self.name} has too few different problems to hold some out for {split}: "
            "choose larger options"
        )

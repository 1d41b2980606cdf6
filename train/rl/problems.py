"""What tasks and environments make problems with: stable hashes, names, checks of options."""

import dataclasses
import hashlib
import numbers
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from train.rl.types import Problem, Split

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


def at_most(task: Any, **most: int) -> None:
    """Raise a `ValueError` for an option that is above its bound."""
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
    """Raise a `ValueError` for an option of another type than that of its field.

    Fields of other types than int, float, bool and str are not looked at.
    """
    for field in dataclasses.fields(task):
        kind = getattr(field.type, "__name__", field.type)
        value = getattr(task, field.name)
        fits, noun = _KINDS.get(kind, (lambda value: True, ""))
        if not fits(value) or (isinstance(value, bool) and kind in ("int", "float")):
            raise ValueError(f"{task.word}: {field.name}={value!r}: choose {noun}")


def is_held_out(text: str) -> bool:
    """Whether a problem is one of the test split, by a hash of its text."""
    return digest(text) % TEST_SHARE == 0


_ATTEMPTS = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedProblems:
    """Base of generated tasks and environments: problems of options, seed, split and index alone.

    A hash decides the split of a problem, whatever the seed: no seed trains on another seed's test
    problems.

    Attributes:
        seed: Seed of the order of problems.
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
        """Raise a `ValueError` for options that make no problems."""

    def prepare(self) -> None:
        """Compute what problems are drawn from, once, after the options were checked."""

    def draw(self, rng: np.random.Generator) -> tuple[Any, ...]:
        """What a problem of any split is made of."""
        raise NotImplementedError(f"{type(self).__name__} draws no problems")

    def hashed(self, drawn: tuple[Any, ...]) -> str:
        """Text whose hash decides the split of what was drawn."""
        raise NotImplementedError

    def made(self, drawn: tuple[Any, ...]) -> Problem:
        """The problem that is made of what was drawn."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        return self.word + options(self)

    @property
    def sizes(self) -> Mapping[Split, int | None]:
        return {"train": None, "test": None}

    def problem(self, split: Split, index: int) -> Problem:
        """A problem of the split; the same one may come at several indices.

        Raises:
            ValueError: There are so few problems that none is in the split.
        """
        return self.made(self.drawn(split, index, self.draw))

    def drawn(
        self, split: Split, index: int, draw: Callable[[np.random.Generator], tuple[Any, ...]]
    ) -> tuple[Any, ...]:
        """What the problem of an index is made of, drawn until one belongs to the split."""
        rng = np.random.default_rng([self.seed, split == "test", index])
        for _ in range(_ATTEMPTS):
            drawn = draw(rng)
            if is_held_out(self.hashed(drawn)) == (split == "test"):
                return drawn
        raise ValueError(
            f"{self.name} has too few different problems to hold some out for {split}: "
            "choose larger options"
        )

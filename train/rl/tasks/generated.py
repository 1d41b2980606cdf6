"""Problems that are drawn without end, each a pure function of options, seed, split and index."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from train.rl.types import Completion, Problem, Reward, Split

TEST_SHARE = 5  # one problem of so many is held out
_ATTEMPTS = 2000


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """What generated tasks have in common.

    A hash of the prompt says which split a problem is of, whatever the seed: what one seed trains
    on is never another's test.

    Attributes:
        seed: of the order in which problems come.
    """

    word: ClassVar[str] = ""
    seed: int = dataclasses.field(default=0, repr=False)

    def __post_init__(self):
        self.check()
        for split in ("train", "test"):
            self.problem(split, 0)

    def check(self) -> None:
        """Raise a `ValueError` for options that make no problems."""

    def draw(self, rng: np.random.Generator) -> tuple[str, Any, str]:
        """Prompt, answer and kind of a problem of any split."""
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
            ValueError: there are so few problems that none is in the split.
        """
        rng = np.random.default_rng([self.seed, split == "test", index])
        for _ in range(_ATTEMPTS):
            prompt, answer, kind = self.draw(rng)
            if (digest(prompt) % TEST_SHARE == 0) == (split == "test"):
                uid = f"{self.word}-{digest(f'{prompt} {answer}'):016x}"
                return Problem(uid, prompt, answer, kind)
        raise ValueError(
            f"{self.name} has too few different problems to hold some out for {split}: "
            "choose larger options"
        )

    def score(self, completion: Completion) -> Reward:
        """1 where the text, without space around it, is the answer; else 0."""
        right = answer_of(completion.text) == completion.problem.answer
        return Reward(float(right), right)


def answer_of(text: str) -> str:
    """The first line that says something, without space around it."""
    return text.strip().partition("\n")[0].strip()


def at_least(task: Any, **least: int) -> None:
    """Raise a `ValueError` for an option that is below its bound."""
    for name, bound in least.items():
        if getattr(task, name) < bound:
            raise ValueError(f"{task.word}: {name}={getattr(task, name)}: choose {bound} or more")

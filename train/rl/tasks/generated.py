"""Endless tasks: each problem is a pure function of options, seed, split and index."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from train.rl.problems import TEST_SHARE, answer_of, digest, options
from train.rl.types import Completion, Problem, Reward, Split

_ATTEMPTS = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """Base of generated tasks.

    A hash of the prompt decides the split of a problem, whatever the seed: no seed trains on
    another seed's test problems.

    Attributes:
        seed: Seed of the order of problems.
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
            ValueError: There are so few problems that none is in the split.
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
        """1 where the first line, without space around it, is the answer; else 0."""
        right = answer_of(completion.text) == completion.problem.answer
        return Reward(float(right), right)

"""Base of endless tasks whose problems are generated from options, seed, split and index."""

import dataclasses
from typing import Any

import numpy as np

from train.rl.problems import GeneratedProblems, answer_of, digest
from train.rl.types import Completion, Problem, Reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated(GeneratedProblems):
    """Base of generated tasks; a hash of the prompt decides the split of a problem.

    Attributes:
        seed: Seed of the order of problems.
    """

    def draw(self, rng: np.random.Generator) -> tuple[str, Any, str]:
        """Sample the prompt, the answer and the kind of a problem of either split."""
        raise NotImplementedError(f"{type(self).__name__} draws no problems: write draw(rng)")

    def split_key(self, drawn: tuple[Any, ...]) -> str:
        return drawn[0]

    def made(self, drawn: tuple[Any, ...]) -> Problem:
        prompt, answer, kind = drawn
        return Problem(f"{self.word}-{digest(f'{prompt} {answer}'):016x}", prompt, answer, kind)

    def score(self, completion: Completion) -> Reward:
        """Return reward 1 if the first line that is not blank, stripped, is the answer, else 0."""
        right = answer_of(completion.text) == completion.problem.answer
        return Reward(float(right), right)

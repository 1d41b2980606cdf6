"""Adapter for the tasks of the optional package reasoning-gym."""

import contextlib
import dataclasses
import importlib
import random
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from train.rl.problems import TEST_SHARE, at_least, at_most, digest, options
from train.rl.types import Completion, Problem, Reward, Split

_INSTALL = "pip install reasoning-gym"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """A data set of reasoning-gym, with its scores as rewards.

    A fifth of the distinct questions, those with the smallest hashes, is the test split, so a
    question that occurs twice is in one split only. All questions are generated at the start; if
    this takes long, choose a smaller `size`.

    Attributes:
        dataset: Name of the data set, e.g. "chain_sum".
        size: Number of questions of both splits together.
        options: Options of the data set other than `size` and `seed`, e.g. `{'max_terms': 3}`.
        seed: Seed of the data set.

    Raises:
        ValueError: The package is not installed, it rejects the data set or its options, `options`
            holds `size` or `seed`, `size` is out of range, or all questions are equal.
    """

    word: ClassVar[str] = "reasoning_gym"
    dataset: str
    size: int = 500
    options: dict = dataclasses.field(default_factory=dict)
    seed: int = dataclasses.field(default=0, repr=False)

    def __post_init__(self):
        at_least(self, size=2)
        at_most(self, size=100_000)
        for name in ("size", "seed"):
            if name in self.options:
                raise ValueError(
                    f"task {self.name}: options holds {name}={self.options[name]!r}: "
                    f"give {name} to the task itself"
                )
        try:
            package = importlib.import_module("reasoning_gym")
        except ImportError:
            raise ValueError(f"task {self.name} needs reasoning-gym: {_INSTALL}") from None
        with _own_randomness():
            try:
                data = package.create_dataset(
                    self.dataset, **{**self.options, "size": self.size, "seed": self.seed}
                )
                entries = [data[index] for index in range(self.size)]
            except Exception as error:
                raise ValueError(f"task {self.name}: {error}") from error
        questions = sorted({e["question"] for e in entries}, key=lambda q: (digest(q), q))
        if len(questions) < 2:
            raise ValueError(f"task {self.name} gave one question: choose larger options")
        held = set(questions[: max(1, len(questions) // TEST_SHARE)])
        rows: dict[str, list[tuple[Problem, Any]]] = {"train": [], "test": []}
        for index, entry in enumerate(entries):
            uid = f"{self.word}-{self.dataset}-{digest(entry['question']):016x}"
            problem = Problem(uid, f"{entry['question']}\n", index, self.dataset)
            rows["test" if entry["question"] in held else "train"].append((problem, entry))
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "_data", data)
        object.__setattr__(self, "_entries", entries)

    @property
    def name(self) -> str:
        return self.word + options(self)

    @property
    def sizes(self) -> Mapping[Split, int | None]:
        return {split: len(rows) for split, rows in self.__dict__["_rows"].items()}

    def problem(self, split: Split, index: int) -> Problem:
        return self.__dict__["_rows"][split][index][0]

    def score(self, completion: Completion) -> Reward:
        """Return the data set's score of the response as reward; 1 or more is a success.

        If the package's scorer raises, the reward is 0 and `info` has `scorer_errors` = 1.
        """
        entry = self.__dict__["_entries"][completion.problem.answer]
        with _own_randomness():
            try:
                score = self.__dict__["_data"].score_answer(
                    answer=completion.text.strip(), entry=entry
                )
                value = float(score)
            except Exception:
                return Reward(0.0, False, {"scorer_errors": 1.0})
        return Reward(value, value >= 1.0)


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Context manager that restores global random generators, which the package may seed."""
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])

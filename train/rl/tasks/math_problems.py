"""Task of mathematics problems with answers in LaTeX, read from disk."""

import dataclasses
import importlib.util
from typing import ClassVar

from train.rl.tasks.math_answers import INSTALL, MathGrader
from train.rl.tasks.truthful import boxed
from train.rl.tasks.word_problems import WordProblems
from train.rl.types import Completion, Reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class MathProblems(WordProblems):
    r"""Problems from lines of JSON such as `{"problem": ..., "answer": "\\frac{3}{4}"}`.

    Two plain numbers are compared exactly, all other answers by math-verify (the extra `math`).

    Attributes:
        question: Name of the question's field.
        answer: Name of the answer's field, which has LaTeX, a number, or a solution whose last
            `\boxed{...}` is the answer.
        limit_s: Maximum CPU time of a comparison in seconds. A response that exceeds this limit is
            wrong and counted as `info/grader_timeouts`. A response on which math-verify raises is
            wrong and counted as `info/grader_errors`.

    Raises:
        ValueError: math-verify is not installed, `limit_s` is not above 0 and at most 3600, or an
            answer in the file cannot be parsed.
    """

    word: ClassVar[str] = "math"
    template: str = "{question}\nGive the answer in \\boxed{}.\n"
    question: str = "problem"
    answer: str = "answer"
    limit_s: float = 5.0

    def __post_init__(self):
        if not 0 < self.limit_s <= 3600:
            raise ValueError(f"{self.word}: limit_s={self.limit_s}: choose from above 0 to 3600")
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(f"task {self.word} needs math-verify: {INSTALL}")
        object.__setattr__(self, "_grader", MathGrader(self.limit_s))
        super().__post_init__()
        self.grader.start()  # needed by responses, even if all answers are plain numbers

    @property
    def grader(self) -> MathGrader:
        """Grader that compares responses with answers."""
        return getattr(self, "_grader")  # noqa: B009 (frozen: set past the fields)

    def fields(self) -> tuple[str, str]:
        return self.question, self.answer

    def gold(self, answer: str, where: str) -> str:
        box = boxed(answer)
        gold = (answer if box is None else box).strip()
        try:
            known = bool(gold) and self.grader.has_value(gold)
        except (TimeoutError, RuntimeError) as error:
            raise ValueError(f"{where}: the answer {gold[:60]!r}: {error}: simplify it") from None
        if not known:
            raise ValueError(
                f"{where}: the answer {gold[:60]!r} has no value: write LaTeX or a number"
            )
        return gold

    def score(self, completion: Completion) -> Reward:
        """Return reward 1 if the response gives the right answer, else 0."""
        try:
            right = self.grader.equal(completion.problem.answer, completion.text)
        except TimeoutError:
            return Reward(0.0, False, {"grader_timeouts": 1.0})
        except RuntimeError:
            return Reward(0.0, False, {"grader_errors": 1.0})
        return Reward(float(right), right)

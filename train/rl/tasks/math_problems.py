"""Problems whose answers are mathematics in LaTeX, from disk."""

import dataclasses
import importlib.util
from typing import ClassVar

from train.rl.tasks.math_answers import INSTALL, MathGrader
from train.rl.tasks.truthful import boxed
from train.rl.tasks.word_problems import WordProblems
from train.rl.types import Completion, Reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class MathProblems(WordProblems):
    r"""Problems with answers in LaTeX, lines of `{"problem": ..., "answer": "\\frac{3}{4}"}`.

    An answer is compared by math-verify (the extra `math`), two plain numbers exactly. One of the
    file that has no value stops the run.

    Attributes:
        question: Field of the question.
        answer: Field of the answer: LaTeX, a number, or a solution whose last box is the answer.
        limit_s: Number of seconds of CPU time of a comparison, after which the response counts as
            wrong and as `info/grader_timeouts`. One on which math-verify raises is wrong too, and
            counts as `info/grader_errors`.
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
        self.grader.start()  # plain numbers need it not, but responses may

    @property
    def grader(self) -> MathGrader:
        """What compares answers."""
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
        """1 where the response gives the answer."""
        try:
            right = self.grader.equal(completion.problem.answer, completion.text)
        except TimeoutError:
            return Reward(0.0, False, {"grader_timeouts": 1.0})
        except RuntimeError:
            return Reward(0.0, False, {"grader_errors": 1.0})
        return Reward(float(right), right)

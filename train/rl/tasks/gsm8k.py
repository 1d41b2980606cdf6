"""Word problems in GSM8K's format, from disk."""

import dataclasses
from typing import ClassVar

from train.rl.tasks.numbers import answers_after_mark, final_number, number_text, read_number
from train.rl.tasks.shaping import format_bonus
from train.rl.tasks.word_problems import WordProblems
from train.rl.types import Completion, Reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSM8K(WordProblems):
    """Word problems, lines of `{"question": ..., "answer": "... #### 72"}`.

    Numbers are compared exactly, as fractions (`numbers.read_number`); an answer of the file that
    is not one number stops the run.

    Attributes:
        bonus: Addition to the reward for a number after `####`, right or wrong.
    """

    word: ClassVar[str] = "gsm8k"
    bonus: float = 0.0

    def gold(self, answer: str, where: str) -> str:
        _, mark, after = answer.rpartition("####")
        number = read_number(after) if mark else None
        if number is None:
            found = f"ends in {'####' + after[:40]!r}" if mark else "has no ####"
            raise ValueError(f"{where}: the answer {found}: end it in `#### number`")
        return number_text(number)

    def score(self, completion: Completion) -> Reward:
        """1 where the text's final number is the answer's."""
        right = final_number(completion.text) == completion.problem.answer
        reward = Reward(float(right), right)
        if not self.bonus:
            return reward
        return format_bonus(reward, answers_after_mark(completion.text), self.bonus)

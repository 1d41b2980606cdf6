"""Task of word problems in GSM8K's format, read from disk."""

import dataclasses
from typing import ClassVar

from train.rl.tasks.numbers import answers_after_mark, final_number, number_text, read_number
from train.rl.tasks.shaping import format_bonus
from train.rl.tasks.word_problems import WordProblems
from train.rl.types import Completion, Reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSM8K(WordProblems):
    """Word problems from lines of JSON such as `{"question": ..., "answer": "... #### 72"}`.

    Numbers are compared exactly, as fractions (`numbers.read_number`).

    Attributes:
        bonus: Reward that is added if a number follows the response's last `####`, whether the
            number is right or wrong.

    Raises:
        ValueError: An answer in the file does not end in `####` and one number.
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
        """Return reward 1 if the response's final number (`final_number`) is the answer, else 0.

        A `bonus` other than 0 is added if a number follows the last `####`, and the info then has
        the entry `well_formed`, 1 or 0.
        """
        right = final_number(completion.text) == completion.problem.answer
        reward = Reward(float(right), right)
        if not self.bonus:
            return reward
        return format_bonus(reward, answers_after_mark(completion.text), self.bonus)

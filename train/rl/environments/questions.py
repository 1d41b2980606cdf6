"""Base of environments that ask one question, which tools help to answer."""

import dataclasses
from collections.abc import Mapping, Sequence

from train.rl.environments.generated import GeneratedEnvironment, Move
from train.rl.environments.tools import Tool, call_of, run_tool


@dataclasses.dataclass(frozen=True)
class QuestionState:
    """State of a question.

    Attributes:
        answer: The right answer.
        calls: Number of calls of tools.
        failed: Number of failed calls.
    """

    answer: str
    calls: int = 0
    failed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionWithTools(GeneratedEnvironment):
    """Base: a call is answered by its tool; any other text is the answer and ends the episode.

    The answer of a problem is a pair of the question and its answer. A failed call takes a turn and
    is counted (`tool_errors`).

    Attributes:
        max_argument: Greatest number of characters of a call's argument.
    """

    max_argument: int = 256

    @property
    def tools(self) -> Sequence[Tool]:
        """Tools that can be called."""
        raise NotImplementedError

    def prompt(self, answer: Sequence[str]) -> str:
        return f"{answer[0]} "

    def begin(self, answer: Sequence[str]) -> QuestionState:
        return QuestionState(answer[1])

    def move(self, game: QuestionState, said: str) -> Move | None:
        call = call_of(said, self.tools)
        if call is None:
            return self._answered(game, said) if said else None
        result = run_tool(*call, self.max_argument)
        game = QuestionState(game.answer, game.calls + 1, game.failed + result.failed)
        return Move(game, f" {result.output} ")

    def _answered(self, game: QuestionState, said: str) -> Move:
        right = said == game.answer
        return Move(game, " right " if right else " wrong ", right, not right)

    def reminder(self, game: QuestionState) -> str:
        return " ? "

    def info(self, game: QuestionState) -> Mapping[str, float]:
        return {"tool_calls": float(game.calls), "tool_errors": float(game.failed)}

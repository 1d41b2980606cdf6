"""Base of environments that ask one question and offer tools for answering it."""

import dataclasses
from collections.abc import Mapping, Sequence

from train.rl.environments.generated import GeneratedEnvironment, Move
from train.rl.environments.tools import Tool, call_of, run_tool


@dataclasses.dataclass(frozen=True)
class QuestionState:
    """State of an episode with one question.

    Attributes:
        answer: Right answer.
        calls: Number of tool calls so far.
        failed: Number of tool calls so far that failed.
    """

    answer: str
    calls: int = 0
    failed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionWithTools(GeneratedEnvironment):
    """Base of environments where a tool answers a call, and any other text is the final answer.

    The final answer ends the episode. `Problem.answer` is a pair of the question and its right
    answer. Every call uses up a turn; `info` counts calls as `tool_calls` and failed calls as
    `tool_errors`.

    Attributes:
        max_argument: Maximum number of characters of a call's argument.
    """

    max_argument: int = 256

    @property
    def tools(self) -> Sequence[Tool]:
        """Tools that the policy can call."""
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

"""Adapter that makes a one-response task an environment, for tools and for human players."""

import dataclasses
from collections.abc import Mapping

from train.rl.protocols import Task
from train.rl.scoring import safe_score
from train.rl.types import Completion, Problem, Split, Turn


@dataclasses.dataclass(frozen=True)
class OneTurn:
    """Environment whose only turn is scored by a task: `ToolEnvironment(OneTurn(task), tools)`.

    A state is a tuple of the problem and whether its response was given.

    Attributes:
        task: Task that provides the problems and scores the responses.
        max_turns: Number of turns, always 1.
    """

    task: Task
    max_turns: int = dataclasses.field(default=1, init=False)

    @property
    def failure_value(self) -> float:
        """Reward of a response that the task failed to score; 0 if the task defines none."""
        return float(getattr(self.task, "failure_value", 0.0))

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def sizes(self) -> Mapping[Split, int | None]:
        return self.task.sizes

    def problem(self, split: Split, index: int) -> Problem:
        return self.task.problem(split, index)

    def reset(self, problem: Problem) -> tuple[Problem, bool]:
        return problem, False

    def step(self, state: tuple[Problem, bool], action: Completion) -> Turn:
        """Score a response; the turn that is returned ends the episode.

        Raises:
            ValueError: The episode is over, or the task gives no valid reward (`safe_score`).
        """
        problem, over = state
        if over:
            raise ValueError(f"{self.name}: the episode is over: reset before the next step")
        reward = safe_score(self.task, dataclasses.replace(action, problem=problem))
        observation = " right " if reward.success else " wrong "
        return Turn(
            (problem, True),
            observation,
            reward.value,
            True,
            success=reward.success,
            info=reward.info,
            error=reward.error,
        )

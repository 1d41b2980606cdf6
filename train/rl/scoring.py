"""Rewards of tasks and turns of environments that a run can stand on."""

import math
import traceback
from typing import Any

from train.rl.types import Completion, Problem, Reward, Turn


def safe_score(task: Any, completion: Completion) -> Reward:
    """The task's reward of a completion.

    A scorer that raises has not verified the completion: it is a failure, worth the task's
    `failure_value` (0 where it has none), and counted as `scorer_errors`; `Reward.error` says why.

    Raises:
        ValueError: The task gives no reward, or one that is not finite.
    """
    score = getattr(task, "score", None)
    if score is None:
        raise ValueError(f"task {_name(task)} has no reward: give it a method `score`")
    try:
        reward = score(completion)
    except Exception:  # whatever a text does to a scorer, the run goes on
        return Reward(_failure_value(task), False, {"scorer_errors": 1.0}, traceback.format_exc())
    if not isinstance(reward, Reward):
        raise ValueError(
            f"task {_name(task)} gave no reward for problem {completion.problem.uid} but "
            f"{type(reward).__name__}: return a Reward from `score`"
        )
    for value in (reward.value, reward.verdict or 0.0, *reward.info.values()):
        _check_finite(task, completion.problem, value)
    return reward


def safe_step(task: Any, problem: Problem, state: Any, action: Completion) -> Turn:
    """The environment's turn after an action.

    An environment that raises ends the episode as a failure, worth `failure_value` as in
    `safe_score`.

    Raises:
        ValueError: The environment gives no turn, or a reward that is not finite.
    """
    try:
        turn = task.step(state, action)
    except Exception:
        info, error = {"scorer_errors": 1.0}, traceback.format_exc()
        return Turn(state, "", _failure_value(task), True, info=info, error=error)
    if not isinstance(turn, Turn):
        raise ValueError(
            f"task {_name(task)} gave no reward for problem {problem.uid} but "
            f"{type(turn).__name__}: return a Turn from `step`"
        )
    _check_finite(task, problem, turn.reward)
    for value in turn.info.values():
        _check_finite(task, problem, value)
    return turn


def _failure_value(task: Any) -> float:
    return float(getattr(task, "failure_value", 0.0))


def _check_finite(task: Any, problem: Problem, value: Any) -> None:
    try:
        finite = math.isfinite(value)
    except (TypeError, OverflowError):  # no number, or an int that no float holds
        finite = False
    if not finite:
        raise ValueError(
            f"task {_name(task)} gave problem {problem.uid} the reward {value!r}: "
            "rewards, and numbers of their info, are finite numbers"
        )


def _name(task: Any) -> str:
    return str(getattr(task, "name", type(task).__name__))

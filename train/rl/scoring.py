"""Score responses and step environments, with errors caught and values checked."""

import dataclasses
import math
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from train.devices.distributed import divide, is_multiprocess
from train.rl.types import Completion, Problem, Reward, Turn

_LARGEST_REWARD = 1e18


def safe_score(task: Any, completion: Completion) -> Reward:
    """Score a completion by the task.

    If the scorer raises or calls `sys.exit`, the completion counts as a failure. Its reward is then
    the task's `failure_value` (0 where it has none), its info has `scorer_errors` = 1, and
    `Reward.error` has the traceback.

    Args:
        task: Task with a method `score`.
        completion: Completion to score.

    Raises:
        ValueError: The task has no method `score` or returns something other than a `Reward`, a
            value in the reward is not finite, or its magnitude is above 1e18.
    """
    score = getattr(task, "score", None)
    if score is None:
        raise ValueError(f"task {_name(task)} has no reward: give it a method `score`")
    try:
        reward = score(completion)
    except (Exception, SystemExit):  # whatever a text does to a scorer, the run goes on
        return Reward(_failure_value(task), False, {"scorer_errors": 1.0}, traceback.format_exc())
    if not isinstance(reward, Reward):
        raise ValueError(
            f"task {_name(task)} gave no reward for problem {completion.problem.uid} but "
            f"{type(reward).__name__}: return a Reward from `score`"
        )
    _check_numbers(task, completion.problem, reward.value, reward.verdict or 0.0, reward.info)
    return reward


def score_all(task: Any, completions: Sequence[Completion]) -> list[Reward]:
    """Score completions by `safe_score`, dividing the work among the processes of the run.

    Args:
        task: Task with a method `score`.
        completions: Completions, equal in all processes.

    Raises:
        ValueError: As in `safe_score`, in all processes.
    """
    if not is_multiprocess():
        return [safe_score(task, completion) for completion in completions]

    def score(index: int) -> dict[str, Any]:
        reward = safe_score(task, completions[index])
        return plain_fields(Reward, reward) | {"success": bool(reward.success)}

    return [Reward(**fields) for fields in divide(range(len(completions)), score)]


def plain_fields(kind: type[Any], record: Any) -> dict[str, Any]:
    """Return the fields of a record by name, to be sent to another process.

    Args:
        kind: Class whose fields are returned, `Reward` or `Turn`; fields that a subclass adds are
            left out.
        record: Instance of this class or of a subclass.
    """
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(kind)}
    return fields | {"info": {str(name): value for name, value in record.info.items()}}


def safe_step(task: Any, problem: Problem, state: Any, action: Completion) -> Turn:
    """Step an environment.

    If the environment raises or calls `sys.exit`, the turn ends the episode as a failure. Its
    reward is then the environment's `failure_value` (0 where it has none), its info has
    `scorer_errors` = 1, and `Turn.error` has the traceback.

    Args:
        task: Environment.
        problem: Problem of the episode, for error messages.
        state: State before the action.
        action: Response of the policy.

    Raises:
        ValueError: The environment returns something other than a `Turn`, an observation that is
            not a text, a reward or info that is not finite, or a reward above 1e18 in magnitude.
    """
    try:
        turn = task.step(state, action)
    except (Exception, SystemExit):
        info, error = {"scorer_errors": 1.0}, traceback.format_exc()
        return Turn(state, "", _failure_value(task), True, info=info, error=error)
    if not isinstance(turn, Turn):
        raise ValueError(
            f"task {_name(task)} gave no reward for problem {problem.uid} but "
            f"{type(turn).__name__}: return a Turn from `step`"
        )
    if not isinstance(turn.observation, str):
        raise ValueError(
            f"task {_name(task)} gave problem {problem.uid} an observation of the type "
            f"{type(turn.observation).__name__}: observations are texts"
        )
    _check_numbers(task, problem, turn.reward, 0.0, turn.info)
    return turn


def _failure_value(task: Any) -> float:
    return float(getattr(task, "failure_value", 0.0))


def _check_numbers(
    task: Any, problem: Problem, reward: Any, verdict: float, info: Mapping[str, Any]
) -> None:
    for value in (reward, verdict, *info.values()):
        try:
            finite = math.isfinite(value)
        except (TypeError, OverflowError):  # no number, or an int that no float holds
            finite = False
        if not finite:
            raise ValueError(
                f"task {_name(task)} gave problem {problem.uid} the reward {value!r}: "
                "rewards, and numbers of their info, are finite numbers"
            )
    if abs(reward) > _LARGEST_REWARD:
        raise ValueError(
            f"task {_name(task)} gave problem {problem.uid} the reward {reward!r}: rewards are "
            f"at most {_LARGEST_REWARD:g} in size, so that a float32 holds their squares"
        )


def _name(task: Any) -> str:
    return str(getattr(task, "name", type(task).__name__))

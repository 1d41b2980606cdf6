"""Reward shaping by name: `--reward "overlong(buffer=64)" "invocation(weight=0.1)"`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, get_args

import numpy as np

from memgen.invocations import Rate, Scope, invocation_penalty
from thoughtbubbles.registry import Registry
from train.cli.calls import text_of
from train.rl.tasks.probed import unsolved_problems
from train.rl.tasks.truthful import Reasoning, truthful
from train.rl.types import Episodes, Trajectory


@dataclasses.dataclass(frozen=True)
class RewardShaping:
    """Base of all reward shapings, which change rewards before advantages are estimated.

    A new shaping is a frozen dataclass with a `word` and with options as fields. It overrides
    `__call__` to change rewards, or `of_task` to score responses differently. `__call__` never
    changes which rollouts count as successes. Adding the class as `REWARDS[word]` makes it known to
    `--reward`.
    """

    word: ClassVar[str]
    """Name of the shaping on the command line and in configs."""

    one_response: ClassVar[bool] = False
    """Whether the shaping is defined only for tasks of one response, not for environments."""

    def check(self, config: Any) -> None:
        """Raise a `ValueError` if the config of a run (`RLConfig`) does not fit this shaping."""

    def of_task(self, task: Any) -> Any:
        """Return the `Task` with the scorer that this shaping needs; by default the task itself."""
        return task

    def __call__(
        self,
        reward: np.ndarray,
        trajectories: Sequence[Trajectory],
        episodes: Episodes,
        max_new_tokens: int,
    ) -> np.ndarray:
        """Return the shaped reward of each episode, `[N]` float64; by default the reward itself.

        Args:
            reward: Reward of each episode, `[N]` float64, as the shapings before this one left it.
            trajectories: Rows of the episodes.
            episodes: `N` episodes; `episodes.reward` is unshaped.
            max_new_tokens: Maximum number of tokens per response.
        """
        return reward


@dataclasses.dataclass(frozen=True)
class OverlongPenalty(RewardShaping):
    """Penalty for responses that come close to the length limit (soft overlong punishment of DAPO).

    Attributes:
        buffer: Number of last tokens before the limit over which the penalty grows linearly.
        factor: Penalty of a response that reaches the limit.
    """

    word: ClassVar[str] = "overlong"
    one_response: ClassVar[bool] = True

    buffer: int
    factor: float = 1.0

    def __post_init__(self):
        if self.buffer < 1:
            raise ValueError(f"buffer={self.buffer}: choose 1 or more")
        if not 0 <= self.factor < np.inf:
            raise ValueError(f"factor={self.factor}: choose 0 or more")

    def check(self, config: Any) -> None:
        if self.buffer > config.max_new_tokens:
            raise ValueError(
                f"overlong(buffer={self.buffer}) is more than max_new_tokens="
                f"{config.max_new_tokens}: choose less"
            )

    def __call__(
        self,
        reward: np.ndarray,
        trajectories: Sequence[Trajectory],
        episodes: Episodes,
        max_new_tokens: int,
    ) -> np.ndarray:
        return reward + overlong_penalty(episodes.length, max_new_tokens, self.buffer, self.factor)


@dataclasses.dataclass(frozen=True)
class InvocationPenalty(RewardShaping):
    """Penalty for each invocation of latent memory, smaller if good trajectories invoke often.

    Attributes:
        weight: Weight of the penalty (λ). The paper gives no value, and the authors' code turns the
            penalty off; 0.01 to 0.3 is sensible with rewards of 0 and 1.
        rate: Denominator of the rate of invocation: the number of "decisions" of the trigger (the
            paper's second version) or of all "tokens" of a trajectory (its first version).
        scope: Trajectories that are compared: a "group" (second version) or the whole "batch"
            (first version).
    """

    word: ClassVar[str] = "invocation"

    weight: float = 0.1
    rate: Rate = "decisions"
    scope: Scope = "group"

    def __post_init__(self):
        if not 0 <= self.weight < np.inf:
            raise ValueError(f"weight={self.weight}: choose 0 or more, such as 0.1")
        if self.rate not in get_args(Rate):
            raise ValueError(f"rate={self.rate!r}: choose one of {', '.join(get_args(Rate))}")
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope={self.scope!r}: choose one of {', '.join(get_args(Scope))}")

    def check(self, config: Any) -> None:
        if config.train != "trigger":
            raise ValueError(
                f"the invocation penalty is of a trigger, train={config.train!r} trains none: "
                "leave it out"
            )

    def __call__(
        self,
        reward: np.ndarray,
        trajectories: Sequence[Trajectory],
        episodes: Episodes,
        max_new_tokens: int,
    ) -> np.ndarray:
        penalty = invocation_penalty(
            _decisions(trajectories, episodes),
            episodes.reward,
            episodes.length,
            episodes.group,
            episodes.valid,
            weight=self.weight,
            rate=self.rate,
            scope=self.scope,
        )
        return reward - penalty


@dataclasses.dataclass(frozen=True)
class Ternary(RewardShaping):
    """Reward by outcome, for any task: 1 if right, `abstain` if abstained, -1 if wrong (TruthRL).

    This shaping replaces the task's own scorer by `train.rl.tasks.truthful.TruthfulTask`. Rewards
    in metrics and of held-out problems therefore change too, and the metrics have `info/accuracy`,
    `info/uncertain`, `info/hallucination` and `info/truthfulness`.

    Attributes:
        abstain: Reward of abstaining (r_abstain), from -1 (a binary reward) to below 1. An answer
            has a higher expected reward than abstaining if its probability of being right is above
            (1 + r_abstain) / 2. If advantages are divided by the standard deviation of small
            groups, this threshold holds only for r_abstain = 0 or -1.
        boxed: Whether an answer counts only inside `\\boxed{...}`.
        unknown: Phrase that counts as abstaining; empty for the task's phrase, or "I don't know"
            where the task has none.
        knowledge: Whether only abstaining is rewarded on problems out of knowledge, which the probe
            never solved or the task marks.
        probe: File of `thoughtbubbles probe` that says which problems are out of knowledge; empty
            if the task itself marks these problems.
        reasoning: How the task's score of the reasoning, 0 or 1, changes the reward r of an
            outcome: "multiplicative" gives r (1 + score), "additive" r + score / 2, "conditional"
            the score where r is 1 and r elsewhere, and "none" r.
    """

    word: ClassVar[str] = "ternary"
    one_response: ClassVar[bool] = True

    abstain: float = 0.0
    boxed: bool = False
    unknown: str = ""
    knowledge: bool = False
    probe: str = ""
    reasoning: Reasoning = "none"

    def __post_init__(self):
        if not -1 <= self.abstain < 1:
            raise ValueError(f"abstain={self.abstain}: choose from -1 to below 1, as 1 is right")
        if self.probe and not self.knowledge:
            raise ValueError(f"probe={self.probe!r} is of knowledge=True: set it, or leave it out")
        if self.reasoning not in get_args(Reasoning):
            names = ", ".join(get_args(Reasoning))
            raise ValueError(f"reasoning={self.reasoning!r}: choose one of {names}")

    def check(self, config: Any) -> None:
        parts = config.parts
        searched = parts.strategy is not None and not parts.strategy.on_policy
        graded = self.abstain != -1 or self.knowledge or self.reasoning != "none"
        if searched and parts.advantage.word == "tree" and graded:
            raise ValueError(
                f"advantage tree of a search goes by success alone, 1 or -1, not by "
                f"{text_of(self.word, self)}: choose another advantage such as dr_grpo, or "
                "ternary(abstain=-1.0)"
            )

    def of_task(self, task: Any) -> Any:
        return truthful(task, self, unsolved_problems(self.probe, task) if self.probe else None)


REWARDS = Registry[RewardShaping](
    "reward", {shaping.word: shaping for shaping in (OverlongPenalty, InvocationPenalty, Ternary)}
)


def overlong_penalty(
    length: np.ndarray, max_length: int, buffer: int, factor: float = 1.0
) -> np.ndarray:
    """Compute the soft overlong punishment (DAPO), which is added to the reward of a response.

    Args:
        length: Number of generated tokens of each of `K` responses, `[K]`.
        max_length: Maximum length of a response.
        buffer: Number of last tokens before `max_length` over which the penalty grows linearly.
        factor: Penalty at `max_length`.

    Returns:
        Penalties from -factor to 0, `[K]` float64.

    Raises:
        ValueError: The buffer is not between 1 and `max_length`.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer={buffer} of max_length={max_length}: choose from 1 to that")
    left = max_length - buffer - np.asarray(length, np.float64)
    return np.clip(left / buffer, -1.0, 0.0) * factor


def _decisions(trajectories: Sequence[Trajectory], episodes: Episodes) -> np.ndarray:
    """Concatenate the decisions of each of `N` episodes, `[N, T]` int8, padded with -1."""
    joined = [
        np.concatenate([trajectories[row].decisions for row in rows]) for rows in episodes.rows
    ]
    found = np.full((len(joined), max(map(len, joined))), -1, np.int8)
    for row, decisions in zip(found, joined, strict=True):
        row[: len(decisions)] = decisions
    return found

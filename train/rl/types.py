"""What tasks, environments, strategies and the learner hand to each other."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

Split = Literal["train", "test"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a policy is asked.

    Attributes:
        uid: names it in every run; what is remembered of a problem goes by it.
        prompt: what the policy reads first.
        answer: for the scorer alone; any value that JSON holds.
        kind: for tables and histograms.
    """

    uid: str
    prompt: str
    answer: Any = None
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a policy wrote.

    Attributes:
        problem: that it was asked.
        text: without an id that ended it.
        tokens: its ids, the id that ended it among them.
        finished: whether an id ended it; if not it was cut at the length limit.
    """

    problem: Problem
    text: str
    tokens: tuple[int, ...]
    finished: bool


@dataclasses.dataclass(frozen=True)
class Reward:
    """What a completion is worth.

    Attributes:
        value: what learning goes by.
        success: what statistics, dynamic filtering and evaluation go by.
        info: numbers for the metrics, averaged by name.
    """

    value: float
    success: bool
    info: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Turn:
    """What an environment makes of an action.

    Attributes:
        state: after it.
        observation: what the policy reads next; of the last turn too, nothing is reset.
        reward: of this turn.
        terminated: the episode is over.
        truncated: it was cut, e.g. for its number of turns.
        success: whether it has ended well.
        info: numbers for the metrics.
    """

    state: Any
    observation: str
    reward: float
    terminated: bool
    truncated: bool = False
    success: bool = False
    info: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One row of `L` tokens: what was read and what the policy wrote, in order.

    An episode of several turns is one row, or a row for each turn.

    Attributes:
        group: index of the problem in its batch; advantages compare rows of one group.
        problem: that it is about.
        tokens: `[L]` int32.
        trained: `[L]` bool, tokens that the policy wrote. The others are attended to alone.
        log_probs: `[L]` float32 of these as the sampler saw them, 0 elsewhere.
        decisions: `[L]` int8 of the trigger before each token: -1 not asked, 0 skipped, 1 invoked;
            -1 everywhere without latent memory.
        begins: places of the first token of each response in the row.
        reward: of the row: of its completion, its whole episode, or its turn's return.
        turn_rewards: of all turns of the row's episode.
        episode: number of the episode in its group; its turns may be rows of their own.
        turn: which of its turns the first response in the row is.
        weight: the row counts so many times.
        finished: whether an id ended the last response; if not it was cut at the length limit.
        texts: of the responses.
        advantages: `[L]` float64 that a strategy gives itself, or None.
    """

    group: int
    problem: Problem
    tokens: np.ndarray
    trained: np.ndarray
    log_probs: np.ndarray
    decisions: np.ndarray
    begins: tuple[int, ...]
    reward: Reward
    finished: bool
    texts: tuple[str, ...]
    turn_rewards: tuple[float, ...]
    episode: int
    turn: int = 0
    weight: float = 1.0
    advantages: np.ndarray | None = None

    @property
    def written(self) -> int:
        """Tokens that the policy wrote."""
        return int(self.trained.sum())


@dataclasses.dataclass(frozen=True)
class Collected:
    """The rollouts of a step.

    Attributes:
        trajectories: that are trained on.
        drawn: all rollouts that were made, those of dropped problems too.
        groups: problems drawn, and
        kept: of them trained on.
        written: tokens of all rollouts.
    """

    trajectories: list[Trajectory]
    drawn: list[Trajectory]
    groups: int
    kept: int

    @property
    def written(self) -> int:
        return sum(row.written for row in self.drawn)


@dataclasses.dataclass(frozen=True)
class Episodes:
    """Trajectories by episode, `N` of them: one row each, or a row for each turn.

    Attributes:
        rows: of each episode, indices into the trajectories, in order.
        group: `[N]` int.
        reward: `[N]` float64 as it was given.
        success: `[N]` bool.
        length: `[N]` int, tokens that the policy wrote.
    """

    rows: list[list[int]]
    group: np.ndarray
    reward: np.ndarray
    success: np.ndarray
    length: np.ndarray

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> "Episodes":
        found: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(trajectories):
            found.setdefault((row.group, row.episode), []).append(index)
        first = [trajectories[rows[0]] for rows in found.values()]
        written = [sum(trajectories[row].written for row in rows) for rows in found.values()]
        return cls(
            list(found.values()),
            np.array([row.group for row in first]),
            np.array([row.reward.value for row in first], np.float64),
            np.array([row.reward.success for row in first], bool),
            np.array(written),
        )

    @property
    def valid(self) -> np.ndarray:
        """`[N]` bool, all True: padding comes later."""
        return np.ones(len(self.rows), bool)

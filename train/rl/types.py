"""Records that tasks, environments, strategies and the learner pass to each other."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

Split = Literal["train", "test"]

Source = Literal["direct", "search", "cache", "probe"]
"""Origin of a trajectory: "direct" is a rollout from the prompt, "search" a path of a search tree,
"cache" a solution kept from an earlier visit of the problem, and "probe" a rollout that is used
for success rates alone."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem for the policy: a prompt, and what a scorer needs.

    Attributes:
        uid: Name of the problem, the same in every run; allocators identify problems by this name.
        prompt: Text that the policy is prompted with.
        answer: JSON-serializable value that only the scorer reads.
        kind: Label of the problem for tables and histograms.
    """

    uid: str
    prompt: str
    answer: Any = None
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Completion:
    """A response of the policy.

    Attributes:
        problem: Problem that the policy responds to.
        text: Text of the response, without the stop id.
        tokens: Ids of the response, with the stop id.
        finished: Whether a stop id ended the response; otherwise the length limit truncated it.
    """

    problem: Problem
    text: str
    tokens: tuple[int, ...]
    finished: bool


@dataclasses.dataclass(frozen=True)
class Reward:
    """Outcome of a completion or an episode.

    Attributes:
        value: Reward that advantages are estimated from.
        success: Whether the problem was solved. Allocators and success rates use this, never the
            value.
        info: Numbers for the metrics, keyed by name; they are averaged over episodes.
        error: Traceback of a scorer that raised, or reason why an episode failed; empty if nothing
            failed.
        verdict: Verdict as a number where there are more than two verdicts, e.g. 1 for right, 0 for
            abstained and -1 for wrong; None where `success` is the verdict. Dynamic sampling keeps
            the groups in which the verdict varies.
    """

    value: float
    success: bool
    info: Mapping[str, float] = dataclasses.field(default_factory=dict)
    error: str = dataclasses.field(default="", compare=False, repr=False)
    verdict: float | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
    """Transition of an environment after an action.

    Attributes:
        state: State after the action.
        observation: Text that the policy is shown next. After the last turn, this is the final
            observation of the episode, because environments do not reset themselves.
        reward: Reward of this turn.
        terminated: Whether the episode has ended.
        truncated: Whether the episode was stopped early, e.g. at its maximum number of turns.
        success: Whether the problem was solved.
        info: Numbers for the metrics, keyed by name.
        error: Reason why the episode failed, such as the traceback of an environment that raised;
            empty where it did not fail.
    """

    state: Any
    observation: str
    reward: float
    terminated: bool
    truncated: bool = False
    success: bool = False
    info: Mapping[str, float] = dataclasses.field(default_factory=dict)
    error: str = dataclasses.field(default="", compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One row of `L` tokens: prompt, responses and observations in order.

    An episode of several turns is one row, or a row for each turn.

    Attributes:
        group: Index of the problem in its step; advantages compare episodes of one group.
        problem: Problem of the row.
        tokens: Ids of the row, `[L]` int32.
        trained: Whether the policy generated each token, `[L]` bool; other tokens are only attended
            to.
        log_probs: Log-probabilities of the generated tokens as the sampler computed them, `[L]`
            float32; 0 elsewhere.
        decisions: Decision before each token whether to invoke latent memory, `[L]` int8: 1 to
            invoke, 0 to skip, -1 if no decision was made, as always without latent memory.
        begins: Positions of the first token of each response in the row.
        reward: Reward of the row's episode.
        turn_rewards: Rewards of all turns of the row's episode.
        episode: Index of the episode in its group; rows of one episode share it.
        turn: Index of the row's first turn in the episode.
        weight: Multiplicity of the row in the loss.
        finished: Whether a stop id ended the last response; otherwise the length limit truncated
            it.
        texts: Texts of the responses.
        advantages: Advantages `[L]` float64 that the strategy assigns itself; None to use the run's
            estimator.
        node_values: Value of the search-tree node that each token belongs to, from -1 to 1, `[L]`
            float64; None without a tree.
        values: Value of the state before each token by the policy's value head, `[L]` float64; None
            without a value head.
        source: Origin of the trajectory. Allocators observe the successes of "direct" and "probe"
            alone.
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
    node_values: np.ndarray | None = None
    values: np.ndarray | None = None
    source: Source = "direct"

    @property
    def num_generated(self) -> int:
        """Number of tokens that the policy generated."""
        return int(self.trained.sum())


@dataclasses.dataclass(frozen=True)
class Collected:
    """The rollouts of a step.

    Attributes:
        trajectories: Rows that are trained on.
        drawn: Rows of all rollouts except probes, including rows of groups that are not trained on.
        groups: Number of problems that were drawn.
        kept: Number of problems that are trained on.
        budget: Metrics of the allocator and of the strategy, keyed by name.
        generated: Number of tokens that were generated for the step, including tokens that are in
            no row.
    """

    trajectories: list[Trajectory]
    drawn: list[Trajectory]
    groups: int
    kept: int
    budget: Mapping[str, float] = dataclasses.field(default_factory=dict)
    generated: int = 0


@dataclasses.dataclass(frozen=True)
class Episodes:
    """The `N` episodes of trajectories: an episode is one row, or one row for each turn.

    Attributes:
        rows: For each episode, the indices of its rows into the trajectories, in order.
        group: Index of the group (the problem) of each episode, `[N]` int.
        reward: Unshaped reward of each episode, `[N]` float64.
        success: Whether each episode solved its problem, `[N]` bool.
        verdict: Verdict on each episode, `[N]` float64: `Reward.verdict`, or 1 for a success and 0
            for a failure where it is None.
        length: Number of generated tokens of each episode, `[N]` int.
    """

    rows: list[list[int]]
    group: np.ndarray
    reward: np.ndarray
    success: np.ndarray
    verdict: np.ndarray
    length: np.ndarray

    @classmethod
    def from_trajectories(cls, trajectories: Sequence[Trajectory]) -> "Episodes":
        """Group trajectories into episodes, in the order of first appearance."""
        found: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(trajectories):
            found.setdefault((row.group, row.episode), []).append(index)
        first = [trajectories[rows[0]] for rows in found.values()]
        length = [sum(trajectories[row].num_generated for row in rows) for rows in found.values()]
        return cls(
            list(found.values()),
            np.array([row.group for row in first]),
            np.array([row.reward.value for row in first], np.float64),
            np.array([row.reward.success for row in first], bool),
            np.array([_verdict(row.reward) for row in first], np.float64),
            np.array(length),
        )

    @property
    def valid(self) -> np.ndarray:
        """Episodes that are not padding, `[N]` bool: all are True."""
        return np.ones(len(self.rows), bool)


def _verdict(reward: Reward) -> float:
    return float(reward.success) if reward.verdict is None else reward.verdict

"""What a policy did, as rows: the one record that every method hands to the learner."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from memgen.insertion import INFERENCE, PROMPT
from train.rl.protocols import Problem, Reward

SHORTEST = 16


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


Rows = dict[str, np.ndarray]
"""Arrays `[K, ...]` that the learner takes (`make_rows`)."""


def make_rows(
    trajectories: Sequence[Trajectory],
    advantages: Sequence[np.ndarray],
    multiple: int = 1,
    events: int = 0,
) -> Rows:
    """Rows padded on the right to one length, and by filler rows to a bucket of rows.

    Args:
        trajectories: `N`, at least one.
        advantages: of each, `[L]` or a scalar for all of its tokens.
        multiple: the number of rows is one of this times a power of two.
        events: room for so many events of latent memory in a row; 0 writes no plan.

    Returns:
        `tokens`, `trained`, `decisions` and the sampler's log-probabilities `sampler` `[K, L]`;
        `advantages [K, L]` float32; `length [K]`; `weight [K]`; `valid [K]`, False for filler;
        with `events` the plan, `point` and `kind` `[K, E]` int32.
    """
    count = bucket(len(trajectories), multiple)
    length = bucket(max(len(row.tokens) for row in trajectories), SHORTEST)

    def wide(name: str, dtype: Any, blank: Any = 0) -> np.ndarray:
        array = np.full((count, length), blank, dtype)
        for filled, row in zip(array, trajectories, strict=False):
            filled[: len(row.tokens)] = getattr(row, name)
        return array

    scaled = np.zeros((count, length), np.float32)
    for filled, row, advantage in zip(scaled, trajectories, advantages, strict=False):
        filled[: len(row.tokens)] = advantage
    rows = {
        "tokens": wide("tokens", np.int32),
        "trained": wide("trained", bool, False),
        "sampler": wide("log_probs", np.float32),
        "advantages": scaled,
        # A filler row is one token long: no program meets an empty row.
        "length": np.array([len(row.tokens) for row in trajectories], np.int32),
        "valid": np.arange(count) < len(trajectories),
        "weight": np.array([row.weight for row in trajectories], np.float32),
    }
    for name in ("length", "weight"):
        rows[name] = np.pad(rows[name], (0, count - len(trajectories)), constant_values=1)
    if events:
        rows["decisions"] = wide("decisions", np.int8, -1)
        rows["point"], rows["kind"] = _plans(trajectories, count, events)
    return rows


def _plans(
    trajectories: Sequence[Trajectory], count: int, events: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where memory was written, exactly as it was in sampling: points and kinds `[K, E]`."""
    point = np.full((count, events), -1, np.int32)
    kind = np.full((count, events), INFERENCE, np.int32)
    for index, row in enumerate(trajectories):
        places = np.flatnonzero(row.decisions == 1)
        if len(places) > events:
            raise ValueError(f"a row of {len(places)} events, there is room for {events}")
        point[index, : len(places)] = places
        kind[index, : len(places)] = np.where(np.isin(places, row.begins), PROMPT, INFERENCE)
    return point, kind


def bucket(size: int, multiple: int = 1) -> int:
    """`multiple` times a power of two, `size` or more."""
    parts = -(-max(size, 1) // multiple)
    return multiple * (1 << (parts - 1).bit_length())

"""Padding of trajectories to rows of one length, the input of every method's learner."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from memgen.insertion import INFERENCE, PROMPT
from train.rl.buckets import SHORTEST, bucket
from train.rl.types import Trajectory

Rows = dict[str, np.ndarray]
"""Dict from name to array `[K, ...]` over K rows, the learner's input (`make_rows`)."""


def make_rows(
    trajectories: Sequence[Trajectory],
    advantages: Sequence[np.ndarray],
    multiple: int = 1,
    events: int = 0,
    returns: Sequence[np.ndarray] | None = None,
) -> Rows:
    """Pad trajectories on the right to a common length L, and add padding rows up to K rows.

    Args:
        trajectories: `N` trajectories, at least one.
        advantages: Advantages of the tokens of each trajectory, one number per token, or a scalar
            for all of its tokens.
        multiple: Factor of the number of rows: K is `multiple` times a power of two.
        events: Capacity E of a row for latent-memory events; 0 without latent memory.
        returns: For each token of each trajectory, the return that a value head learns to predict
            before the token; None without a value head.

    Returns:
        A dict of arrays. Always: `tokens [K, L]` int32, `trained [K, L]` bool, `sampler [K, L]`
        float32 (the sampler's log-probabilities), `advantages [K, L]` float32, `length [K]` int32
        and `weight [K]` float32 (both 1 for padding rows), and `valid [K]` bool, False for padding
        rows. With `events`: `decisions [K, L]` int8, padded with -1, and the plan of events,
        `point` and `kind` `[K, E]` int32, where an unused event has point -1. With `returns`:
        `returns` and the trajectories' `values`, `[K, L]` float32. All other arrays are padded with
        0.

    Raises:
        ValueError: A trajectory has more than `events` events.
    """
    count = bucket(len(trajectories), multiple)
    length = bucket(max(len(row.tokens) for row in trajectories), SHORTEST)

    def wide(name: str, dtype: Any, blank: Any = 0) -> np.ndarray:
        array = np.full((count, length), blank, dtype)
        for filled, row in zip(array, trajectories, strict=False):
            filled[: len(row.tokens)] = getattr(row, name)
        return array

    def floats(values: Sequence[Any]) -> np.ndarray:
        array = np.zeros((count, length), np.float32)
        for filled, row, value in zip(array, trajectories, values, strict=False):
            filled[: len(row.tokens)] = value
        return array

    rows = {
        "tokens": wide("tokens", np.int32),
        "trained": wide("trained", bool, False),
        "sampler": wide("log_probs", np.float32),
        "advantages": floats(advantages),
        # A padding row is one token long: no program meets an empty row.
        "length": np.array([len(row.tokens) for row in trajectories], np.int32),
        "valid": np.arange(count) < len(trajectories),
        "weight": np.array([row.weight for row in trajectories], np.float32),
    }
    for name in ("length", "weight"):
        rows[name] = np.pad(rows[name], (0, count - len(trajectories)), constant_values=1)
    if events:
        rows["decisions"] = wide("decisions", np.int8, -1)
        rows["point"], rows["kind"] = _plans(trajectories, count, events)
    if returns is not None:
        rows["values"], rows["returns"] = wide("values", np.float32), floats(returns)
    return rows


def _plans(
    trajectories: Sequence[Trajectory], count: int, events: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the points and the kinds, `[K, E]` int32, of events that were woven in sampling."""
    point = np.full((count, events), -1, np.int32)
    kind = np.full((count, events), INFERENCE, np.int32)
    for index, row in enumerate(trajectories):
        positions = np.flatnonzero(row.decisions == 1)
        if len(positions) > events:
            raise ValueError(f"a row of {len(positions)} events, its capacity is {events}")
        point[index, : len(positions)] = positions
        kind[index, : len(positions)] = np.where(np.isin(positions, row.begins), PROMPT, INFERENCE)
    return point, kind

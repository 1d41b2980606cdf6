"""What is written down of a step: rollouts, held-out episodes, updates."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from train.rl.learning.advantages import in_mixed_group
from train.rl.types import Collected, Episodes, Trajectory


def mixed_groups(rows: Sequence[Trajectory]) -> list[int]:
    """Groups of which some episodes succeed and some do not, rising."""
    episodes = Episodes.of(rows)
    told = in_mixed_group(episodes.success, episodes.group, episodes.valid)
    return np.unique(episodes.group[told]).tolist()


def rollout_metrics(collected: Collected) -> dict[str, float]:
    """Of all rollouts that were made."""
    rows = collected.drawn
    episodes = Episodes.of(rows)
    names = sorted({name for row in rows for name in row.reward.info})
    # All rows of an episode have its info.
    first = [rows[turns[0]].reward.info for turns in episodes.rows]
    info = {f"info/{name}": float(np.mean([i.get(name, 0.0) for i in first])) for name in names}
    return {
        "reward": float(episodes.reward.mean()),
        "success": float(episodes.success.mean()),
        "length": float(episodes.length.mean()),
        "finished": float(np.mean([row.finished for row in rows])),
        "mixed_groups": len(mixed_groups(rows)) / collected.groups,
        "groups": collected.groups,
        "kept": collected.kept,
        "rollouts": len(episodes.rows),
        **invocations(rows, len(episodes.rows)),
        **info,
    }


def standard_error(episodes: Episodes, rows: Sequence[Trajectory]) -> float:
    """Of the share of successes; answers to a problem that comes several times are one draw."""
    uids = [rows[turns[0]].problem.uid for turns in episodes.rows]
    _, which = np.unique(uids, return_inverse=True)
    deviation = np.bincount(which, weights=episodes.success - episodes.success.mean())
    return float(np.sqrt((deviation**2).sum()) / len(uids))


def invocations(rows: Sequence[Trajectory], episodes: int) -> dict[str, float]:
    """Of latent memory: per episode, and as a share of what was asked."""
    asked = sum(int((row.decisions >= 0).sum()) for row in rows)
    invoked = sum(int((row.decisions == 1).sum()) for row in rows)
    if not asked:
        return {}
    return {"invocations": invoked / episodes, "invocation_rate": invoked / asked}


def learning_metrics(learned: dict[str, Any]) -> dict[str, float]:
    """Of the optimizer steps of a step: sums to means."""
    sums = learned["sums"]
    tokens = max(float(sums["tokens"]), 1.0)
    means = {
        name: float(sums[name]) / tokens
        for name in ("clipped", "ref_kl", "approx_kl", "ratio")
        if name in sums
    }
    names = ("loss", "grad_norm", "learning_rate")
    return {name: learned[name] for name in names} | means

"""Metrics of a step: of its rollouts, held-out episodes, updates, and time."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from train.rl.learning.advantages import in_mixed_group
from train.rl.types import Collected, Episodes, Trajectory


def mixed_groups(rows: Sequence[Trajectory]) -> list[int]:
    """Indices of groups whose episodes differ in their verdict, in rising order."""
    episodes = Episodes.from_trajectories(rows)
    mixed = in_mixed_group(episodes.verdict, episodes.group, episodes.valid)
    return np.unique(episodes.group[mixed]).tolist()


def rollout_metrics(collected: Collected) -> dict[str, float]:
    """Means over all rollouts of a step, those of dropped problems too."""
    rows = collected.drawn
    episodes = Episodes.from_trajectories(rows)
    mixed = mixed_groups(rows)
    return {
        "reward": float(episodes.reward.mean()),
        "success": float(episodes.success.mean()),
        "length": float(episodes.length.mean()),
        "finished": float(np.mean([row.finished for row in rows])),
        # The ratio of effective gradients, per problem and per rollout.
        "mixed_groups": len(mixed) / collected.groups,
        "mixed_rollouts": float(np.isin(episodes.group, mixed).mean()),
        "groups": collected.groups,
        "kept": collected.kept,
        "rollouts": len(episodes.rows),
        **collected.budget,
        **invocations(rows, len(episodes.rows)),
        **info_metrics(rows, episodes),
    }


def held_out_metrics(rows: Sequence[Trajectory]) -> dict[str, float]:
    """Means over held-out episodes, with the standard error of the success rate."""
    episodes = Episodes.from_trajectories(rows)
    return {
        "success": float(episodes.success.mean()),
        "standard_error": standard_error(episodes, rows),
        "reward": float(episodes.reward.mean()),
        "length": float(episodes.length.mean()),
        **invocations(rows, len(episodes.rows)),
        **info_metrics(rows, episodes),
    }


def info_metrics(rows: Sequence[Trajectory], episodes: Episodes) -> dict[str, float]:
    """Means over episodes of what scorers note in a reward's info."""
    first = [
        rows[turns[0]].reward.info for turns in episodes.rows
    ]  # all rows of an episode have it
    names = sorted({name for info in first for name in info})
    return {f"info/{name}": float(np.mean([i.get(name, 0.0) for i in first])) for name in names}


def timing_metrics(
    collected: Collected, epochs: int, rollout_seconds: float, update_seconds: float
) -> dict[str, float]:
    """Seconds of both halves of a step, and generated tokens per second.

    Args:
        collected: Rollouts of the step.
        epochs: Number of passes over the rollouts that are trained on.
        rollout_seconds: Seconds that the rollouts took.
        update_seconds: Seconds that the update took.
    """
    trained = sum(row.written for row in collected.trajectories)
    return {
        "rollout_seconds": rollout_seconds,
        "update_seconds": update_seconds,
        "rollout_tokens_per_second": collected.generated / rollout_seconds,
        "update_tokens_per_second": trained * epochs / update_seconds,
    }


def standard_error(episodes: Episodes, rows: Sequence[Trajectory]) -> float:
    """Standard error of the success rate; all answers to one problem are one draw."""
    uids = [rows[turns[0]].problem.uid for turns in episodes.rows]
    _, which = np.unique(uids, return_inverse=True)
    deviation = np.bincount(which, weights=episodes.success - episodes.success.mean())
    return float(np.sqrt((deviation**2).sum()) / len(uids))


def invocations(rows: Sequence[Trajectory], episodes: int) -> dict[str, float]:
    """Invocations of latent memory: per episode, and as a share of the decisions."""
    decisions = sum(int((row.decisions >= 0).sum()) for row in rows)
    invoked = sum(int((row.decisions == 1).sum()) for row in rows)
    if not decisions:
        return {}
    return {"invocations": invoked / episodes, "invocation_rate": invoked / decisions}


def learning_metrics(learned: dict[str, Any]) -> dict[str, float]:
    """Means over the tokens and the optimizer steps of a step.

    Args:
        learned: Metrics of `Learner.update`.
    """
    sums = learned["sums"]
    if "tokens" not in sums:
        raise ValueError("the loss returns no sum 'tokens' (see PolicyLoss): its metrics need one")
    tokens = max(float(sums["tokens"]), 1.0)
    means = {name: float(value) / tokens for name, value in sums.items() if name != "tokens"}
    names = ("loss", "grad_norm", "learning_rate")
    return {name: learned[name] for name in names} | means

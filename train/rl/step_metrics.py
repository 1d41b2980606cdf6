"""Metrics of rollouts, of held-out episodes, of updates, and of throughput."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from train.rl.learning.advantages import in_mixed_group
from train.rl.types import Collected, Episodes, Trajectory


def mixed_groups(rows: Sequence[Trajectory]) -> list[int]:
    """Return the indices of groups whose episodes differ in their verdict, in increasing order."""
    episodes = Episodes.from_trajectories(rows)
    mixed = in_mixed_group(episodes.verdict, episodes.group, episodes.valid)
    return np.unique(episodes.group[mixed]).tolist()


def rollout_metrics(collected: Collected) -> dict[str, float]:
    """Compute the metrics of all rollouts of a step, including those of dropped problems.

    Returns:
        A dict. `reward`, `success`, `length` (in tokens) and `info/...` are means over episodes.
        `finished` is the fraction of rows that end with a stop id. `mixed_groups` and
        `mixed_rollouts` are the fractions of problems and of episodes in groups whose episodes
        differ in their verdict. `groups` is the number of problems that were drawn, `kept` the
        number of problems that are trained on, and `rollouts` the number of episodes. The metrics
        of `Collected.budget` and of `invocations` are included.
    """
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
    """Compute the metrics of held-out episodes.

    Returns:
        Means over episodes of `success`, `reward`, `length` (in tokens) and `info/...`, the
        `standard_error` of the success rate, and the metrics of `invocations`.
    """
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
    """Average each number of `Reward.info` over episodes, as a metric `info/NAME`.

    An episode whose info lacks the number counts as 0.

    Args:
        rows: Rows of the episodes.
        episodes: Episodes of the rows.
    """
    first = [
        rows[turns[0]].reward.info for turns in episodes.rows
    ]  # all rows of an episode have it
    names = sorted({name for info in first for name in info})
    return {f"info/{name}": float(np.mean([i.get(name, 0.0) for i in first])) for name in names}


def timing_metrics(
    collected: Collected, epochs: int, rollout_seconds: float, update_seconds: float
) -> dict[str, float]:
    """Compute the throughput of the rollouts and of the update of a step.

    Args:
        collected: Rollouts of the step.
        epochs: Number of passes over the rollouts that are trained on.
        rollout_seconds: Duration of the rollouts in seconds.
        update_seconds: Duration of the update in seconds.

    Returns:
        `rollout_seconds` and `update_seconds` as given; `rollout_tokens_per_second`, which counts
        all generated tokens; and `update_tokens_per_second`, which counts each trained token once
        per epoch.
    """
    trained = sum(row.num_generated for row in collected.trajectories)
    return {
        "rollout_seconds": rollout_seconds,
        "update_seconds": update_seconds,
        "rollout_tokens_per_second": collected.generated / rollout_seconds,
        "update_tokens_per_second": trained * epochs / update_seconds,
    }


def standard_error(episodes: Episodes, rows: Sequence[Trajectory]) -> float:
    """Compute the standard error of the success rate, clustered by problem.

    Deviations from the mean are summed over the episodes of a problem before squaring, because
    episodes of one problem are not independent.

    Args:
        episodes: Episodes.
        rows: Rows of the episodes.
    """
    uids = [rows[turns[0]].problem.uid for turns in episodes.rows]
    _, which = np.unique(uids, return_inverse=True)
    deviation = np.bincount(which, weights=episodes.success - episodes.success.mean())
    return float(np.sqrt((deviation**2).sum()) / len(uids))


def invocations(rows: Sequence[Trajectory], episodes: int) -> dict[str, float]:
    """Count the invocations of latent memory.

    Args:
        rows: Rows of the episodes.
        episodes: Number of episodes.

    Returns:
        `invocations` per episode and `invocation_rate` per decision; empty without decisions.
    """
    decisions = sum(int((row.decisions >= 0).sum()) for row in rows)
    invoked = sum(int((row.decisions == 1).sum()) for row in rows)
    if not decisions:
        return {}
    return {"invocations": invoked / episodes, "invocation_rate": invoked / decisions}


def learning_metrics(learned: dict[str, Any]) -> dict[str, float]:
    """Divide the sums of an update by its number of trained tokens.

    Args:
        learned: Metrics of `Learner.update`.

    Returns:
        `loss`, `grad_norm` and `learning_rate` unchanged, and the mean over trained tokens of each
        of the loss's `sums` except `tokens`.

    Raises:
        ValueError: The loss returns no sum `tokens`.
    """
    sums = learned["sums"]
    if "tokens" not in sums:
        raise ValueError("the loss returns no sum 'tokens' (see PolicyLoss): its metrics need one")
    tokens = max(float(sums["tokens"]), 1.0)
    means = {name: float(value) / tokens for name, value in sums.items() if name != "tokens"}
    names = ("loss", "grad_norm", "learning_rate")
    return {name: learned[name] for name in names} | means

"""State of tree search between steps: problems set aside, and solutions of hard problems."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.rl.types import Problem, Reward, Trajectory

MOST_SOLUTIONS = 16
"""Maximum number of solutions of a problem that are kept."""


class SolvedProblems:
    """Classification of problems as hard or set aside, with solutions of the hard problems.

    A problem is unknown before its first visit. After each visit, the problem is hard if the
    visit's success rate was at most the threshold; otherwise the problem is set aside and its
    solutions are dropped. The solutions of a hard problem accumulate over visits.

    Args:
        threshold: Maximum success rate of a problem that counts as hard (δ).
    """

    def __init__(self, threshold: float):
        self._threshold = threshold
        self._hard: dict[str, list[dict[str, Any]]] = {}
        self._aside: set[str] = set()

    def is_known(self, uid: str) -> bool:
        """Return whether a problem is hard or set aside, rather than unknown."""
        return uid in self._hard or uid in self._aside

    def is_aside(self, uid: str) -> bool:
        """Return whether a problem is set aside."""
        return uid in self._aside

    def is_hard(self, rate: float) -> bool:
        """Return whether a success rate is at most the threshold."""
        return rate <= self._threshold

    def requeue(self) -> None:
        """Make all problems that are set aside unknown again."""
        self._aside.clear()

    def visited(self, uid: str, rate: float, rows: Sequence[Trajectory] = ()) -> None:
        """Classify a problem by its last visit, and keep its solutions if it is hard.

        Args:
            uid: Name of the problem (`Problem.uid`).
            rate: Success rate of the visit.
            rows: Trajectories of the visit; successful trajectories are solutions. The newest
                `MOST_SOLUTIONS` different solutions of a problem are kept.
        """
        if not self.is_hard(rate):
            self._hard.pop(uid, None)
            self._aside.add(uid)
            return
        self._aside.discard(uid)
        kept = self._hard.setdefault(uid, [])
        for row in rows:
            if row.reward.success and (solution := _as_json(row)):
                kept[:] = [old for old in kept if not _same_text(old, solution)]
                kept.append(solution)
        del kept[:-MOST_SOLUTIONS]

    def solutions(
        self, group: int, problem: Problem, most: int, rng: np.random.Generator
    ) -> list[Trajectory]:
        """Sample up to `most` kept solutions of a problem, without replacement.

        Args:
            group: Index of the problem in its step, as `Trajectory.group`.
            problem: Problem whose solutions are sampled.
            most: Maximum number of solutions.
            rng: Random generator.

        Returns:
            Trajectories with the source "cache", from the oldest to the newest.
        """
        kept = self._hard.get(problem.uid, [])
        chosen = rng.permutation(len(kept))[:most]
        return [_from_json(kept[index], group, problem) for index in sorted(chosen.tolist())]

    @property
    def num_solutions(self) -> int:
        """Number of kept solutions, summed over all problems."""
        return sum(map(len, self._hard.values()))

    @property
    def num_hard(self) -> int:
        """Number of hard problems."""
        return len(self._hard)

    @property
    def num_aside(self) -> int:
        """Number of problems that are set aside."""
        return len(self._aside)

    @property
    def state(self) -> dict[str, Any]:
        """Dict of `hard`, a mapping from uid to solutions, and `aside`, a list of uids; as JSON."""
        return {"hard": self._hard, "aside": sorted(self._aside)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the `state` that a checkpoint has stored."""
        self._hard = {uid: list(kept) for uid, kept in state["hard"].items()}
        self._aside = set(state["aside"])


def _as_json(row: Trajectory) -> dict[str, Any]:
    """Convert a trajectory to JSON without its group and problem; log-probabilities stay exact."""
    names = ("tokens", "trained", "log_probs", "decisions")
    arrays = {name: getattr(row, name).tolist() for name in names}
    tuples = {name: list(getattr(row, name)) for name in ("begins", "texts", "turn_rewards")}
    tuples["turn_rewards"] = [float(reward) for reward in row.turn_rewards]
    verdict = row.reward.verdict
    reward = {  # scorers may give numbers of NumPy
        "value": float(row.reward.value),
        "success": bool(row.reward.success),
        "info": {name: float(number) for name, number in row.reward.info.items()},
        "verdict": None if verdict is None else float(verdict),
    }
    return {**arrays, **tuples, "finished": bool(row.finished), "reward": reward}


def _same_text(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[name] == other[name] for name in ("tokens", "decisions"))


def _from_json(kept: Mapping[str, Any], group: int, problem: Problem) -> Trajectory:
    return Trajectory(
        group=group,
        problem=problem,
        tokens=np.array(kept["tokens"], np.int32),
        trained=np.array(kept["trained"], bool),
        log_probs=np.array(kept["log_probs"], np.float32),
        decisions=np.array(kept["decisions"], np.int8),
        begins=tuple(kept["begins"]),
        reward=Reward(**kept["reward"]),
        finished=kept["finished"],
        texts=tuple(kept["texts"]),
        turn_rewards=tuple(kept["turn_rewards"]),
        episode=0,
        source="cache",
    )

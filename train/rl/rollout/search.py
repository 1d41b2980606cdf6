"""Tree search as a rollout strategy (DeepSearch, arXiv 2509.25454)."""

import dataclasses
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from train.rl.rollout.formatter import PromptFormatter
from train.rl.rollout.sampler import Sampler
from train.rl.rollout.search_tree import SearchOptions
from train.rl.rollout.searching import Limits, Searcher
from train.rl.rollout.solved_problems import SolvedProblems
from train.rl.rollout.strategies import LONGEST, STRATEGIES, OneResponse, RolloutStrategy, Turns
from train.rl.rollout.tree_export import append_tree
from train.rl.types import Problem, Trajectory

_STEP_LEN = 256
_DEPTH = 8


@dataclasses.dataclass(frozen=True)
class TreeSearchOptions(SearchOptions):
    """Options of tree searches in training.

    Attributes:
        step_len: Maximum number of tokens of a node, at most `max_new_tokens`. None for the paper's
            256, or an eighth of the longest response if that is less. Must be None in an
            environment, where a node is a turn.
        cache_mib: Maximum size in MiB of the cached states of nodes that searches may continue.
            Beyond this size the least recently used states are evicted, and prefilled again when
            needed.
        probe: Number of direct rollouts (K) of a problem that decide whether the problem is hard; 0
            treats every problem without kept solutions as hard.
        threshold: Maximum success rate of a problem that counts as hard and is searched (δ).
        max_turns: Number of turns after which an episode is truncated. None takes the environment's
            `max_turns`, or 8 if it has none.
        max_observation: Maximum number of tokens of an observation; longer ones are truncated.
        export: File to which the first tree of each step is appended as a line of JSON; empty for
            no export.
    """

    step_len: int | None = None
    cache_mib: float = 1024.0
    probe: int = 4
    threshold: float = 0.25
    max_turns: int | None = None
    max_observation: int = 64
    export: str = ""

    def __post_init__(self):
        super().__post_init__()
        least = {"step_len": 1, "probe": 0, "max_turns": 1, "max_observation": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name}={value}: choose {bound} or more")
        if self.max_observation > LONGEST:
            raise ValueError(f"max_observation={self.max_observation}: choose {LONGEST} or less")
        if not 0 < self.cache_mib < math.inf:
            raise ValueError(f"cache_mib={self.cache_mib}: choose a number of MiB above 0")
        if not 0 <= self.threshold < 1:
            raise ValueError(
                f"threshold={self.threshold}: choose a success rate from 0 to below 1, as at 1 no "
                "problem is ever set aside"
            )


OPTIONS = [field.name for field in dataclasses.fields(TreeSearchOptions)]
"""Names of the options, which are also options of the method `deepsearch`."""


@dataclasses.dataclass(frozen=True)
class TreeSearch(TreeSearchOptions, RolloutStrategy):
    """Tree search on hard problems, where each rollout is a path to a terminal (DeepSearch).

    At each visit, the success rate of `probe` direct rollouts decides whether a problem is hard.
    The group of an easy problem consists of direct rollouts, and the problem is set aside. A hard
    problem is searched, and its group consists of the terminals that the search backed up. A
    problem with solutions from earlier visits is not searched: its group consists of these
    solutions and of direct rollouts, whose success rate decides whether the problem is still hard.
    """

    word: ClassVar[str] = "tree_search"
    episodic: ClassVar[bool | None] = None
    on_policy: ClassVar[bool] = False

    _: dataclasses.KW_ONLY
    turns: int = dataclasses.field(default=0, repr=False)
    """Maximum number of turns of an episode; 0 for a task of one response. Set by the run."""

    _kept: dict[str, Any] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self):
        super().__post_init__()
        self._kept.update(solved=SolvedProblems(self.threshold), counts={})

    def for_run(self, formatter: PromptFormatter, config: Any) -> "TreeSearch":
        if self.step_len is not None and self.step_len > config.max_new_tokens:
            raise ValueError(
                f"step_len={self.step_len} is longer than a response, max_new_tokens="
                f"{config.max_new_tokens}: choose at most that, an eighth of it or so"
            )
        return super().for_run(formatter, config)

    def for_task(self, task: Any) -> "TreeSearch":
        if not hasattr(task, "step"):
            for name in ("max_turns", "max_observation"):
                if (value := getattr(self, name)) != getattr(TreeSearchOptions, name):
                    raise ValueError(
                        f"{name}={value} is for environments, {task.name} is a task of one "
                        "response: leave it out"
                    )
            return self
        if self.step_len is not None:
            raise ValueError(
                f"step_len={self.step_len} is for tasks of one response, in {task.name} a node is "
                "a turn: leave it out"
            )
        if self.formatter.chat:
            raise ValueError(
                f"tree_search goes on in one text, chat=True writes each turn of {task.name} anew: "
                "leave one of them out"
            )
        limit = Turns(self.max_turns).for_task(task).turn_limit
        return dataclasses.replace(self, turns=limit)

    @property
    def responses_per_row(self) -> int:
        return max(self.turns, 1)

    @property
    def for_held_out(self) -> RolloutStrategy:
        return self._direct

    @property
    def _direct(self) -> RolloutStrategy:
        """Strategy for direct rollouts: `OneResponse`, or `Turns` in an environment."""
        names = ("formatter", "max_new_tokens", "environment_limit_s")
        shared = {name: getattr(self, name) for name in names}
        if not self.turns:
            return OneResponse(**shared)
        return self.share_limits(Turns(self.turns, self.max_observation, True, **shared))

    @property
    def limits(self) -> Limits:
        """Limits of the searches of a run, in tokens, turns and bytes."""
        step_len = self.step_len or min(_STEP_LEN, -(-self.max_new_tokens // _DEPTH))
        return Limits(
            step_len, self.max_new_tokens, self.turns, self.max_observation,
            self.cache_mib * 2**20,
        )  # fmt: skip

    @property
    def _solved(self) -> SolvedProblems:
        return self._kept["solved"]

    def collect(
        self,
        sampler: Sampler,
        task: Any,
        problems: Sequence[Problem],
        counts: Sequence[int],
        seed: Sequence[int],
    ) -> list[Trajectory]:
        visit = _Visit(sampler, task, problems, seed)
        active = {group: count for group, count in enumerate(counts) if count}
        aside = [group for group in active if self._solved.is_aside(problems[group].uid)]
        replayed = self._replay(visit, active)
        # A search does not show how often the policy succeeds; the probes of each visit do.
        probed = [group for group in active if group not in aside and group not in replayed]
        probes = self._respond(visit, dict.fromkeys(probed, self.probe))
        easy = [group for group in probed if probes[group] and not self._is_hard(probes[group])]
        more = {group: active[group] - self.probe for group in easy}
        more |= {group: active[group] for group in aside}
        more |= {group: active[group] - len(rows) for group, rows in replayed.items()}
        fresh = self._respond(visit, more, 1)
        searched = self._search(
            visit, {group: count for group, count in active.items() if group not in more}
        )
        found = []
        for group, count in active.items():
            direct = [*probes.get(group, ()), *fresh.get(group, ())]
            rows = searched.get(group) or [*replayed.get(group, ()), *direct][:count]
            solutions = [*searched.get(group, ()), *direct]
            self._solved.visited(problems[group].uid, _rate(direct), solutions)
            successes = sum(row.reward.success for row in direct)
            self._add({"direct_rollouts": len(direct), "direct_success": successes})
            # Direct rollouts outside of the group only count for success rates.
            probing = (
                direct if group in searched else direct[count - len(replayed.get(group, ())) :]
            )
            rows = [_with_values(row) for row in rows]
            rows += [dataclasses.replace(row, source="probe") for row in probing]
            found += [dataclasses.replace(row, episode=at) for at, row in enumerate(rows)]
        self._add({"direct": len(easy) + len(aside), "replayed": len(replayed)})
        return found

    def _respond(
        self, visit: "_Visit", counts: Mapping[int, int], *salt: int
    ) -> dict[int, list[Trajectory]]:
        """Make `counts[group]` direct rollouts of each group, and return these by group."""
        groups = [group for group in sorted(counts) if counts[group] > 0]
        rows = self._direct.collect(
            visit.sampler, visit.task, [visit.problems[group] for group in groups],
            [counts[group] for group in groups], (*visit.seed, *salt),
        )  # fmt: skip
        found: dict[int, list[Trajectory]] = {group: [] for group in counts}
        for row in rows:
            group = groups[row.group]
            found[group].append(dataclasses.replace(row, group=group))
        return found

    def _replay(self, visit: "_Visit", counts: Mapping[int, int]) -> dict[int, list[Trajectory]]:
        """Sample solutions of earlier visits; return a dict from group to solutions.

        Each group leaves capacity for `probe` direct rollouts, which decide whether the problem is
        still hard. A group that is too small for that has at most one solution, and at least one
        direct rollout.
        """
        found = {}
        for group, count in counts.items():
            problem = visit.problems[group]
            rng = np.random.default_rng([*visit.seed, zlib.crc32(problem.uid.encode())])
            most = min(max(count - self.probe, 1), count - 1)
            if rows := self._solved.solutions(group, problem, most, rng):
                found[group] = rows
        return found

    def _search(self, visit: "_Visit", counts: Mapping[int, int]) -> dict[int, list[Trajectory]]:
        """Search the problem of each group, and return `counts[group]` trajectories by group."""
        task = self.limited(visit.task) if self.turns else visit.task
        searcher = Searcher(visit.sampler, self.formatter, task, self, self.limits, visit.seed)
        groups = list(counts)
        problems = [visit.problems[group] for group in groups]
        searches = searcher.run(groups, problems, list(counts.values()))
        self._add(searcher.counts)
        if self.export and searches and jax.process_index() == 0:
            append_tree(Path(self.export).expanduser(), visit.seed, searches[0], self.formatter)
        return {search.group: searcher.trajectories(search) for search in searches}

    def _is_hard(self, rows: Sequence[Trajectory]) -> bool:
        return self._solved.is_hard(_rate(rows))

    def sets_aside(self, uid: str) -> bool:
        return self._solved.is_aside(uid)

    def requeue(self) -> None:
        self._solved.requeue()

    def _add(self, counts: Mapping[str, float]) -> None:
        total = self._kept["counts"]
        for name, count in counts.items():
            total[name] = total.get(name, 0.0) + count

    def metrics(self) -> dict[str, float]:
        found = {f"search/{name}": float(count) for name, count in self._kept["counts"].items()}
        self._kept["counts"] = {}
        if rollouts := found.get("search/direct_rollouts"):
            found["search/direct_success"] /= rollouts
        else:  # no rollouts, no rate
            found.pop("search/direct_success", None)
        return found | {
            "search/hard": float(self._solved.num_hard),
            "search/aside": float(self._solved.num_aside),
            "search/solutions": float(self._solved.num_solutions),
        }

    @property
    def _tokenizer(self) -> int:
        """Checksum of the run's tokenizer, without which the ids of kept solutions mean nothing."""
        written = json.dumps(self.formatter.lm.tokenizer.to_json(), sort_keys=True)
        return zlib.crc32(written.encode())

    @property
    def state(self) -> dict[str, Any]:
        """Dict of the checksum `tokenizer` and the state of `SolvedProblems` (`hard`, `aside`)."""
        return {"tokenizer": self._tokenizer, **self._solved.state}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["tokenizer"] != self._tokenizer:
            raise ValueError(
                f"the solutions of solved problems are of another model's tokenizer "
                f"({state['tokenizer']:08x}, this one is {self._tokenizer:08x}): begin a new run"
            )
        self._solved.restore(state)


@dataclasses.dataclass(frozen=True)
class _Visit:
    """Arguments of a call of `collect`."""

    sampler: Sampler
    task: Any
    problems: Sequence[Problem]
    seed: Sequence[int]


def _rate(rows: Sequence[Trajectory]) -> float:
    """Success rate of some rollouts; 0 if there are none."""
    return float(np.mean([row.reward.success for row in rows])) if rows else 0.0


def _with_values(row: Trajectory) -> Trajectory:
    """Fill in `node_values` of a trajectory without a tree: its outcome, 1 or -1, at all tokens."""
    if row.node_values is not None:
        return row
    outcome = 1.0 if row.reward.success else -1.0
    return dataclasses.replace(row, node_values=np.full(len(row.tokens), outcome))


STRATEGIES[TreeSearch.word] = TreeSearch

"""Building blocks of rollout strategies: batches of rollouts, PRNG keys, and trajectories."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from train.devices.distributed import divide, is_mine, is_multiprocess, sync_errors
from train.rl.environments.stepping import TimeLimited
from train.rl.protocols import Environment
from train.rl.rollout.sampler import Sampled, row_keys
from train.rl.scoring import plain_fields, safe_step
from train.rl.types import Completion, Problem, Reward, Trajectory, Turn


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Request for one rollout: a response, or an episode.

    Attributes:
        group: Index of the problem in its step.
        problem: Problem to respond to.
        number: Index of the rollout among all rollouts of the same problem in its step. The number
            and the problem's uid decide the sampling noise.
    """

    group: int
    problem: Problem
    number: int


def rollout_batches(
    problems: Sequence[Problem], counts: Sequence[int], max_rows: int
) -> Iterator[list[Rollout]]:
    """Yield the rollouts of a step in batches of at most `max_rows`, ordered by problem.

    If a problem occurs twice in a step, the rollout numbers of its second group continue the
    numbers of its first group, so that no two rollouts have the same PRNG key.

    Args:
        problems: Problem of each group.
        counts: Number of rollouts of each problem.
        max_rows: Maximum number of rows that the sampler takes (`Sampler.max_rows`).
    """
    seen: dict[str, int] = {}
    rollouts = []
    for group, (problem, count) in enumerate(zip(problems, counts, strict=True)):
        first = seen.get(problem.uid, 0)
        seen[problem.uid] = first + count
        rollouts += [Rollout(group, problem, first + number) for number in range(count)]
    for start in range(0, len(rollouts), max_rows):
        yield rollouts[start : start + max_rows]


def sampling_keys(rollouts: Sequence[Rollout], seed: Sequence[int]) -> Any:
    """Compute the PRNG key of each row for `Sampler.open`.

    A key depends on the seed, the problem and the rollout's number, not on other rollouts.

    Args:
        rollouts: Rollout of each row, `R` of them.
        seed: Numbers that all randomness is derived from, as given to `RolloutStrategy.collect`. If
            a rollout is opened more than once, append a different number each time.

    Returns:
        Array of PRNG keys, `[R]`.
    """
    uids = [rollout.problem.uid for rollout in rollouts]
    return row_keys(seed, uids, [rollout.number for rollout in rollouts])


def unique_prompts(prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
    """Remove duplicate prompts, for `Sampler.open`.

    Args:
        prompts: Ids of the prompt of each row.

    Returns:
        The different prompts in order of first appearance, and the index of each row's prompt in
        this list.
    """
    found: dict[tuple[int, ...], int] = {}
    source = [found.setdefault(tuple(prompt), len(found)) for prompt in prompts]
    return [list(prompt) for prompt in found], source


class TrajectoryBuilder:
    """Builder of a trajectory from a prompt, responses and observations, appended in order.

    Args:
        rollout: Rollout that the trajectory records.
        prompt: Ids of the prompt.
        turn: Index of the row's first turn in its episode.
    """

    def __init__(self, rollout: Rollout, prompt: Sequence[int], turn: int = 0):
        self.rollout, self._turn = rollout, turn
        self.tokens = list(prompt)
        self._log_probs = [0.0] * len(prompt)
        self._trained = [False] * len(prompt)
        self._decisions = [-1] * len(prompt)
        self._begins: list[int] = []
        self._texts: list[str] = []
        self._finished = False

    def observe(self, ids: Sequence[int]) -> None:
        """Append ids that the policy attends to but is not trained on."""
        self._add(ids, [0.0] * len(ids), [-1] * len(ids), False)

    def respond(self, sampled: Sampled, completion: Completion) -> None:
        """Append a sampled response, which the policy is trained on."""
        self._begins.append(len(self.tokens))
        self._texts.append(completion.text)
        self._finished = completion.finished
        self._add(sampled.tokens, sampled.log_probs, sampled.decisions, True)

    def _add(self, ids, log_probs, decisions, trained) -> None:
        self.tokens += list(map(int, ids))
        self._log_probs += list(log_probs)
        self._decisions += list(decisions)
        self._trained += [trained] * len(ids)

    def trajectory(self, reward: Reward, turn_rewards: Sequence[float]) -> Trajectory:
        """Return the trajectory of everything appended so far.

        Args:
            reward: Reward of the whole episode.
            turn_rewards: Rewards of all turns of the episode.
        """
        return Trajectory(
            group=self.rollout.group,
            problem=self.rollout.problem,
            tokens=np.array(self.tokens, np.int32),
            trained=np.array(self._trained, bool),
            log_probs=np.array(self._log_probs, np.float32),
            decisions=np.array(self._decisions, np.int8),
            begins=tuple(self._begins),
            reward=reward,
            finished=self._finished,
            texts=tuple(self._texts),
            turn_rewards=tuple(turn_rewards),
            turn=self._turn,
            episode=self.rollout.number,
        )


class EnvironmentEpisode:
    """An episode of an environment that is being played.

    In a multi-process run only one process plays the episode and has its state. In such a run,
    begin episodes with `begin_episodes` and take their turns with `act_all`.

    Args:
        environment: Environment to play in.
        problem: Problem that the episode begins from.
        owner: Number that chooses the process that plays the episode: its remainder on division by
            the number of processes is the index of the process.

    Raises:
        ValueError: A `TimeLimited` environment hangs again and again (`raise_if_hanging`). The
            methods `act` and `play` raise this error too.
    """

    def __init__(self, environment: Environment, problem: Problem, owner: int = 0):
        self._environment, self._problem, self.owner = environment, problem, owner
        self._state = environment.reset(problem) if is_mine(owner) else None
        self._raise_if_hanging()
        self._last: Turn | None = None
        self.rewards: list[float] = []
        """Reward of each turn so far."""
        self.over = False
        """Whether the episode was terminated or truncated."""

    def branch(self) -> "EnvironmentEpisode":
        """Return a copy of the episode that continues independently from its current state."""
        other = copy.copy(self)
        other.rewards = list(self.rewards)
        return other

    def act(self, completion: Completion) -> str:
        """Take a turn in a single-process run, and return the observation.

        Raises:
            ValueError: The run has several processes, the environment hangs, or it gives an invalid
                turn (`safe_step`).
        """
        if is_multiprocess():
            raise ValueError(
                "an episode's own `act` is for one process, this run has several: begin episodes "
                "by `begin_episodes`, and take their turns by `act_all`"
            )
        return self.observe(self.play(completion))

    def play(self, completion: Completion) -> Turn:
        """Step the environment, in the process that plays the episode, and return the turn.

        Raises:
            ValueError: The environment hangs, or gives an invalid turn (`safe_step`).
        """
        turn = safe_step(self._environment, self._problem, self._state, completion)
        self._raise_if_hanging()
        self._state = turn.state
        return turn

    def observe(self, turn: Turn) -> str:
        """Record a turn, in every process, and return its observation."""
        self._last = turn
        self.rewards.append(turn.reward)
        self.over = turn.terminated or turn.truncated
        return turn.observation

    def _raise_if_hanging(self) -> None:
        if isinstance(self._environment, TimeLimited):
            self._environment.raise_if_hanging()

    @property
    def terminated(self) -> bool:
        """Whether the environment has ended the episode, rather than truncated it."""
        return self._last is not None and self._last.terminated

    @property
    def reward(self) -> Reward:
        """Reward of the whole episode, of which at least one turn must have been taken.

        Its value is the sum of the turns' rewards. Success, error and info are taken from the last
        turn, and `info` also has the number of `turns`.
        """
        last = self._last
        assert last is not None
        info = {"turns": float(len(self.rewards)), **last.info}
        return Reward(float(sum(self.rewards)), last.success, info, last.error)


def begin_episodes(
    environment: Environment, problems: Sequence[Problem], owners: Sequence[int] | None = None
) -> list[EnvironmentEpisode]:
    """Begin several episodes of an environment, divided among the processes of the run.

    Args:
        environment: Environment of all episodes.
        problems: Problem of each episode.
        owners: For each episode, the number that chooses its process (`EnvironmentEpisode.owner`);
            the index of the episode by default.

    Raises:
        ValueError: The environment hangs. The error is raised in all processes.
    """
    with sync_errors():
        return [
            EnvironmentEpisode(environment, problem, owner)
            for problem, owner in zip(problems, owners or range(len(problems)), strict=True)
        ]


def act_all(episodes: Sequence[EnvironmentEpisode], completions: Sequence[Completion]) -> list[str]:
    """Take one turn in each of several episodes, each in the process that plays it.

    Args:
        episodes: Episodes of `begin_episodes`, or branches of them.
        completions: Response in each episode, equal in all processes.

    Returns:
        Observation of each episode.

    Raises:
        ValueError: An environment hangs or gives an invalid turn (`safe_step`). The error is raised
            in all processes.
    """
    if not is_multiprocess():
        return [episode.act(said) for episode, said in zip(episodes, completions, strict=True)]

    def play(index: int) -> dict[str, Any]:
        turn = episodes[index].play(completions[index])
        flags = {name: bool(getattr(turn, name)) for name in ("terminated", "truncated", "success")}
        return plain_fields(Turn, turn) | flags | {"state": None}

    turns = divide([episode.owner for episode in episodes], play)
    return [
        episode.observe(Turn(**fields)) for episode, fields in zip(episodes, turns, strict=True)
    ]

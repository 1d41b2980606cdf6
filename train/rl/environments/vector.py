"""Many environments stepped in parallel on threads, with a time limit for each step."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Self, cast, get_args

import numpy as np

from train.rl.environments.stepping import (
    PoolClosed,
    StepPool,
    counted_step,
    counter_of,
    failed_turn,
)
from train.rl.protocols import Environment
from train.rl.types import Completion, Problem, Split, Turn

Autoreset = Literal["next_step", "same_step", "disabled"]
_FAILURES = ("timeouts", "scorer_errors", "invalid_turns")
_RESETS = 3  # maximum number of problems with which a slot tries to begin an episode


@dataclasses.dataclass(frozen=True)
class FinishedEpisode:
    """Outcome of an episode that has ended.

    Attributes:
        problem: Problem that the episode began from.
        observation: Last observation of the episode.
        info: Info of the last turn.
        reward: Sum of the rewards of all turns.
        turns: Number of turns.
        success: Whether the problem was solved.
        error: Reason why the episode failed; empty if it did not fail.
    """

    problem: Problem
    observation: str
    info: Mapping[str, float]
    reward: float
    turns: int
    success: bool
    error: str = dataclasses.field(default="", compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class VectorStep:
    """Transition of one slot after an action.

    Attributes:
        observation: Text that the next action answers. This is the observation of the turn, or the
            prompt of a new episode if `fresh`.
        reward: Reward of the action. In the mode "next_step" it is 0 for an action that only began
            a new episode.
        terminated: Whether the action has ended the episode.
        truncated: Whether the episode was truncated after the action.
        success: Whether the action has solved the problem.
        info: Metrics of the turn by name, with failures counted as `timeouts`, `scorer_errors` and
            `invalid_turns`.
        fresh: Whether `observation` is the prompt of a new episode.
        finished: Outcome of the episode if the action has ended it, in every mode; None otherwise.
    """

    observation: str
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    success: bool = False
    info: Mapping[str, float] = dataclasses.field(default_factory=dict)
    fresh: bool = False
    finished: FinishedEpisode | None = None


@dataclasses.dataclass
class _Slot:
    """An environment with its current episode; only the caller's thread changes a slot."""

    environment: Environment
    rng: np.random.Generator
    problem: Problem | None = None
    state: Any = None
    rewards: list[float] = dataclasses.field(default_factory=list)
    over: bool = False
    busy: bool = False
    turn: Turn | None = None  # last turn, kept until the reset of the mode "same_step"
    resets: int = 0  # number of failed resets in a row
    failure: ValueError | None = None  # why the slot could not begin an episode; raised once


class VectorEnvironment:
    """Vector of environments that step in parallel; each has a slot and plays many episodes.

    The problems of a slot depend only on the seed and the slot's index, not on the speed of other
    slots. The mode `autoreset` decides what follows the last turn of an episode:

    - "next_step": the transition has the last observation; the next action is ignored and begins a
      new episode.
    - "same_step": the transition already has the prompt of a new episode as its observation.
    - "disabled": the slot accepts no action until `reset`.

    In each mode `VectorStep.finished` has the last observation and info of the ended episode. If a
    slot cannot begin an episode, an error is raised once its last transition was returned. The
    transitions of other slots are not lost.

    Args:
        environments: Environment of each slot. Several slots may share one environment object.
        autoreset: Mode of what follows the last turn of an episode.
        seed: Seed of the problems.
        split: Split of the problems.
        threads: Number of environments that step at the same time; None for one thread per slot, at
            most 64. Only one environment with `serial` steps at a time.
        limit_s: Number of seconds after which a step or a reset is abandoned and counted as failed.

    Attributes:
        counts: Mapping from counter to number of failures: `timeouts`, `scorer_errors` and
            `invalid_turns` for steps, `reset_failures` for resets.

    Raises:
        ValueError: `environments` is empty, the mode is unknown, an environment has no problems of
            the split, `threads` is below 1, or `limit_s` is not above 0.
    """

    def __init__(
        self,
        environments: Sequence[Environment],
        *,
        autoreset: Autoreset = "next_step",
        seed: int = 0,
        split: Split = "train",
        threads: int | None = None,
        limit_s: float = 30.0,
    ):
        if not environments:
            raise ValueError("no environment is given: give one for each slot")
        if autoreset not in get_args(Autoreset):
            modes = ", ".join(get_args(Autoreset))
            raise ValueError(f"autoreset={autoreset!r}: choose one of {modes}")
        for environment in environments:
            if environment.sizes.get(split, 0) == 0:
                raise ValueError(f"{environment.name} has no problems of the split {split!r}")
        self._autoreset: Autoreset = autoreset
        self._split: Split = split
        self._slots = [
            _Slot(environment, np.random.default_rng([seed, slot]), over=True)
            for slot, environment in enumerate(environments)
        ]
        threads = min(len(environments), 64) if threads is None else threads
        self._pool = StepPool(threads, limit_s)
        self._results: dict[int, VectorStep] = {}
        self.counts: collections.Counter[str] = collections.Counter()

    def __len__(self) -> int:
        return len(self._slots)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, as leaving a `with` block does; no slot can act afterwards."""
        self._pool.close()

    def reset(self, slots: Iterable[int] | None = None) -> dict[int, str]:
        """Begin new episodes, and wait for all of them.

        Args:
            slots: Indices of the slots that begin a new episode, even if their current episode is
                not over; all slots by default.

        Returns:
            A dict from slot to the prompt of its new episode.

        Raises:
            ValueError: A slot does not exist, is given twice, is still stepping or has a transition
                to receive; the environments are closed; or a slot cannot begin an episode. In the
                last case `receive` returns the prompts of the other slots.
        """
        chosen = list(range(len(self)) if slots is None else slots)
        self._check(chosen)
        for slot in chosen:
            self._slots[slot].failure = None
            self._begin(slot)
        return {slot: step.observation for slot, step in self._wait(chosen).items()}

    def send(self, actions: Mapping[int, str | Completion]) -> None:
        """Start the steps of some slots, and return without waiting for them.

        Args:
            actions: Action of each slot that is to act: a text, or a response of a policy.

        Raises:
            ValueError: A slot does not exist, is still stepping or has a transition to receive; a
                slot has no running episode (in the mode "next_step" an ended episode is allowed);
                the environments are closed; or an earlier attempt to begin an episode failed. No
                slot acts if this error is raised.
        """
        self._raise_failure()
        self._check(list(actions))
        for slot in actions:
            found = self._slots[slot]
            if found.problem is None or (found.over and self._autoreset != "next_step"):
                raise ValueError(f"slot {slot} has no episode that goes on: reset it first")
        for slot, action in actions.items():
            found = self._slots[slot]
            if found.over:
                self._begin(slot)
                continue
            if isinstance(action, str):
                action = Completion(cast(Problem, found.problem), action, (), True)
            arguments = (found.environment, cast(Problem, found.problem), found.state, action)
            self._submit(slot, lambda arguments=arguments: counted_step(*arguments))

    def receive(self, least: int = 1) -> dict[int, VectorStep]:
        """Wait for slots that are stepping, and return the transitions of those that are ready.

        Args:
            least: Number of slots to wait for. If fewer slots are stepping, this method waits for
                all of them.

        Returns:
            A dict from slot to its transition.

        Raises:
            ValueError: A slot cannot begin an episode. The next call returns the transitions of the
                other slots.
        """
        self._raise_failure()
        self._settle_ready(0)
        while len(self._results) < least and any(slot.busy for slot in self._slots):
            self._raise_failure()
            self._settle_ready(1)
        self._raise_failure()
        found, self._results = self._results, {}
        return found

    def step(
        self, actions: Sequence[str] | Mapping[int, str | Completion]
    ) -> dict[int, VectorStep]:
        """Let slots act, and wait for their transitions.

        Args:
            actions: A sequence with the action of every slot, or a mapping from slot to action.

        Returns:
            A dict from slot to its transition, for the slots that acted.

        Raises:
            ValueError: The length of the sequence is not the number of slots, or `send` or
                `receive` raises.
        """
        if not isinstance(actions, Mapping):
            if isinstance(actions, str) or len(actions) != len(self):
                what = "one text" if isinstance(actions, str) else f"{len(actions)} actions"
                raise ValueError(f"{what} for {len(self)} slots: give one for each, or a dict")
            actions = dict(enumerate(actions))
        self.send(actions)
        return self._wait(list(actions))

    def _wait(self, slots: Sequence[int]) -> dict[int, VectorStep]:
        while any(self._slots[slot].busy for slot in slots):
            self._settle_ready(1)
        self._raise_failure()
        return {slot: self._results.pop(slot) for slot in slots}

    def _check(self, slots: Sequence[int]) -> None:
        """Raise a `ValueError` for slots that do not exist, are repeated or are busy."""
        if self._pool.closed:
            raise ValueError("these environments are closed: make a new VectorEnvironment")
        seen = set()
        for slot in slots:
            if not isinstance(slot, (int, np.integer)) or not 0 <= slot < len(self):
                raise ValueError(f"slot {slot!r}: choose from 0 to {len(self) - 1}")
            if slot in seen:
                raise ValueError(f"slot {slot} is given twice: give it once")
            if self._slots[slot].busy or slot in self._results:
                raise ValueError(f"slot {slot} is still stepping: receive its transition first")
            seen.add(slot)

    def _raise_failure(self) -> None:
        """Raise a slot's failure to begin an episode, once its last transition was returned."""
        for index, slot in enumerate(self._slots):
            if slot.failure is not None and index not in self._results:
                failure, slot.failure = slot.failure, None
                raise failure

    def _submit(self, slot: int, call: Callable[[], Any]) -> None:
        found = self._slots[slot]
        found.busy = True
        try:
            self._pool.submit(slot, call, bool(getattr(found.environment, "serial", False)))
        except PoolClosed as error:
            self._fail(slot, error)

    def _begin(self, slot: int) -> None:
        """Sample a problem and reset the slot's environment to it, on a thread of the pool."""
        found = self._slots[slot]
        environment, split = found.environment, self._split
        size = environment.sizes[split]
        index = int(found.rng.integers(2**31 if size is None else size))

        def reset() -> tuple[Problem, Any]:
            problem = environment.problem(split, index)
            return problem, environment.reset(problem)

        found.over = True
        self._submit(slot, reset)

    def _settle_ready(self, least: int) -> None:
        for slot, outcome in self._pool.ready(least):
            try:
                self._settle(cast(int, slot), outcome)
            except Exception as error:  # e.g. of the environment's `sizes`
                name = type(self._slots[cast(int, slot)].environment).__name__
                failure = ValueError(f"{name}: {type(error).__name__}: {error}")
                failure.__cause__ = error
                self._fail(cast(int, slot), failure)

    def _settle(self, slot: int, outcome: Any) -> None:
        found = self._slots[slot]
        if isinstance(outcome, PoolClosed):
            self._fail(slot, outcome)
            return
        if found.over:
            self._settle_reset(slot, outcome)
            return
        if isinstance(outcome, BaseException):
            outcome = failed_turn(found.environment, found.state, counter_of(outcome), outcome)
        turn: Turn = outcome
        self.counts.update(counter for counter in _FAILURES if turn.info.get(counter))
        found.state = turn.state
        found.rewards.append(float(turn.reward))
        found.over = turn.terminated or turn.truncated
        if found.over and self._autoreset == "same_step":
            found.turn = turn
            self._begin(slot)
        else:
            self._give(slot, self._step_of(found, turn))

    def _settle_reset(self, slot: int, outcome: Any) -> None:
        found = self._slots[slot]
        if isinstance(outcome, BaseException):
            self.counts["reset_failures"] += 1
            found.resets += 1
            if found.resets < _RESETS:
                self._begin(slot)
                return
            failure = ValueError(
                f"{found.environment.name} began no episode of {_RESETS} problems, the last time: "
                f"{type(outcome).__name__}: {' '.join(str(outcome).split())}"
            )
            failure.__cause__ = outcome
            self._fail(slot, failure)
            return
        step = VectorStep("") if found.turn is None else self._step_of(found, found.turn)
        found.turn, found.resets = None, 0
        found.problem, found.state = outcome
        found.rewards, found.over = [], False
        observation = cast(Problem, found.problem).prompt
        self._give(slot, dataclasses.replace(step, observation=observation, fresh=True))

    def _fail(self, slot: int, failure: ValueError) -> None:
        """Leave a slot without an episode, and return the turn that ended its last episode."""
        found = self._slots[slot]
        found.busy, found.resets, found.failure = False, 0, failure
        if found.turn is not None:
            self._give(slot, self._step_of(found, found.turn))
            found.turn = None
        found.over = True

    def _step_of(self, slot: _Slot, turn: Turn) -> VectorStep:
        finished = None
        if slot.over:
            finished = FinishedEpisode(
                cast(Problem, slot.problem),
                turn.observation,
                turn.info,
                float(sum(slot.rewards)),
                len(slot.rewards),
                turn.success,
                turn.error,
            )
        return VectorStep(
            turn.observation,
            turn.reward,
            turn.terminated,
            turn.truncated,
            turn.success,
            turn.info,
            finished=finished,
        )

    def _give(self, slot: int, step: VectorStep) -> None:
        self._slots[slot].busy = False
        self._results[slot] = step

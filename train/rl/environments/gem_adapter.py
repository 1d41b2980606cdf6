"""Environments of the package gem-llm as they are, where it is installed."""

import collections
import dataclasses
import importlib
import logging
import math
import random
import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from train.rl.environments.stepping import StepPool, TimedOut, counter_of, failed_turn
from train.rl.problems import TEST_SHARE, check_types, digest, options
from train.rl.types import Completion, Problem, Split, Turn

_INSTALL = 'pip install "thoughtbubbles[gem]"'
_LIVE = 256  # episodes that are kept to go on from
_VARIED = 8  # seeds that are looked at where the seed decides how many turns there are
_LOCK = threading.RLock()  # of the process's generators, which the package seeds and draws from
_PATIENCE_S = 120.0  # of a call that waits for another one, which may hang without a limit


@dataclasses.dataclass(frozen=True)
class Replayable:
    """State of an episode: the seed of its first state and the actions since.

    Attributes:
        seed: Seed that the package's environment is reset with.
        actions: Texts of all actions.
        over: Whether the episode has ended or was cut.
    """

    seed: int
    actions: tuple[str, ...] = ()
    over: bool = False


class _Live:
    """An environment of the package in the middle of an episode, with generators of its own.

    The package draws from the process's generators. Within `run` they are the episode's, and
    afterwards what they were. A call that was cut goes on: one that wakes later draws from, or
    seeds, the generators that the process then has.
    """

    def __init__(self, seed: int):
        self._generators: Any = random.Random(seed).getstate(), _numpy_state(seed)
        self.environment: Any = None

    def run(self, call: Callable[[], Any], pool: StepPool | None = None) -> Any:
        """Result of a call; on a thread of the pool, where it is cut after the pool's limit.

        Raises:
            TimedOut: The call took longer than the limit.
            RuntimeError: An earlier call does not end.
            Exception: Whatever the call raises.
        """
        if not _LOCK.acquire(timeout=_PATIENCE_S):
            raise RuntimeError(
                f"an earlier call of gem-llm has not ended in {_PATIENCE_S:g} s, and one at a time "
                "may run: choose a limit_s (limit_s=None has none)"
            )
        try:
            outside = random.getstate(), np.random.get_state()
            random.setstate(self._generators[0])
            np.random.set_state(self._generators[1])
            try:
                return call() if pool is None else pool.call(call)
            finally:
                self._generators = random.getstate(), np.random.get_state()
                random.setstate(outside[0])
                np.random.set_state(outside[1])
        finally:
            _LOCK.release()


def _numpy_state(seed: int) -> Any:
    return np.random.RandomState(seed).get_state()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gem:
    """An environment of gem-llm by its id, such as `game:Mastermind-v0-easy` or `rg:chain_sum`.

    A state is the seed and the actions since: a step from the newest state steps the package's
    environment, one from an earlier state plays the actions again. The package draws from the
    process's generators; each episode has its own, and the process's are restored. So one step of
    the package runs at a time. Success is an ended episode whose last reward is `success_reward` or
    more: some games pay nearly as much for a near miss.

    A hash of id and seed decides the split; whether two seeds make the same problem only the
    package knows. Observations are long: `--strategy "turns(max_observation=512)"`.

    Attributes:
        id: Id of the environment, one of those that `gem.print_envs()` prints.
        options: Options of the environment, e.g. `{'max_turns': 5}`.
        success_reward: Least last reward of a solved problem.
        suffix: Whether the `suffix` of the package's info follows each observation.
        limit_s: Number of seconds after which a call of the package is cut. A step that is cut is a
            failure that is counted (`timeouts`). Calls then run on a thread of their own; None
            makes them directly, for graders that use signals, and a call that hangs then fails all
            later ones, each after two minutes.
        seed: Seed of the order of problems.
    """

    word: ClassVar[str] = "gem"
    serial: ClassVar[bool] = True
    """The package draws from the process's generators: one step of it runs at a time."""

    id: str
    options: dict = dataclasses.field(default_factory=dict)
    success_reward: float = 1.0
    suffix: bool = True
    limit_s: float | None = 20.0
    seed: int = dataclasses.field(default=0, repr=False)

    def __post_init__(self):
        check_types(self)
        try:
            object.__setattr__(self, "_package", _imported())
        except ImportError as error:
            raise ValueError(f"task {self.name} needs gem-llm ({error}): {_INSTALL}") from None
        object.__setattr__(self, "_live", collections.OrderedDict())
        object.__setattr__(self, "_keeping", threading.Lock())
        pool = None if self.limit_s is None else StepPool(1, self.limit_s)
        object.__setattr__(self, "_pool", pool)
        try:
            object.__setattr__(self, "_turns", self._most_turns())
        except Exception as error:  # whatever an id or an option does to the package
            raise ValueError(f"task {self.name}: {' '.join(str(error).split())}") from error

    @property
    def name(self) -> str:
        return self.word + options(self)

    @property
    def sizes(self) -> Mapping[Split, int | None]:
        return {"train": None, "test": None}

    @property
    def max_turns(self) -> int | None:
        """Number of turns after which the package cuts an episode; None where it says none."""
        return self.__dict__["_turns"]

    def problem(self, split: Split, index: int) -> Problem:
        """A problem of the split: a seed, and the first observation that it makes.

        Raises:
            ValueError: The package makes none of the seed, or takes too long.
        """
        rng = np.random.default_rng([self.seed, split == "test", index])
        while True:
            seed = int(rng.integers(2**31))
            found = digest(f"{self.id} {self.options} {seed}")
            if (found % TEST_SHARE == 0) == (split == "test"):
                break
        try:
            live, prompt = self._begun(seed)
        except Exception as error:  # whatever the package raises
            way_out = ": choose a larger limit_s" if isinstance(error, TimedOut) else ""
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{self.name}: no episode began from seed {seed}: {reason}{way_out}"
            ) from error
        self._keep(Replayable(seed), live)
        return Problem(f"gem-{self.id}-{found:016x}", prompt, seed, self.id)

    def reset(self, problem: Problem) -> Replayable:
        return Replayable(problem.answer)

    def step(self, state: Replayable, action: Completion) -> Turn:
        """Turn after an action; one where the package's step raises is a counted failure.

        Raises:
            ValueError: The episode is over.
        """
        if state.over:
            raise ValueError(f"{self.name}: the episode is over: reset before the next step")
        with self.__dict__["_keeping"]:
            live = self.__dict__["_live"].pop(state, None)
        actions = (*state.actions, action.text)
        failed = Replayable(state.seed, actions, True)
        try:
            live = live or self._replayed(state)
            observation, reward, terminated, truncated, info = self._stepped(live, action.text)
            reward = float(reward)
            numbers = {name: float(value) for name, value in info.items() if _is_number(value)}
            if not (terminated or truncated):
                observation = self._shown(observation, info)
        except Exception as error:  # some of the package's scorers raise on a malformed answer
            return failed_turn(self, failed, counter_of(error), error)
        if not math.isfinite(reward):
            return failed_turn(self, failed, "invalid_turns", f"the reward is {reward}")
        over = bool(terminated or truncated)
        after = Replayable(state.seed, actions, over)
        if not over:
            self._keep(after, live)
        success = over and reward >= self.success_reward
        return Turn(after, observation, reward, bool(terminated), bool(truncated), success, numbers)

    def _made(self) -> Any:
        return self.__dict__["_package"].make(self.id, **self.options)

    def _begun(self, seed: int) -> tuple[_Live, str]:
        """An environment that was reset with the seed, and its first observation."""
        live = _Live(seed)

        def begin() -> Any:
            live.environment = self._made()
            return live.environment.reset(seed=seed)

        observation, info = live.run(begin, self.__dict__["_pool"])
        return live, self._shown(observation, info)

    def _stepped(self, live: _Live, text: str) -> Any:
        return live.run(lambda: live.environment.step(text), self.__dict__["_pool"])

    def _replayed(self, state: Replayable) -> _Live:
        live, _ = self._begun(state.seed)
        for text in state.actions:
            self._stepped(live, text)
        return live

    def _shown(self, observation: str, info: Mapping[str, Any]) -> str:
        suffix = info.get("suffix") if self.suffix else None
        return f"{observation}\n{suffix}\n" if suffix else f"{observation}\n"

    def _keep(self, state: Replayable, live: _Live) -> None:
        kept = self.__dict__["_live"]
        with self.__dict__["_keeping"]:
            kept[state] = live
            while len(kept) > _LIVE:
                kept.popitem(last=False)

    def _most_turns(self) -> int | None:
        """Greatest number of turns; of several seeds, where the seed decides it."""
        turns = []
        for seed in range(_VARIED):
            unwrapped = _Live(seed).run(self._made, self.__dict__["_pool"]).unwrapped
            turns.append(getattr(unwrapped, "max_turns", None))
            if not getattr(unwrapped, "_is_random", False):
                break
        return max((number for number in turns if isinstance(number, int)), default=None)


def _imported() -> Any:
    """The package; what its import does to the log of the process is undone."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        return importlib.import_module("gem")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.number)) and math.isfinite(value)

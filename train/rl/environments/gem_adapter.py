"""Environments of the package gem-llm as they are, where it is installed."""

import collections
import dataclasses
import importlib
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from train.rl.environments.stepping import StepPool, TimedOut
from train.rl.problems import TEST_SHARE, digest, options
from train.rl.types import Completion, Problem, Split, Turn

_INSTALL = 'pip install "thoughtbubbles[gem]"'
_LIVE = 256  # episodes that are kept to go on from
_VARIED, _PATIENCE = 32, 5.0  # seeds, seconds: where the seed decides how many turns there are
_LOCK = threading.RLock()  # of the process's generators, which the package seeds and draws from


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
    afterwards what they were.
    """

    def __init__(self, seed: int):
        self._generators: Any = random.Random(seed).getstate(), _numpy_state(seed)
        self.environment: Any = None

    def run(self, call: Callable[[], Any], pool: StepPool | None = None) -> Any:
        """Result of a call; on a thread of the pool, where it is cut after the pool's limit."""
        with _LOCK:
            outside = random.getstate(), np.random.get_state()
            random.setstate(self._generators[0])
            np.random.set_state(self._generators[1])
            try:
                if pool is None:
                    return call()
                pool.submit(0, call)
                [(_, outcome)] = pool.ready()
                if isinstance(outcome, BaseException):
                    raise outcome
                return outcome
            finally:
                self._generators = random.getstate(), np.random.get_state()
                random.setstate(outside[0])
                np.random.set_state(outside[1])


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
        limit_s: Number of seconds after which a step is cut, as a failure that is counted
            (`timeouts`). Steps then run on a thread of their own; None calls them directly, for
            graders that use signals.
        seed: Seed of the order of problems.
    """

    word: ClassVar[str] = "gem"
    id: str
    options: dict = dataclasses.field(default_factory=dict)
    success_reward: float = 1.0
    suffix: bool = True
    limit_s: float | None = 20.0
    seed: int = dataclasses.field(default=0, repr=False)

    def __post_init__(self):
        try:
            object.__setattr__(self, "_package", _imported())
        except ImportError as error:
            raise ValueError(f"task {self.name} needs gem-llm ({error}): {_INSTALL}") from None
        object.__setattr__(self, "_live", collections.OrderedDict())
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
        """A problem of the split: a seed, and the first observation that it makes."""
        rng = np.random.default_rng([self.seed, split == "test", index])
        while True:
            seed = int(rng.integers(2**31))
            found = digest(f"{self.id} {self.options} {seed}")
            if (found % TEST_SHARE == 0) == (split == "test"):
                break
        live, prompt = self._begun(seed)
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
        with _LOCK:
            live = self.__dict__["_live"].pop(state, None)
        live = live or self._replayed(state)
        actions = (*state.actions, action.text)
        try:
            observation, reward, terminated, truncated, info = live.run(
                lambda: live.environment.step(action.text), self.__dict__["_pool"]
            )
            reward = float(reward)
        except TimedOut:
            return _failed(state.seed, actions, "timeouts")
        except Exception:  # some of the package's scorers raise on a malformed answer
            return _failed(state.seed, actions, "scorer_errors")
        if not math.isfinite(reward):
            return _failed(state.seed, actions, "invalid_turns")
        over = bool(terminated or truncated)
        after = Replayable(state.seed, actions, over)
        if not over:
            self._keep(after, live)
            observation = self._shown(observation, info)
        success = over and reward >= self.success_reward
        numbers = {name: float(value) for name, value in info.items() if _is_number(value)}
        return Turn(after, observation, reward, bool(terminated), bool(truncated), success, numbers)

    def _made(self) -> Any:
        return self.__dict__["_package"].make(self.id, **self.options)

    def _begun(self, seed: int) -> tuple[_Live, str]:
        """An environment that was reset with the seed, and its first observation."""
        live = _Live(seed)

        def begin() -> Any:
            live.environment = self._made()
            return live.environment.reset(seed=seed)

        observation, info = live.run(begin)
        return live, self._shown(observation, info)

    def _replayed(self, state: Replayable) -> _Live:
        live, _ = self._begun(state.seed)
        for text in state.actions:
            live.run(lambda text=text: live.environment.step(text))
        return live

    def _shown(self, observation: str, info: Mapping[str, Any]) -> str:
        suffix = info.get("suffix") if self.suffix else None
        return f"{observation}\n{suffix}\n" if suffix else f"{observation}\n"

    def _keep(self, state: Replayable, live: _Live) -> None:
        with _LOCK:
            kept = self.__dict__["_live"]
            kept[state] = live
            while len(kept) > _LIVE:
                kept.popitem(last=False)

    def _most_turns(self) -> int | None:
        """Greatest number of turns: of several seeds, or seconds, where the seed decides it."""
        turns, begin = [], time.monotonic()
        for seed in range(_VARIED):
            unwrapped = _Live(seed).run(self._made).unwrapped
            turns.append(getattr(unwrapped, "max_turns", None))
            varied = getattr(unwrapped, "_is_random", False)
            if not varied or time.monotonic() - begin > _PATIENCE:
                break
        return max((number for number in turns if isinstance(number, int)), default=None)


def _failed(seed: int, actions: tuple[str, ...], counter: str) -> Turn:
    return Turn(Replayable(seed, actions, True), "", 0.0, True, info={counter: 1.0})


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

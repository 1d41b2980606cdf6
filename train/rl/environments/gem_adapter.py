"""Adapter for the environments of the optional package gem-llm."""

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
_LIVE = 256  # maximum number of episodes whose environments are cached
_VARIED = 8  # number of seeds to check where the seed decides the maximum number of turns
_LOCK = threading.RLock()  # guards the process's random generators, which the package uses
_PATIENCE_S = 120.0  # maximum wait for an earlier call, which may hang without a limit


@dataclasses.dataclass(frozen=True)
class Replayable:
    """State of an episode of gem-llm: the seed of the reset and all actions since, for replay.

    Attributes:
        seed: Seed that the package's environment is reset with.
        actions: Texts of all actions since the reset.
        over: Whether the episode was terminated or truncated.
    """

    seed: int
    actions: tuple[str, ...] = ()
    over: bool = False


class _Live:
    """An environment of the package in the middle of an episode, with its random generator states.

    The package uses the process's random generators. `run` sets them to the states of the episode
    and restores them afterwards. An abandoned call keeps running, and from then on uses or seeds
    the process's generators in whatever states they are.
    """

    def __init__(self, seed: int):
        self._generators: Any = random.Random(seed).getstate(), _numpy_state(seed)
        self.environment: Any = None

    def run(self, call: Callable[[], Any], pool: StepPool | None = None) -> Any:
        """Run a call with the episode's generator states, and return its result.

        Args:
            call: Function without arguments.
            pool: Pool with a time limit to run the call on; None to run it on this thread.

        Raises:
            TimedOut: The call took longer than the pool's limit.
            RuntimeError: An earlier call has not ended within two minutes.
            Exception: Any exception that the call raises.
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

    A state consists of the seed of the reset and the actions since. A step from the newest state of
    an episode steps the package's environment; a step from an earlier state first replays its
    actions. The package uses the process's global random generators. Each episode keeps its own
    generator states, the global states are restored after every call, and calls run one at a time.
    An episode is a success if it has ended and its last reward is at least `success_reward`; a
    lower reward is no success, because some games pay nearly as much for a near miss.

    A hash of id, options and seed decides the split. Two seeds may make the same problem, even in
    different splits, which this adapter cannot check. Observations are long: use
    `--strategy "turns(max_observation=512)"`.

    Attributes:
        id: Id of the environment; `gem.print_envs()` prints all ids.
        options: Mapping from name to value of the environment's options, e.g. `{'max_turns': 5}`.
        success_reward: Minimum reward of the last turn that counts as a success.
        suffix: Whether the `suffix` in the package's info is appended to each observation.
        limit_s: Number of seconds after which a call of the package is abandoned. A step that takes
            longer is a failure, counted as `timeouts`. Calls with a limit run on a separate thread.
            None calls the package on the caller's thread, as graders that use signals need; a call
            that hangs there blocks its thread, and each later call fails after two minutes.
        seed: Seed of the order of problems.
    """

    word: ClassVar[str] = "gem"
    serial: ClassVar[bool] = True
    """Whether steps must run one at a time: the package uses the process's random generators."""

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
        """Number of turns after which the package truncates an episode; None if unknown.

        Where the number depends on the seed, this is the maximum over a few seeds.
        """
        return self.__dict__["_turns"]

    def problem(self, split: Split, index: int) -> Problem:
        """Return a problem of the split, whose prompt is the observation after the reset.

        Raises:
            ValueError: The package raises in the reset, or the reset takes longer than `limit_s`.
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
        """Return the turn after an action.

        If the package's step raises, takes too long or gives a reward that is not finite, the
        episode ends as a failure that is counted in the turn's `info`.

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
        """Make an environment and reset it with the seed; return it and its first observation."""
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
        """Return the maximum number of turns, over several seeds where the seed decides it."""
        turns = []
        for seed in range(_VARIED):
            unwrapped = _Live(seed).run(self._made, self.__dict__["_pool"]).unwrapped
            turns.append(getattr(unwrapped, "max_turns", None))
            if not getattr(unwrapped, "_is_random", False):
                break
        return max((number for number in turns if isinstance(number, int)), default=None)


def _imported() -> Any:
    """Import the package, and undo its changes to the root logger."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        return importlib.import_module("gem")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.number)) and math.isfinite(value)

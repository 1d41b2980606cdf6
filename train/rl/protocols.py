"""Protocols that tasks and environments of a run implement."""

from collections.abc import Mapping
from typing import Any, Protocol

from train.rl.types import Completion, Problem, Reward, Split, Turn


class Task(Protocol):
    """A task: problems with one response each, and a verifier of responses.

    `problem` is a pure function of its arguments and uses no global random state.

    Attributes:
        name: Text that makes this task when it is given to `--task`.
        sizes: Number of problems of each split, by the name of the split; None for an endless
            split.
    """

    @property
    def name(self) -> str: ...

    @property
    def sizes(self) -> Mapping[Split, int | None]: ...

    def problem(self, split: Split, index: int) -> Problem: ...

    def score(self, completion: Completion) -> Reward:
        """Return the reward of a response. It should not raise for any text."""
        ...


class Environment(Protocol):
    """A task of several turns, with explicit state.

    A state is a value that `step` does not change: two steps from one state with one action give
    the same turn, and a search may keep a state and branch from it. Environments never reset
    themselves. The prompt of a problem is the first observation of its episode.

    An environment may also have some of these attributes: `max_turns`, the number of turns after
    which it truncates its episodes; `failure_value`, the reward of an episode that fails (0 if it
    is missing); `serial`, True if its steps share a resource of the process and must not run in
    parallel; and the players `random_action(shown, rng)` and `scripted_action(shown, rng)`.

    Attributes:
        name: Text that makes this environment when it is given to `--task`.
        sizes: Number of problems of each split, by the name of the split; None for an endless
            split.
    """

    @property
    def name(self) -> str: ...

    @property
    def sizes(self) -> Mapping[Split, int | None]: ...

    def problem(self, split: Split, index: int) -> Problem: ...

    def reset(self, problem: Problem) -> Any:
        """Return the first state of an episode of the problem."""
        ...

    def step(self, state: Any, action: Completion) -> Turn:
        """Return the turn that follows a response. It should not raise for any text."""
        ...

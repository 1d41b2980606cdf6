"""Protocols that tasks and environments of a run implement."""

from collections.abc import Mapping
from typing import Any, Protocol

from train.rl.types import Completion, Problem, Reward, Split, Turn


class Task(Protocol):
    """A task: problems with one response each, and a verifier of responses.

    `problem` is a pure function of its arguments and uses no global random state.

    Attributes:
        name: Value of `--task` that makes this task.
        sizes: Number of problems of each split, keyed by the name of the split; None for an endless
            split.
    """

    @property
    def name(self) -> str: ...

    @property
    def sizes(self) -> Mapping[Split, int | None]: ...

    def problem(self, split: Split, index: int) -> Problem: ...

    def score(self, completion: Completion) -> Reward:
        """Return the reward of a response; no text should make this method raise."""
        ...


class Environment(Protocol):
    """A task of several turns, with explicit state.

    `step` never modifies a state. Two steps from the same state with the same action give the same
    turn, so a search may keep a state and branch from it. Environments never reset themselves. The
    prompt of a problem is the first observation of its episode.

    An environment may also have some of these attributes: `max_turns`, the number of turns after
    which the environment truncates an episode; `failure_value`, the reward of an episode that fails
    (0 if this attribute is missing); `serial`, True if steps share a resource of the process and
    must not run in parallel; and the players `random_action(shown, rng)` and
    `scripted_action(shown, rng)`.

    Attributes:
        name: Value of `--task` that makes this environment.
        sizes: Number of problems of each split, keyed by the name of the split; None for an endless
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
        """Return the turn that follows a response; no text should make this method raise."""
        ...

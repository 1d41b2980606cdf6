"""What a run demands of tasks and of environments."""

from collections.abc import Mapping
from typing import Any, Protocol

from train.rl.types import Completion, Problem, Reward, Split, Turn


class Task(Protocol):
    """Problems without end, or a list of them, and a verifier.

    `problem` is a pure function of its arguments: nothing is drawn from a global state.

    Attributes:
        name: as it is asked for.
        sizes: problems of each split; None where they have no end.
    """

    @property
    def name(self) -> str: ...

    @property
    def sizes(self) -> Mapping[Split, int | None]: ...

    def problem(self, split: Split, index: int) -> Problem: ...

    def score(self, completion: Completion) -> Reward: ...


class Environment(Protocol):
    """A task of several turns, with explicit state.

    A state is a value: stepping from it twice gives the same, it can be kept and branched from,
    and nothing starts anew on its own. A problem's prompt is the first observation.
    """

    @property
    def name(self) -> str: ...

    @property
    def sizes(self) -> Mapping[Split, int | None]: ...

    def problem(self, split: Split, index: int) -> Problem: ...

    def reset(self, problem: Problem) -> Any:
        """The first state."""
        ...

    def step(self, state: Any, action: Completion) -> Turn: ...

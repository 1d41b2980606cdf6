"""What a run demands of tasks and of environments."""

from collections.abc import Mapping
from typing import Any, Protocol

from train.rl.types import Completion, Problem, Reward, Split, Turn


class Task(Protocol):
    """Problems of one response, and a verifier.

    `problem` is a pure function of its arguments: nothing is drawn from a global state.

    Attributes:
        name: Text that `--task` would make it of.
        sizes: Number of problems of each split; None for an endless split.
    """

    @property
    def name(self) -> str: ...

    @property
    def sizes(self) -> Mapping[Split, int | None]: ...

    def problem(self, split: Split, index: int) -> Problem: ...

    def score(self, completion: Completion) -> Reward:
        """Reward of a response; should never raise, whatever the text is."""
        ...


class Environment(Protocol):
    """A task of several turns, with explicit state.

    A state is a value: stepping from it twice gives the same turn, it can be kept and branched
    from, and nothing is reset automatically. A problem's prompt is the first observation.

    What an environment may have besides: `max_turns`, after which it cuts its episodes itself;
    `failure_value`, the reward of an episode that fails (0 without it); `serial`, True where its
    steps share something that the process has once; and players, `random_action(shown, rng)` and
    `scripted_action(shown, rng)`.
    """

    @property
    def name(self) -> str: ...

    @property
    def sizes(self) -> Mapping[Split, int | None]: ...

    def problem(self, split: Split, index: int) -> Problem: ...

    def reset(self, problem: Problem) -> Any:
        """First state of the episode of a problem."""
        ...

    def step(self, state: Any, action: Completion) -> Turn:
        """Turn after a response; should never raise, whatever the text is."""
        ...

"""What the learner asks of tasks, of strategies that make rollouts, and of budgets."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from train.rl.rollout.sampler import Sampler
from train.rl.types import Completion, Problem, Reward, Split, Trajectory, Turn


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


class RolloutStrategy(Protocol):
    """How trajectories are made of problems: sampling, several turns, search."""

    def collect(
        self,
        sampler: Sampler,
        task: Any,
        problems: Sequence[Problem],
        counts: Sequence[int],
        seed: Sequence[int],
    ) -> list[Trajectory]:
        """`counts[i]` rollouts of `problems[i]`, all of group `i`.

        Args:
            sampler: of the present weights.
            task: a `Task` or an `Environment`.
            seed: numbers that all randomness is made of.
        """
        ...


class BudgetAllocator(Protocol):
    """How many rollouts each problem gets. All it remembers is in `state`."""

    def plan(self, uids: Sequence[str], total: int) -> list[int]:
        """Rollouts of each problem, `total` together."""
        ...

    def observe(self, uid: str, successes: Sequence[bool]) -> None:
        """Told of all rollouts of a problem."""
        ...

    @property
    def state(self) -> Any:
        """JSON, for checkpoints."""
        ...

    def restore(self, state: Any) -> None: ...

"""What the learner asks of tasks, of strategies that make rollouts, and of budgets."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from train.rl.rollout.rows import Trajectory
    from train.rl.rollout.sampler import Sampler

Split = Literal["train", "test"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a policy is asked.

    Attributes:
        uid: names it in every run; what is remembered of a problem goes by it.
        prompt: what the policy reads first.
        answer: for the scorer alone; any value that JSON holds.
        kind: for tables and histograms.
    """

    uid: str
    prompt: str
    answer: Any = None
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a policy wrote.

    Attributes:
        problem: that it was asked.
        text: without an id that ended it.
        tokens: its ids, the id that ended it among them.
        finished: whether an id ended it; if not it was cut at the length limit.
    """

    problem: Problem
    text: str
    tokens: tuple[int, ...]
    finished: bool


@dataclasses.dataclass(frozen=True)
class Reward:
    """What a completion is worth.

    Attributes:
        value: what learning goes by.
        success: what statistics, dynamic filtering and evaluation go by.
        info: numbers for the metrics, averaged by name.
    """

    value: float
    success: bool
    info: Mapping[str, float] = dataclasses.field(default_factory=dict)


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


@dataclasses.dataclass(frozen=True)
class Turn:
    """What an environment makes of an action.

    Attributes:
        state: after it.
        observation: what the policy reads next; of the last turn too, nothing is reset.
        reward: of this turn.
        terminated: the episode is over.
        truncated: it was cut, e.g. for its number of turns.
        success: whether it has ended well.
        info: numbers for the metrics.
    """

    state: Any
    observation: str
    reward: float
    terminated: bool
    truncated: bool = False
    success: bool = False
    info: Mapping[str, float] = dataclasses.field(default_factory=dict)


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
        sampler: "Sampler",
        task: Any,
        problems: Sequence[Problem],
        counts: Sequence[int],
        seed: Sequence[int],
    ) -> "list[Trajectory]":
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

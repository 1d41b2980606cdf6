"""Wrappers that change what a policy is shown: earlier turns again, or a text of one's own."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from train.rl.protocols import Environment
from train.rl.types import Completion, Problem, Split, Turn

View = Callable[[Sequence[str]], str]
"""Observation for the texts so far: the prompt, the first action, its observation, and so on."""


def last(shown: Sequence[str]) -> str:
    """The newest observation alone."""
    return shown[-1]


def observations(shown: Sequence[str]) -> str:
    """All observations, one after the other."""
    return "".join(shown[::2])


def transcript(shown: Sequence[str]) -> str:
    """All observations and actions, one after the other."""
    return "".join(shown)


VIEWS: dict[str, View] = {view.__name__: view for view in (last, observations, transcript)}
"""Views by name."""


@dataclasses.dataclass(frozen=True)
class Viewed:
    """State of an episode whose texts are kept.

    Attributes:
        inner: State of the wrapped environment.
        shown: Prompt, first action, its observation, and so on.
    """

    inner: Any
    shown: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ObservationView:
    """An environment whose observations are those of a view of the whole episode.

    For policies that read one observation at a time. The strategy `turns` shows a policy the whole
    text anyway: there, a view that repeats earlier turns shows them twice.

    Attributes:
        environment: Environment to wrap; tools go inside (`ToolEnvironment`).
        view: Observation for the texts so far, a name of `VIEWS` or a function.
    """

    environment: Environment
    view: str | View = "transcript"

    def __post_init__(self):
        if isinstance(self.view, str) and self.view not in VIEWS:
            raise ValueError(f"unknown view {self.view!r}: choose one of {', '.join(VIEWS)}")

    @property
    def name(self) -> str:
        view = self.view if isinstance(self.view, str) else self.view.__name__
        return f"{self.environment.name} shown by {view}"

    @property
    def sizes(self) -> Mapping[Split, int | None]:
        return self.environment.sizes

    @property
    def max_turns(self) -> int | None:
        """Greatest number of turns of an episode; None where the environment says none."""
        return getattr(self.environment, "max_turns", None)

    def problem(self, split: Split, index: int) -> Problem:
        return self.environment.problem(split, index)

    def reset(self, problem: Problem) -> Viewed:
        return Viewed(self.environment.reset(problem), (problem.prompt,))

    def step(self, state: Viewed, action: Completion) -> Turn:
        turn = self.environment.step(state.inner, action)
        shown = (*state.shown, action.text, turn.observation)
        view = VIEWS[self.view] if isinstance(self.view, str) else self.view
        return dataclasses.replace(turn, state=Viewed(turn.state, shown), observation=view(shown))

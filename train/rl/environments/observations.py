"""Wrappers that change what a policy is shown: earlier turns again, or a text of one's own."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from train.rl.environments.wrapper import EnvironmentWrapper
from train.rl.types import Completion, Problem, Turn

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

_REPEATED: dict[str, Callable[[str, str], str]] = {
    "last": lambda shown, action: "",
    "observations": lambda shown, action: shown,
    "transcript": lambda shown, action: shown + action,
}
"""What an observation of a view begins with, of the observation and the action before."""


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
class ObservationView(EnvironmentWrapper):
    """An environment whose observations are those of a view of the whole episode.

    For policies that read one observation at a time. The strategy `turns` shows a policy the whole
    text anyway: there, a view that repeats earlier turns shows them twice. The environment's
    players play through `last`, `observations` and `transcript`; other views hide too much.

    Attributes:
        environment: Environment to wrap; tools go inside (`ToolEnvironment`).
        view: Observation for the texts so far, a name of `VIEWS` or a function.
    """

    view: str | View = "transcript"

    def __post_init__(self):
        if isinstance(self.view, str) and self.view not in VIEWS:
            raise ValueError(f"unknown view {self.view!r}: choose one of {', '.join(VIEWS)}")

    @property
    def name(self) -> str:
        view = self.view if isinstance(self.view, str) else self.view.__name__
        return f"{self.environment.name} shown by {view}"

    @property
    def random_action(self) -> Any:
        return self._seeing(super().random_action)

    @property
    def scripted_action(self) -> Any:
        return self._seeing(super().scripted_action)

    def _seeing(self, act: Any) -> Any:
        """A player who is shown the observations that the view was made of."""
        repeated = _REPEATED.get(self.view) if isinstance(self.view, str) else None
        if repeated is None:
            raise AttributeError(f"{self.name} has no players: they see through {list(_REPEATED)}")

        def acts(shown: Sequence[str], rng: np.random.Generator) -> str:
            texts = list(shown)
            for index in range(2, len(shown), 2):
                before = repeated(shown[index - 2], shown[index - 1])
                texts[index] = shown[index].removeprefix(before)
            return act(texts, rng)

        return acts

    def reset(self, problem: Problem) -> Viewed:
        return Viewed(self.environment.reset(problem), (problem.prompt,))

    def step(self, state: Viewed, action: Completion) -> Turn:
        turn = self.environment.step(state.inner, action)
        shown = (*state.shown, action.text, turn.observation)
        view = VIEWS[self.view] if isinstance(self.view, str) else self.view
        return dataclasses.replace(turn, state=Viewed(turn.state, shown), observation=view(shown))

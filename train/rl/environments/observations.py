"""Wrapper that replaces the observations of an environment by a view of the whole episode."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from train.rl.environments.wrapper import EnvironmentWrapper
from train.rl.types import Completion, Problem, Turn

View = Callable[[Sequence[str]], str]
"""Function from the texts so far to the observation that the policy is shown.

The texts are the prompt, the first action, its observation, and so on."""


def last(shown: Sequence[str]) -> str:
    """Return the newest observation alone."""
    return shown[-1]


def observations(shown: Sequence[str]) -> str:
    """Concatenate the prompt and all observations, without the actions."""
    return "".join(shown[::2])


def transcript(shown: Sequence[str]) -> str:
    """Concatenate the prompt and all actions and observations."""
    return "".join(shown)


VIEWS: dict[str, View] = {view.__name__: view for view in (last, observations, transcript)}
"""Views by name."""

_REPEATED: dict[str, Callable[[str, str], str]] = {
    "last": lambda shown, action: "",
    "observations": lambda shown, action: shown,
    "transcript": lambda shown, action: shown + action,
}
"""For each view, a function that returns the text with which a later observation begins.

Its arguments are the view's previous observation and the action that followed this observation."""


@dataclasses.dataclass(frozen=True)
class Viewed:
    """State of an episode, together with all its texts.

    Attributes:
        inner: State of the wrapped environment.
        shown: Prompt, first action, its observation, and so on, as the wrapped environment gave
            them.
    """

    inner: Any
    shown: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ObservationView(EnvironmentWrapper):
    """Wrapper whose view computes each observation from all texts of the episode so far.

    The wrapper is for policies that see one observation at a time. The strategy `turns` already
    shows a policy all turns, so a view that repeats earlier turns would show them twice. The
    wrapped environment's random and scripted players work with the views `last`, `observations` and
    `transcript`, from which the environment's own observations can be recovered, and with no other
    views.

    Attributes:
        environment: Environment to wrap; wrap tools (`ToolEnvironment`) inside this wrapper.
        view: Name of a view in `VIEWS`, or a function from the texts so far to the observation.

    Raises:
        ValueError: `view` is a text that is not a name in `VIEWS`.
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
        """Wrap a player so that it sees the wrapped environment's own observations."""
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

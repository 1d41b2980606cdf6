"""What all wrappers of environments share: they delegate, and copy no attributes."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from train.rl.protocols import Environment
from train.rl.types import Problem, Split


@dataclasses.dataclass(frozen=True)
class EnvironmentWrapper:
    """Base of environments around an environment; a new one writes `step`.

    Attributes:
        environment: Environment to wrap.
    """

    environment: Environment

    @property
    def _inner(self) -> Any:
        """The environment with what the protocol leaves to it."""
        return cast(Any, self.environment)

    @property
    def name(self) -> str:
        return self.environment.name

    @property
    def sizes(self) -> Mapping[Split, int | None]:
        return self.environment.sizes

    @property
    def max_turns(self) -> int | None:
        """Greatest number of turns of an episode; None where the environment says none."""
        return getattr(self.environment, "max_turns", None)

    @property
    def failure_value(self) -> float:
        """Reward of an episode that fails."""
        return float(getattr(self.environment, "failure_value", 0.0))

    @property
    def serial(self) -> bool:
        """Whether one step runs at a time in the whole process."""
        return bool(getattr(self.environment, "serial", False))

    @property
    def random_action(self) -> Any:
        """The environment's random player; an `AttributeError` where it has none."""
        return self._inner.random_action

    @property
    def scripted_action(self) -> Any:
        """The environment's scripted player; an `AttributeError` where it has none."""
        return self._inner.scripted_action

    def problem(self, split: Split, index: int) -> Problem:
        return self.environment.problem(split, index)

    def reset(self, problem: Problem) -> Any:
        return self.environment.reset(problem)

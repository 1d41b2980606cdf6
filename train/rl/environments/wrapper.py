"""Base of environment wrappers, which delegates everything except `step`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from train.rl.protocols import Environment
from train.rl.types import Problem, Split


@dataclasses.dataclass(frozen=True)
class EnvironmentWrapper:
    """Base of wrappers around an environment; a subclass implements `step`.

    Attributes:
        environment: Environment to wrap.
    """

    environment: Environment

    @property
    def _inner(self) -> Any:
        """Wrapped environment, untyped: its optional attributes are not part of the protocol."""
        return cast(Any, self.environment)

    @property
    def name(self) -> str:
        return self.environment.name

    @property
    def sizes(self) -> Mapping[Split, int | None]:
        return self.environment.sizes

    @property
    def max_turns(self) -> int | None:
        """Maximum number of turns of an episode; None if the environment has no maximum."""
        return getattr(self.environment, "max_turns", None)

    @property
    def failure_value(self) -> float:
        """Reward of an episode that fails; 0 if the environment does not define this reward."""
        return float(getattr(self.environment, "failure_value", 0.0))

    @property
    def serial(self) -> bool:
        """Whether steps of the environment must run one at a time in the whole process."""
        return bool(getattr(self.environment, "serial", False))

    @property
    def random_action(self) -> Any:
        """Random player of the environment, a function `(shown, rng)` that returns an action.

        Raises:
            AttributeError: The environment has no random player.
        """
        return self._inner.random_action

    @property
    def scripted_action(self) -> Any:
        """Scripted player of the environment, a function `(shown, rng)` that returns an action.

        Raises:
            AttributeError: The environment has no scripted player.
        """
        return self._inner.scripted_action

    def problem(self, split: Split, index: int) -> Problem:
        return self.environment.problem(split, index)

    def reset(self, problem: Problem) -> Any:
        return self.environment.reset(problem)

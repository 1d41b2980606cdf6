"""The reference policy of a KL penalty: the parameters at the start or at the last reset."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

from train.devices.mesh import put
from train.engine.state import Trainable
from train.runs.checkpoint import Checkpointer


class Reference:
    """The reference policy of a run, which shares its frozen parameters with the trained policy.

    Args:
        trainable: `Trainable` of the run, with the shapes and shardings of its parameters.
        first_variables: Function that returns the initial variables of the run
            (`TrainState.variables`).
        used: Whether the loss reads the reference policy.
        reset_every: Number of steps between resets of the reference policy to the current policy;
            None for no resets.
    """

    def __init__(
        self,
        trainable: Trainable,
        first_variables: Callable[[], Any],
        used: bool,
        reset_every: int | None,
    ):
        self._trainable, self._first_variables = trainable, first_variables
        self._used = used
        self.reset_every = reset_every if used else None
        self._params: Any = None

    @property
    def params(self) -> Any:
        """Trained parameters of the reference policy; None if the loss does not read them."""
        if self._used and self._params is None:
            variables = put(self._first_variables(), self._trainable.shardings.variables)
            self._params = self._trainable.abstract.with_variables(variables).params
        return self._params

    @property
    def abstract(self) -> Any:
        """Shapes, dtypes and shardings of `params`."""
        return self._trainable.abstract.params

    def reset_if_due(self, steps_done: int, params: Any) -> None:
        """Reset the reference policy to a copy of the current parameters every `reset_every` steps.

        Args:
            steps_done: Number of steps so far.
            params: Trained parameters of the current policy, a pytree.
        """
        if self.reset_every is not None and steps_done and steps_done % self.reset_every == 0:
            self.restore(jax.tree.map(lambda leaf: leaf.copy(), params))

    def restore(self, params: Any) -> None:
        """Set the trained parameters of the reference policy, e.g. from a checkpoint."""
        self._params = params


class ReferenceCheckpointer(Checkpointer):
    """A `Checkpointer` that also saves a reference policy with resets.

    Args:
        directory: Run folder.
        save_interval: Number of steps between checkpoints.
        keep: Number of newest checkpoints that are kept.
        keep_every: Interval in steps; checkpoints at its multiples are never deleted. None for no
            permanent checkpoints.
        reference: Reference policy of the run. A reference policy without resets is not saved,
            because it equals the initial policy.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        save_interval: int,
        keep: int,
        keep_every: int | None,
        reference: Reference,
    ):
        super().__init__(directory, save_interval, keep, keep_every)
        self._reference = reference

    def save(
        self, step: int, params: Any, train: Any, meta: Mapping[str, Any], force: bool = False
    ) -> bool:
        if self._reference.reset_every is not None:
            train = {"rest": train, "reference": self._reference.params}
        return super().save(step, params, train, meta, force)

    def restore(
        self, params_abstract: Any, train_abstract: Any, step: int | None = None
    ) -> tuple[int, Any, Any, dict[str, Any]]:
        if self._reference.reset_every is None:
            return super().restore(params_abstract, train_abstract, step)
        both = {"rest": train_abstract, "reference": self._reference.abstract}
        step, params, train, meta = super().restore(params_abstract, both, step)
        self._reference.restore(train["reference"])
        return step, params, train["rest"], meta

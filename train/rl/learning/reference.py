"""The reference policy of a KL penalty: the weights of the beginning, or of the last reset."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

from train.devices.mesh import put
from train.engine.state import Trainable
from train.runs.checkpoint import Checkpointer


class Reference:
    """Trained parameters of the reference policy; the frozen ones are the run's.

    Args:
        trainable: Static side of the run.
        first_weights: Function that returns the weights that the run began with.
        used: Whether the loss reads the reference at all.
        every: Number of steps after which it becomes the present policy; None for never.
    """

    def __init__(
        self,
        trainable: Trainable,
        first_weights: Callable[[], Any],
        used: bool,
        every: int | None,
    ):
        self._trainable, self._first_weights = trainable, first_weights
        self._used = used
        self.every = every if used else None
        self._params: Any = None

    @property
    def params(self) -> Any:
        """Parameters of the reference policy, None where the loss reads none."""
        if self._used and self._params is None:
            weights = put(self._first_weights(), self._trainable.shardings.weights)
            self._params = self._trainable.abstract.with_weights(weights).params
        return self._params

    @property
    def abstract(self) -> Any:
        """Shapes and shardings of the parameters."""
        return self._trainable.abstract.params

    def reset_if_due(self, steps_done: int, params: Any) -> None:
        """Take over the present parameters before the first step of a new period.

        Args:
            steps_done: Number of steps so far.
            params: Trained parameters; they are copied.
        """
        if self.every is not None and steps_done and steps_done % self.every == 0:
            self.restore(jax.tree.map(lambda leaf: leaf.copy(), params))

    def restore(self, params: Any) -> None:
        """Continue with the parameters of a checkpoint."""
        self._params = params


class ReferenceCheckpointer(Checkpointer):
    """A `Checkpointer` that keeps a reference policy that is reset beside the state of training.

    Args:
        directory: Run folder.
        save_interval: Number of steps between checkpoints.
        keep: Number of newest checkpoints that are kept.
        keep_every: Number of steps whose multiples are kept for ever; None for none.
        reference: Reference policy of the run. One that is never reset is not saved: it is the
            weights that the run begins with.
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
        if self._reference.every is not None:
            train = {"rest": train, "reference": self._reference.params}
        return super().save(step, params, train, meta, force)

    def restore(
        self, params_abstract: Any, train_abstract: Any, step: int | None = None
    ) -> tuple[int, Any, Any, dict[str, Any]]:
        if self._reference.every is None:
            return super().restore(params_abstract, train_abstract, step)
        both = {"rest": train_abstract, "reference": self._reference.abstract}
        step, params, train, meta = super().restore(params_abstract, both, step)
        self._reference.restore(train["reference"])
        return step, params, train["rest"], meta

"""Select rows of a batch, take these rows out of the batch's arrays, and put them back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from memgen.placement import join_rows, split_rows
from memgen.short_repr import ShortRepr


@dataclasses.dataclass(frozen=True, repr=False)
class RowGroup(ShortRepr):
    """Selection of `R` rows from each of `P` equal parts of a batch.

    The parts are the batch's shards, so taking rows out and putting rows back moves no row between
    devices.

    Attributes:
        index: `[P, R]` int32, indices of the selected rows within each part, each index once.
    """

    index: jax.Array

    @classmethod
    def next(cls, waiting: jax.Array, parts: int, each: int) -> "RowGroup":
        """Select the rows of each part that have waited longest; the first ones in case of a tie.

        Args:
            waiting: `[B]` int32, steps that each row has waited (`memgen.events.Loop.waiting`).
            parts: Number of equal parts of the batch.
            each: Number of rows to select from each part.
        """
        order = jnp.argsort(split_rows(-waiting, 0, parts), axis=1, stable=True)
        return cls(order[:, :each].astype(jnp.int32))

    def take(self, tree: Any, axes: Any = None) -> Any:
        """Take the selected rows out of each array.

        Args:
            tree: Pytree of arrays.
            axes: Pytree with the row axis of each array, None for an array that all rows share
                (which is taken whole); by default 0 for all arrays.
        """

        def rows(leaf, axis):
            if axis is None:
                return leaf
            some = lambda part, index: jnp.take(part, index, axis, mode="clip")  # noqa: E731
            parts = split_rows(leaf, axis, self.index.shape[0])
            return join_rows(jax.vmap(some, (axis, 0), axis)(parts, self.index), axis)

        return jax.tree.map(rows, tree, _or_zeros(axes, tree))

    def put(self, tree: Any, new: Any, axes: Any = None) -> Any:
        """Return the arrays with the selected rows replaced.

        Args:
            tree: Pytree of arrays of the batch.
            new: Pytree like `tree`, with the selected rows alone, in the order of `take`. An array
                that all rows share is replaced by the array in `new`.
            axes: As in `take`.
        """

        def rows(leaf, new, axis):
            if axis is None:
                return new
            shards = self.index.shape[0]
            where = (slice(None),) * axis
            some = lambda part, new, index: part.at[(*where, index)].set(  # noqa: E731
                new, mode="clip", unique_indices=True
            )
            split = split_rows(leaf, axis, shards), split_rows(new, axis, shards)
            return join_rows(jax.vmap(some, (axis, axis, 0), axis)(*split, self.index), axis)

        return jax.tree.map(rows, tree, new, _or_zeros(axes, tree))


def _or_zeros(axes: Any, tree: Any) -> Any:
    return jax.tree.map(lambda _: 0, tree) if axes is None else axes

"""A selection of rows of a batch, taken out of its arrays and put back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from memgen.placement import join_rows, split_rows
from memgen.short_repr import ShortRepr


@dataclasses.dataclass(frozen=True, repr=False)
class RowGroup(ShortRepr):
    """A selection of rows of a batch: as many from each of `P` equal parts of the batch.

    The parts are the batch's shards, so taking rows out and putting them back moves no row between
    devices.

    Attributes:
        index: `[P, R]` int32, indices of the selected rows within each part, each index once.
    """

    index: jax.Array

    @classmethod
    def next(cls, waiting: jax.Array, parts: int, each: int) -> "RowGroup":
        """Select `each` rows of every part: those that have waited longest, then the first ones.

        Args:
            waiting: `[B]` int32, as in `memgen.events.Loop`.
            parts: Number of equal parts of the batch.
            each: Number of rows of each part.
        """
        order = jnp.argsort(split_rows(-waiting, 0, parts), axis=1, stable=True)
        return cls(order[:, :each].astype(jnp.int32))

    def take(self, tree: Any, axes: Any = None) -> Any:
        """Take the group's rows of each array.

        Args:
            tree: Pytree of arrays.
            axes: Axis of the rows in each array, None for an array that all rows share (which is
                taken whole); by default 0 for all arrays.
        """

        def rows(leaf, axis):
            if axis is None:
                return leaf
            some = lambda part, index: jnp.take(part, index, axis, mode="clip")  # noqa: E731
            parts = split_rows(leaf, axis, self.index.shape[0])
            return join_rows(jax.vmap(some, (axis, 0), axis)(parts, self.index), axis)

        return jax.tree.map(rows, tree, _or_zeros(axes, tree))

    def put(self, tree: Any, new: Any, axes: Any = None) -> Any:
        """Replace the group's rows of each array by `new`; `axes` are as in `take`.

        An array that all rows share is replaced by the array in `new`.
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

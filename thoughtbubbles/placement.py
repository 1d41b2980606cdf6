"""Make arrays with the sharding of a given array, under any mesh.

On `AxisType.Explicit` mesh axes (the default of `jax.make_mesh`) a sharding is part of an array's
type. New arrays (`arange`, `zeros`) are replicated, and sort, concatenate, `where`, `vmap` and loop
carries raise an error if they combine a replicated array with a sharded batch. Arrays made here are
sharded like the batch: without a mesh, on `AxisType.Auto` and `Explicit` axes, and inside
`shard_map`, where they vary over the same manual axes as the batch.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

AnyArray = jax.Array | np.ndarray


def broadcast_beside(values: Any, like: AnyArray, axes: int, dtype: Any = jnp.int32) -> jax.Array:
    """Broadcast values to the leading axes of an array, with the array's sharding.

    Args:
        values: Number or array that broadcasts to `like.shape[:axes]`.
        like: Array that determines the shape and the sharding.
        axes: Number of leading axes of `like` that the result has.
        dtype: Dtype of the result.
    """
    values = jnp.asarray(values, dtype)
    values = jnp.expand_dims(values, range(axes - values.ndim))
    return _zeros(like, like.shape[:axes], dtype, axes) + values


def zeros_beside(like: AnyArray, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Make zeros whose batch axis is sharded as that of an array; other axes are replicated.

    Args:
        like: Array `[B, ...]` that determines the sharding.
        shape: Shape of the result, `B` first.
        dtype: Dtype of the result.
    """
    return _zeros(like, shape, dtype, 1)


def _zeros(like: AnyArray, shape: tuple[int, ...], dtype: Any, axes: int) -> jax.Array:
    like = jnp.asarray(like)
    here = jax.typeof(like).sharding
    place = NamedSharding(here.mesh, PartitionSpec(*here.spec[:axes]))
    return jnp.zeros_like(like, dtype, shape, out_sharding=place)


def is_sharded(values: AnyArray) -> bool:
    """Return whether an array is split over `AxisType.Explicit` mesh axes."""
    return any(jax.typeof(jnp.asarray(values)).sharding.spec)


def embedding_rows(table: AnyArray, index: AnyArray) -> jax.Array:
    """Look up rows of a table, sharded like the indices; NaN for an index outside of the table.

    Args:
        table: `[V, ...]` array of floats.
        index: Integer indices of any shape.
    """
    return rows_at(table, index, mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def rows_at(table: AnyArray, index: AnyArray, **get: Any) -> jax.Array:
    """Compute `table.at[index].get(**get)`, sharded like the indices.

    Args:
        table: `[V, ...]` array.
        index: Integer indices of any shape.
        get: Keyword arguments of `get`, such as `mode` for indices outside of the table.
    """
    table, index = jnp.asarray(table), jnp.asarray(index)
    here = jax.typeof(index).sharding
    place = NamedSharding(here.mesh, PartitionSpec(*here.spec, *[None] * (table.ndim - 1)))
    return table.at[index].get(out_sharding=place, **get)


def product(x: jax.Array, kernel: jax.Array, inputs: int = 1) -> jax.Array:
    """Multiply `x [..., *inputs]` by a kernel `[*inputs, *outputs]`, giving `[..., *outputs]`.

    Without explicit mesh axes, both arrays are reshaped to matrices first. Otherwise XLA on a CPU
    would compute the gradient of the result twice, the second time transposed for the gradient of
    the kernel. Because of the reshape, sharding over auto mesh axes is only cheap on the first of
    the leading axes, of the input axes and of the output axes; any other sharded axis is gathered.

    Args:
        x: Array with any number of leading axes.
        kernel: Kernel with the dtype of `x`.
        inputs: Number of contracted axes.
    """
    if any((*jax.typeof(x).sharding.spec, *jax.typeof(kernel).sharding.spec)):
        return jnp.tensordot(x, kernel, inputs)  # explicit axes do not go through every reshape
    rows, width = x.shape[: x.ndim - inputs], math.prod(kernel.shape[:inputs])
    outputs = kernel.shape[inputs:]
    y = x.reshape(math.prod(rows), width) @ kernel.reshape(width, math.prod(outputs))
    return y.reshape(*rows, *outputs)


def product_beside(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Compute `x @ matrix`, with the leading axes of the result sharded like those of `x`.

    If the last axis of `x` is sharded over explicit mesh axes, each device contracts its part and
    the partial products are summed, so `x` is not gathered; the matrix, which should be small, is
    resharded instead.

    Args:
        x: `[..., inputs]` array.
        matrix: `[inputs, outputs]` array, or a stack `[*stack, inputs, outputs]` if `x` is
            `[*stack, ..., inputs]`.
    """
    here, there = jax.typeof(x).sharding, jax.typeof(matrix).sharding
    if not any(here.spec) and not any(there.spec):
        return product(x, matrix) if matrix.ndim == 2 else x @ matrix
    mesh = here.mesh if any(here.spec) else there.mesh
    *rows, split = here.spec
    names = jax.tree.leaves(tuple(rows))
    free = None if set(jax.tree.leaves(there.spec[-1])) & set(names) else there.spec[-1]
    spec = PartitionSpec(*there.spec[:-2], split, free)
    matrix = jax.sharding.reshard(matrix, NamedSharding(mesh, spec))
    place = NamedSharding(mesh, PartitionSpec(*rows, free))
    return jnp.matmul(x, matrix, out_sharding=place)


def placed_beside(tree: Any, like: AnyArray, axis: int = 0) -> Any:
    """Shard the batch axis of new arrays, such as caches and PRNG keys, like that of an array.

    Args:
        tree: Pytree of arrays with a batch axis.
        like: Array `[B, ...]` that determines the sharding.
        axis: Index of the batch axis in each array of `tree`.
    """
    here = jax.typeof(jnp.asarray(like)).sharding
    if not here.spec or here.spec[0] is None:
        return tree  # nothing to do without a mesh, or on auto and manual axes

    def place(leaf: jax.Array) -> jax.Array:
        spec = list(jax.typeof(leaf).sharding.spec)
        spec[axis] = here.spec[0]
        return jax.sharding.reshard(leaf, NamedSharding(here.mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, tree)

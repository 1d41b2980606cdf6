"""Arrays made beside others: placed as they are, whatever the mesh.

Under JAX's explicit axes (the default of `jax.make_mesh`) a sharding is part of an array's type,
and what is made from nothing (`arange`, `zeros`) is replicated: sort, concatenate, `where`, `vmap`
and loop carries refuse it beside a batch that is sharded. Arrays made here match without a mesh,
under auto and explicit axes, and inside `shard_map`, where they vary as the others do.
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
    """Values broadcast to the first axes of an array, and placed as it is.

    Args:
        values: Values that broadcast to `like.shape[:axes]`.
        like: Array that the result stands beside.
        axes: Number of leading axes of `like` that the result has.
        dtype: Type of the result.
    """
    values = jnp.asarray(values, dtype)
    values = jnp.expand_dims(values, range(axes - values.ndim))
    return _zeros(like, like.shape[:axes], dtype, axes) + values


def zeros_beside(like: AnyArray, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros whose batch axis is placed as that of an array; their other axes are replicated.

    Args:
        like: Array `[B, ...]`.
        shape: Shape of the result, `B` first.
        dtype: Type of the result.
    """
    return _zeros(like, shape, dtype, 1)


def _zeros(like: AnyArray, shape: tuple[int, ...], dtype: Any, axes: int) -> jax.Array:
    like = jnp.asarray(like)
    here = jax.typeof(like).sharding
    place = NamedSharding(here.mesh, PartitionSpec(*here.spec[:axes]))
    return jnp.zeros_like(like, dtype, shape, out_sharding=place)


def embedding_rows(table: AnyArray, index: AnyArray) -> jax.Array:
    """Rows of a table, `jnp.take(table, index, axis=0)`: NaN for an index outside of it.

    Args:
        table: `[V, ...]` array.
        index: Indices of any shape, whose placement the result takes.
    """
    return rows_at(table, index, mode="fill", fill_value=jnp.nan)


def rows_at(table: AnyArray, index: AnyArray, **get: Any) -> jax.Array:
    """Rows of a table, `table.at[index].get(**get)`, placed as the index is.

    Args:
        table: `[V, ...]` array.
        index: Indices of any shape.
        get: Options of `get`, such as what an index outside of the table means.
    """
    table, index = jnp.asarray(table), jnp.asarray(index)
    here = jax.typeof(index).sharding
    place = NamedSharding(here.mesh, PartitionSpec(*here.spec, *[None] * (table.ndim - 1)))
    return table.at[index].get(out_sharding=place, **get)


def product(x: jax.Array, kernel: jax.Array, inputs: int = 1) -> jax.Array:
    """`[..., *outputs]` of `x [..., *inputs]` and a kernel `[*inputs, *outputs]`.

    Without explicit axes it is a product of two matrices: of more axes, XLA on a CPU computes the
    gradient of the result a second time, transposed, for the gradient of the kernel. A compiler
    that splits axes of the rows other than the first, or inputs or outputs other than their first
    axis, gathers them.

    Args:
        x: Any number of rows.
        kernel: Kernel in the dtype of the rows.
        inputs: Number of contracted axes.
    """
    if any((*jax.typeof(x).sharding.spec, *jax.typeof(kernel).sharding.spec)):
        return jnp.tensordot(x, kernel, inputs)  # explicit axes do not go through every reshape
    rows, width = x.shape[: x.ndim - inputs], math.prod(kernel.shape[:inputs])
    outputs = kernel.shape[inputs:]
    y = x.reshape(math.prod(rows), width) @ kernel.reshape(width, math.prod(outputs))
    return y.reshape(*rows, *outputs)


def product_beside(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`x @ matrix`, placed as the rows of `x` are.

    Where explicit axes split the last axis of `x`, each device contracts its part and the results
    are summed; nothing of `x` is gathered. The matrix, which is small, is moved to where it is
    needed.

    Args:
        x: `[..., inputs]` array.
        matrix: `[inputs, outputs]` array; or a stack of them, `[*stack, inputs, outputs]`, for `x`
            of the same stack.
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
    """Arrays that were made for a batch size alone (caches, keys), placed as the batch is.

    Args:
        tree: Arrays whose axis `axis` is the batch.
        like: Array of the batch, `[B, ...]`.
        axis: Axis of the batch in each leaf.
    """
    here = jax.typeof(jnp.asarray(like)).sharding
    if not here.spec or here.spec[0] is None:
        return tree  # without a mesh, auto and manual axes: nothing to do

    def place(leaf: jax.Array) -> jax.Array:
        spec = list(jax.typeof(leaf).sharding.spec)
        spec[axis] = here.spec[0]
        return jax.sharding.reshard(leaf, NamedSharding(here.mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, tree)

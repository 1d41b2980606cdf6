"""Arrays made beside others: placed as they are, whatever the mesh.

Under JAX's explicit axes (the default of `jax.make_mesh`) a sharding is part of an array's type,
and what is made from nothing (`arange`, `zeros`) is replicated: sort, concatenate, `where`, `vmap`
and loop carries refuse it beside a batch that is sharded. Arrays made here match without a mesh,
under auto and explicit axes, and inside `shard_map`, where they vary as the others do.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def broadcast_beside(values: Any, like: jax.Array, axes: int, dtype: Any = jnp.int32) -> jax.Array:
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


def zeros_beside(like: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros whose batch axis is placed as that of an array; their other axes are replicated.

    Args:
        like: Array `[B, ...]`.
        shape: Shape of the result, `B` first.
        dtype: Type of the result.
    """
    return _zeros(like, shape, dtype, 1)


def _zeros(like: jax.Array, shape: tuple[int, ...], dtype: Any, axes: int) -> jax.Array:
    like = jnp.asarray(like)
    here = jax.typeof(like).sharding
    place = NamedSharding(here.mesh, PartitionSpec(*here.spec[:axes]))
    return jnp.zeros_like(like, dtype, shape, out_sharding=place)


def embedding_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of a table, `jnp.take(table, index, axis=0)`: NaN for an index outside of it.

    Args:
        table: `[V, ...]` array.
        index: Indices of any shape, whose placement the result takes.
    """
    return rows_at(table, index, mode="fill", fill_value=jnp.nan)


def rows_at(table: jax.Array, index: jax.Array, **get: Any) -> jax.Array:
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


def placed_beside(tree: Any, like: jax.Array, axis: int = 0) -> Any:
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

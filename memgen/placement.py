"""Arrays made beside others: placed as they are, whatever the mesh.

`thoughtbubbles.placement` says why; the two libraries do not import each other. Here the rows of a
batch may also be taken apart, shard by shard.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

AnyArray = jax.Array | np.ndarray


def broadcast_beside(values: Any, like: jax.Array, axes: int, dtype: Any = jnp.int32) -> jax.Array:
    """Values broadcast to the first axes of an array, and placed as it is.

    Args:
        values: Values that broadcast to `like.shape[:axes]`.
        like: Array that the result stands beside.
        axes: Number of leading axes of `like` that the result has.
        dtype: Type of the result.
    """
    like, values = jnp.asarray(like), jnp.asarray(values, dtype)
    zeros = _zeros(like, like.shape[:axes], dtype)
    return zeros + jnp.expand_dims(values, range(axes - values.ndim))


def repeat_beside(values: jax.Array, like: jax.Array) -> jax.Array:
    """Values repeated for each element of an array, and placed as it is.

    The gradient of the values is summed where the elements are (`reshard` would gather it first).

    Args:
        values: `[...]` array, the same on all devices.
        like: Array of any shape that the result stands beside.

    Returns:
        Array of the shape of `like` and then that of the values.
    """
    return _zeros(like, (*like.shape, *values.shape), values.dtype) + values


def _zeros(like: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    here = jax.typeof(like).sharding
    place = NamedSharding(here.mesh, PartitionSpec(*here.spec[: len(shape)]))
    return jnp.zeros_like(like, dtype, shape, out_sharding=place)


def table_rows(table: AnyArray, index: AnyArray) -> jax.Array:
    """Rows of a table, `jnp.take(table, index, axis=0)`.

    Args:
        table: `[V, ...]` array.
        index: Indices of any shape, whose placement the result takes.
    """
    table, index = jnp.asarray(table), jnp.asarray(index)
    here = jax.typeof(index).sharding
    spec = PartitionSpec(*here.spec, *[None] * (table.ndim - 1))
    return table.at[index].get(mode="fill", out_sharding=NamedSharding(here.mesh, spec))


def embed(decoder: Any, tokens: AnyArray) -> jax.Array:
    """`decoder.embed_tokens(tokens)`, placed as the ids are.

    A decoder that knows of explicit axes is called as it is. `nnx.Embed` and `flax.linen.Embed`
    refuse ids that such axes split unless they are told the placement of the vectors, for all ids
    alike; the axes are auto for a decoder that refuses.

    Args:
        decoder: A `DecoderBackbone`.
        tokens: Ids of any shape.

    Returns:
        Vectors, `[*tokens.shape, D]`.
    """
    tokens = jnp.asarray(tokens)
    here = jax.typeof(tokens).sharding
    if not here.mesh.explicit_axes:
        return decoder.embed_tokens(tokens)
    place = NamedSharding(here.mesh, PartitionSpec(*here.spec, None))
    try:
        return jax.sharding.reshard(decoder.embed_tokens(tokens), place)
    except Exception:  # noqa: BLE001 (of JAX, without a public class; what else it was comes again)
        pass
    read: Any = jax.sharding.auto_axes(
        lambda own, ids: own.embed_tokens(ids), axes=here.mesh.explicit_axes, out_sharding=place
    )
    return read(decoder, tokens)


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


def placed_beside(tree: Any, like: jax.Array, axes: Any = 0) -> Any:
    """Arrays that were made for a number of rows (caches, keys), placed as other rows are.

    Inside `shard_map` they vary over the mesh axes that the other rows vary over, so that a loop
    may carry them.

    Args:
        tree: Arrays with an axis of rows.
        like: Array `[B, ...]` whose rows the others stand beside.
        axes: Axis of the rows in each array: a number for all of them, or a pytree of numbers, with
            None for an array that all rows share.
    """
    here = jax.typeof(jnp.asarray(like))
    rows = here.sharding.spec[0] if here.sharding.spec else None

    def place(leaf: jax.Array, axis: int | None) -> jax.Array:
        own = jax.typeof(leaf)
        missing = here.manual_axis_type.varying - own.manual_axis_type.varying
        if missing:
            leaf = jax.lax.pcast(leaf, tuple(missing), to="varying")
        if rows is None or axis is None:
            return leaf
        spec = [*own.sharding.spec, *[None] * (leaf.ndim - len(own.sharding.spec))]
        spec[axis] = rows
        place = NamedSharding(here.sharding.mesh, PartitionSpec(*spec))
        return jax.sharding.reshard(leaf, place)

    if isinstance(axes, int):
        return jax.tree.map(lambda leaf: place(leaf, axes), tree)
    return jax.tree.map(place, tree, axes)


def placed_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """An array placed as another one of its shape is."""
    here, there = jax.typeof(x).sharding, jax.typeof(like).sharding
    if here.spec == there.spec or not any((*here.spec, *there.spec)):
        return x
    mesh = there.mesh if any(there.spec) else here.mesh
    return jax.sharding.reshard(x, NamedSharding(mesh, there.spec))


def row_shards(like: jax.Array) -> int:
    """Number of parts that explicit axes split the rows of an array into; 1 under others."""
    here = jax.typeof(like).sharding
    rows = here.spec[0] if here.spec else None
    names = rows if isinstance(rows, tuple) else () if rows is None else (rows,)
    return math.prod(here.mesh.shape[name] for name in names)


def split_rows(leaf: jax.Array, axis: int, parts: int) -> jax.Array:
    """The axis of the rows as two: the parts, which explicit axes split, and the rows of each.

    Args:
        leaf: Array with an axis of rows.
        axis: That axis.
        parts: Number of parts, that of the shards (`row_shards`).
    """
    shape = (*leaf.shape[:axis], parts, leaf.shape[axis] // parts, *leaf.shape[axis + 1 :])
    here = jax.typeof(leaf).sharding
    if not any(here.spec):
        return leaf.reshape(shape)
    spec = PartitionSpec(*here.spec[: axis + 1], None, *here.spec[axis + 1 :])
    return jax.lax.reshape(leaf, shape, out_sharding=NamedSharding(here.mesh, spec))


def join_rows(parts: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `split_rows`, with shape and placement of the array that was split."""
    here = jax.typeof(like).sharding
    if not any(here.spec):
        return parts.reshape(like.shape)
    return jax.lax.reshape(parts, like.shape, out_sharding=here)

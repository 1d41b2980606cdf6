"""Give new arrays the sharding of existing arrays under any mesh, and split rows by shard.

`thoughtbubbles.placement` explains why this is needed; the two libraries do not import each other.
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
    """Broadcast values to the leading axes of an array, with the array's sharding.

    Args:
        values: Array or scalar that broadcasts to `like.shape[:axes]`.
        like: Array that determines the shape and the sharding of the result.
        axes: Number of leading axes of `like` that the result has.
        dtype: Dtype of the result.
    """
    like, values = jnp.asarray(like), jnp.asarray(values, dtype)
    zeros = _zeros(like, like.shape[:axes], dtype)
    return zeros + jnp.expand_dims(values, range(axes - values.ndim))


def repeat_beside(values: jax.Array, like: jax.Array) -> jax.Array:
    """Repeat values for each element of an array, with the array's sharding.

    In the backward pass, each device sums its part of the values' gradient before devices
    communicate (`reshard` would gather the gradient first).

    Args:
        values: Array of any shape, replicated on all devices.
        like: Array of any shape that determines the sharding of the result.

    Returns:
        Array of shape `[*like.shape, *values.shape]`.
    """
    return _zeros(like, (*like.shape, *values.shape), values.dtype) + values


def _zeros(like: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    here = jax.typeof(like).sharding
    place = NamedSharding(here.mesh, PartitionSpec(*here.spec[: len(shape)]))
    return jnp.zeros_like(like, dtype, shape, out_sharding=place)


def table_rows(table: AnyArray, index: AnyArray) -> jax.Array:
    """Compute `jnp.take(table, index, axis=0)` with the sharding of the indices.

    Args:
        table: `[V, ...]` array, one row for each token id.
        index: Integer indices of any shape.
    """
    table, index = jnp.asarray(table), jnp.asarray(index)
    here = jax.typeof(index).sharding
    spec = PartitionSpec(*here.spec, *[None] * (table.ndim - 1))
    return table.at[index].get(mode="fill", out_sharding=NamedSharding(here.mesh, spec))


def embed(decoder: Any, tokens: AnyArray) -> jax.Array:
    """Compute `decoder.embed_tokens(tokens)` with the sharding of the token ids.

    Under a mesh with `AxisType.Explicit` axes, some decoders raise an error, because `nnx.Embed`
    and `flax.linen.Embed` need to be told the sharding of their result. After an error, the call
    is repeated with the explicit axes turned into `AxisType.Auto` axes.

    Args:
        decoder: A `DecoderBackbone`.
        tokens: Token ids of any shape; negative ids, such as -1 of padding, are read as 0.

    Returns:
        Vectors, `[*tokens.shape, D]`.
    """
    tokens = jnp.maximum(jnp.asarray(tokens), 0)
    here = jax.typeof(tokens).sharding
    if not here.mesh.explicit_axes:
        return decoder.embed_tokens(tokens)
    place = NamedSharding(here.mesh, PartitionSpec(*here.spec, None))
    try:
        return jax.sharding.reshard(decoder.embed_tokens(tokens), place)
    except Exception:  # noqa: BLE001 (JAX's class is private; other errors are raised again below)
        pass
    read: Any = jax.sharding.auto_axes(
        lambda own, ids: own.embed_tokens(ids), axes=here.mesh.explicit_axes, out_sharding=place
    )
    return read(decoder, tokens)


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


def placed_beside(tree: Any, like: jax.Array, axes: Any = 0) -> Any:
    """Shard the rows of new arrays (such as caches and PRNG keys) like the rows of `like`.

    Inside `shard_map`, the arrays are marked as varying over the mesh axes over which `like`
    varies, so that a loop can carry the arrays.

    Args:
        tree: Pytree of arrays with a row axis.
        like: Array `[B, ...]` that determines the sharding of the rows.
        axes: Row axis of the arrays: a number for all arrays, or a pytree with a number for each
            array, and None for an array that all rows share.
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
    """Reshard an array like another array of the same shape."""
    here, there = jax.typeof(x).sharding, jax.typeof(like).sharding
    if here.spec == there.spec or not any((*here.spec, *there.spec)):
        return x
    mesh = there.mesh if any(there.spec) else here.mesh
    return jax.sharding.reshard(x, NamedSharding(mesh, there.spec))


def row_shards(like: jax.Array) -> int:
    """Return the number of shards of an array's axis 0; 1 unless it is over explicit mesh axes."""
    here = jax.typeof(like).sharding
    rows = here.spec[0] if here.spec else None
    names = rows if isinstance(rows, tuple) else () if rows is None else (rows,)
    return math.prod(here.mesh.shape[name] for name in names)


def split_rows(leaf: jax.Array, axis: int, parts: int) -> jax.Array:
    """Reshape the row axis of an array, of size B, to two axes `[parts, B / parts]`.

    Explicit mesh axes that shard the rows shard the axis of the parts in the result.

    Args:
        leaf: Array with a row axis.
        axis: Index of the row axis.
        parts: Number of parts, the number of shards of the rows (`row_shards`).
    """
    shape = (*leaf.shape[:axis], parts, leaf.shape[axis] // parts, *leaf.shape[axis + 1 :])
    here = jax.typeof(leaf).sharding
    if not any(here.spec):
        return leaf.reshape(shape)
    spec = PartitionSpec(*here.spec[: axis + 1], None, *here.spec[axis + 1 :])
    return jax.lax.reshape(leaf, shape, out_sharding=NamedSharding(here.mesh, spec))


def join_rows(parts: jax.Array, axis: int) -> jax.Array:
    """Invert `split_rows`: merge the axes `axis` and `axis + 1` into one row axis."""
    rows = parts.shape[axis] * parts.shape[axis + 1]
    shape = (*parts.shape[:axis], rows, *parts.shape[axis + 2 :])
    here = jax.typeof(parts).sharding
    if not any(here.spec):
        return parts.reshape(shape)
    spec = PartitionSpec(*here.spec[: axis + 1], *here.spec[axis + 2 :])
    return jax.lax.reshape(parts, shape, out_sharding=NamedSharding(here.mesh, spec))

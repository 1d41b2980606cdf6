"""Functions of single positions, such as losses, applied to rows one chunk after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.custom_derivatives import SymbolicZero

from memgen.placement import AnyArray

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

CHUNK = 128


def by_chunk(
    function: Callable[..., Any],
    values: Sequence[AnyArray],
    targets: Int[AnyArray, "B L"],
    mask: Bool[AnyArray, "B L"],
    chunk: int = CHUNK,
) -> Any:
    """Apply a function of single positions to rows, one chunk of positions after the other.

    Device memory holds the intermediate values of a single chunk. If `values` alone are
    differentiated, each result is computed once, together with its derivative with respect to the
    values of its position. These derivatives are stored in the values' dtype; for hidden states
    they are `[B, L, D]` for each result. If arrays that `function` closes over are differentiated
    too, the backward pass computes the results of each chunk again.

    Args:
        function: Function from arrays `[B, C, ...]` and `[B, C]`, the values and the targets of `C`
            positions, to a pytree of float32 arrays `[B, C]`. Each result depends only on the
            values and the target of its own position.
        values: Arrays `[B, L, ...]`, such as hidden states.
        targets: Ids of the target tokens, placed on devices as the values are.
        mask: Mask that is True for the positions to compute. The results at other positions are 0.
            A chunk that is masked out in all rows is skipped.
        chunk: Maximum number of positions of a chunk; at most `4096 / B` positions are used.

    Returns:
        Pytree of arrays `[B, L]`, the concatenated results of all chunks.
    """
    batch, length = jnp.shape(mask)
    chunk = max(1, min(chunk, length, CHUNK * 32 // max(batch, 1)))
    parts = max(-(-length // chunk), 1)
    padding = ((0, 0), (0, parts * chunk - length))

    def in_parts(values: AnyArray) -> jax.Array:
        values = jnp.pad(values, padding + ((0, 0),) * (values.ndim - 2))
        return values.reshape(batch, parts, chunk, *values.shape[2:]).swapaxes(0, 1)

    targets = jnp.asarray(targets)
    masks = in_parts(mask & (targets == targets))  # placed as the targets are
    chunks = [in_parts(jnp.asarray(value)) for value in (*values, targets)]
    first = [value[0] for value in chunks]
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*first)
    structure = jax.tree.structure(shapes)
    # Integers that the function closes over too: their trace may have ended before the rule below.
    found = _results(traced.jaxpr, structure.num_leaves, traced.consts, masks, chunks)
    joined = [result.swapaxes(0, 1).reshape(batch, parts * chunk)[:, :length] for result in found]
    return jax.tree.unflatten(structure, joined)


def _recomputed(function, count, closed_over, masks, chunks):
    """Compute the list of `count` results; the backward pass computes those of a chunk again."""

    def step(_, part):
        mask, values = part
        results = lambda mask, values: _masked(function, closed_over, mask, values)  # noqa: E731
        zeros = lambda mask, _: [jnp.zeros_like(mask, jnp.float32)] * count  # noqa: E731
        return None, jax.lax.cond(mask.any(), results, zeros, mask, values)

    return jax.lax.scan(jax.checkpoint(step), None, (masks, chunks))[1]


_results: Any = jax.custom_jvp(_recomputed, nondiff_argnums=(0, 1))


@functools.partial(_results.defjvp, symbolic_zeros=True)
def _derivative(function, count, primals, tangents):
    """Compute results and tangents; no slope depends on a tangent, so a forward pass stores it."""
    if any(map(_moves, tangents[0])):
        return _derivative_again(function, count, primals, tangents)
    closed_over, masks, chunks = primals
    moving = [index for index, tangent in enumerate(tangents[2]) if _moves(tangent)]

    def step(_, part):
        def results(mask, values):
            def of_moved(*moved):
                given = dict(enumerate(values)) | dict(zip(moving, moved, strict=True))
                return _masked(function, closed_over, mask, list(given.values()))

            found, pull = jax.vjp(of_moved, *[values[index] for index in moving])
            nothing = [jnp.zeros_like(mask, jnp.float32)] * count
            one = jnp.ones_like(mask, jnp.float32)
            return found, [pull([*nothing[:n], one, *nothing[n + 1 :]]) for n in range(count)]

        def zeros(mask, values):
            slopes = tuple(jnp.zeros_like(values[index]) for index in moving)
            return [jnp.zeros_like(mask, jnp.float32)] * count, [slopes] * count

        mask, values = part
        return None, jax.lax.cond(mask.any(), results, zeros, mask, values)

    _, (found, slopes) = jax.lax.scan(step, None, (masks, chunks))
    changes = [tangents[2][index] for index in moving]
    return found, [sum(map(_change, of_result, changes)) for of_result in slopes]


def _derivative_again(function, count, primals, tangents):
    leaves, structure = jax.tree.flatten(primals)
    tangents = jax.tree.leaves(tangents)

    def results(*moved):
        following = iter(moved)
        pairs = zip(leaves, tangents, strict=True)
        filled = [next(following) if _moves(tangent) else leaf for leaf, tangent in pairs]
        return _recomputed(function, count, *jax.tree.unflatten(structure, filled))

    moved = [leaf for leaf, tangent in zip(leaves, tangents, strict=True) if _moves(tangent)]
    return jax.jvp(results, moved, list(filter(_moves, tangents)))


def _moves(tangent):
    return type(tangent) is not SymbolicZero


def _masked(function, closed_over, mask, values):
    found = eval_jaxpr(function, closed_over, *values)
    return [jnp.where(mask, result, 0.0) for result in found]


def _change(slope, tangent):
    """Sum the products `[P, B, C]` float32 of slopes and tangents `[P, B, C, ...]`."""
    product = slope.astype(jnp.float32) * tangent.astype(jnp.float32)
    return product.sum(axis=tuple(range(3, product.ndim)))

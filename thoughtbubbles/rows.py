"""Rows of tokens: split into inputs and targets, align padding, unpack packed sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from thoughtbubbles.placement import AnyArray, broadcast_beside
from thoughtbubbles.streams import check_integer_type

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Int, Shaped


def next_tokens(rows: Int[AnyArray, "B T+1"]) -> tuple[Int[AnyArray, "B T"], Int[AnyArray, "B T"]]:
    """Split rows of token ids, padded on the right with -1, into inputs and targets.

    Args:
        rows: Token ids `[B, T + 1]`, integers.

    Returns:
        Inputs `[B, T]`, all ids of each row but the last; and targets `[B, T]`, all ids but the
        first.

    Raises:
        ValueError: The rows are not integers `[B, T + 1]` with at least two ids, or have padding in
            front of a token. Padding is not checked in rows that are traced by `jit` or not fully
            addressable; see `padded_in_front`.
    """
    _check_rows(rows=rows)
    check_integer_type("rows", rows.dtype)
    if rows.ndim > 2 or rows.shape[1] < 2:
        raise ValueError(f"rows of shape {rows.shape}: give [batch, tokens + 1], with a next token")
    if not isinstance(rows, Tracer) and getattr(rows, "is_fully_addressable", True):
        known = np.asarray(rows)  # NumPy, since jit would trace operations on a closed-over array
        wrong = padded_in_front(known[:, :-1], known[:, 1:])
        if wrong.any():
            raise ValueError(
                f"row {int(wrong.argmax())} has padding (-1) in front of a token: pad on the right"
            )
    return rows[:, :-1], rows[:, 1:]


def padded_in_front(inputs: AnyArray, targets: AnyArray) -> Any:
    """Return whether each row has padding (-1) in front of a token, `[B]` bool.

    The loss of such a row is NaN.

    Args:
        inputs: Input token ids `[B, T]`, as `next_tokens` returns them.
        targets: Target token ids `[B, T]`, as `next_tokens` returns them.
    """
    return ((inputs < 0) & (targets >= 0)).any(axis=1)


def nats_of(log_prob: Array, inputs: AnyArray, targets: AnyArray) -> Array:
    """Compute the loss of each target, `[B, T]` float32 nats: 0 for padding.

    The loss is NaN in a row with padding in front of a token.

    Args:
        log_prob: Log-probabilities of the targets, `[B, T]` float32.
        inputs: Input token ids `[B, T]`, as `next_tokens` returns them.
        targets: Target token ids `[B, T]`, as `next_tokens` returns them.
    """
    wrong = padded_in_front(inputs, targets)[:, None]
    return -jnp.where((targets >= 0) & ~wrong, log_prob, jnp.where(wrong, jnp.nan, 0))


def real_ids(tokens: Any, length: Any) -> Any:
    """Replace padding by id 0, because attention would spread the NaN of an unknown id.

    Args:
        tokens: Token ids `[B, T]`, padded on the right.
        length: Number of real tokens in each row, `[B]` or a scalar; None means no padding. A
            length of another shape, which is refused later, changes nothing.
    """
    if length is None or np.shape(length) not in ((), np.shape(tokens)[:1]):
        return tokens
    tokens = jnp.asarray(tokens)
    place = broadcast_beside(jnp.arange(tokens.shape[1]), tokens, 2)
    return jnp.where(place < broadcast_beside(length, tokens, 1)[:, None], tokens, 0)


def left_align(
    tokens: Shaped[AnyArray, "B T *rest"], mask: Bool[AnyArray, "B T"]
) -> tuple[Shaped[Array, "B T *rest"], Int[Array, " B"], Int[Array, "B T"]]:
    """Move the real tokens of each row to its start, in order.

    Args:
        tokens: Token ids `[B, T]` or vectors `[B, T, ...]`, with padding anywhere.
        mask: Whether each token is real, `[B, T]` bool or integers.

    Returns:
        Aligned tokens `[B, T, ...]`, with padding on the right; number of real tokens in each row,
        `[B]` int32; and `rank [B, T]` integers, the new index of each real token.

    Raises:
        ValueError: The mask does not have one bool or integer for each token.
    """
    mask = _real(mask, tokens)
    order = jnp.argsort(~mask, axis=1, stable=True)
    length = mask.sum(axis=1, dtype=jnp.int32)
    rank = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    order = order.reshape(order.shape + (1,) * (tokens.ndim - 2))
    return jnp.take_along_axis(tokens, order, axis=1), length, rank


def restore_alignment(
    values: Shaped[Array, "B T *rest"],
    mask: Bool[AnyArray, "B T"],
    rank: Int[Array, "B T"],
) -> Shaped[Array, "B T *rest"]:
    """Move values of aligned tokens back to the tokens' original positions; padding becomes 0.

    Args:
        values: Values of the tokens that `left_align` returned, `[B, T, ...]`.
        mask: Argument `mask` of `left_align`, `[B, T]`.
        rank: New index of each token, as `left_align` returned it, `[B, T]` integers.

    Raises:
        ValueError: The mask or `rank` does not have one entry for each token, or has a wrong dtype.
    """
    mask = _real(mask, values)
    if not hasattr(rank, "shape") or rank.shape != mask.shape:
        raise ValueError(
            f"a rank of shape {jnp.shape(rank)} for a mask of shape {mask.shape}: give what "
            "left_align returned for this mask"
        )
    check_integer_type("rank", rank.dtype)
    mask = mask.reshape(mask.shape + (1,) * (values.ndim - 2))
    rank = rank.reshape(rank.shape + (1,) * (values.ndim - 2))
    return jnp.where(mask, jnp.take_along_axis(values, rank, axis=1), 0)


def split_segments(
    tokens: Shaped[AnyArray, "B T *rest"],
    segment_ids: Int[AnyArray, "B T"],
    num_segments: int,
) -> tuple[Shaped[Array, "B*N T *rest"], Int[Array, " B*N"]]:
    """Split packed rows into rows of one text each, because a fork policy has a budget per row.

    `join_segments` undoes the split for values of tokens.

    Args:
        tokens: Token ids `[B, T]` or vectors `[B, T, ...]`, with several texts packed in a row.
        segment_ids: Index of each token's text in its row, from 1, or 0 for padding; `[B, T]`
            integers.
        num_segments: Static maximum number `N` of texts in a row.

    Returns:
        Tokens `[B * N, T, ...]`, with text `n` of row `b` at the start of row `b * N + n - 1`; and
        number of tokens of each new row, `[B * N]` int32.

    Raises:
        ValueError: `N` is below 1, there is not one integer id for each token, or an id is not from
            0 to `N`. Ids are not checked under `jit`; `join_segments` then gives NaN for wrong ids.
    """
    _check_rows(tokens=tokens, segment_ids=segment_ids)
    if not hasattr(num_segments, "__index__"):
        raise ValueError(f"num_segments={num_segments!r}: give a whole number")
    if num_segments < 1:
        raise ValueError(f"num_segments={num_segments} is below 1: give the largest segment id")
    if segment_ids.shape != tokens.shape[:2]:
        raise ValueError(
            f"segment ids of shape {segment_ids.shape} for tokens of shape {tokens.shape}: give "
            "one id for each token"
        )
    check_integer_type("segment ids", segment_ids.dtype)
    if not isinstance(segment_ids, Tracer):
        ids = np.asarray(segment_ids)
        if ids.max(initial=0) > num_segments or ids.min(initial=0) < 0:
            raise ValueError(
                f"segment ids from {ids.min()} to {ids.max()} with num_segments={num_segments}: "
                "choose the largest id, and 0 for padding"
            )
    mask = _segments(segment_ids, num_segments)
    aligned, length, _ = left_align(jnp.repeat(tokens, num_segments, axis=0), mask)
    return aligned, length


def join_segments(
    values: Shaped[Array, "B*N T *rest"], segment_ids: Int[AnyArray, "B T"]
) -> Shaped[Array, "B T *rest"]:
    """Pack values of the rows of `split_segments` into the original rows; padding becomes 0.

    Args:
        values: Float values of the split tokens, `[B * N, T, ...]`.
        segment_ids: Argument `segment_ids` of `split_segments`, `[B, T]` integers.

    Returns:
        Values `[B, T, ...]`, one for each token of the packed rows.

    Raises:
        ValueError: The number of rows of `values` is not a multiple of that of `segment_ids`, or
            the rows of both have different lengths.
    """
    _check_rows(values=values, segment_ids=segment_ids)
    if values.shape[0] % segment_ids.shape[0] or values.shape[1] != segment_ids.shape[1]:
        raise ValueError(
            f"values of shape {values.shape} for segment ids of shape {segment_ids.shape}: give "
            "num_segments rows for each row of ids, as split_segments made them"
        )
    check_integer_type("segment ids", segment_ids.dtype)
    batch, num_segments = segment_ids.shape[0], values.shape[0] // segment_ids.shape[0]
    mask = _segments(segment_ids, num_segments)
    rank = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    rows = restore_alignment(values, mask, rank)
    joined = rows.reshape(batch, num_segments, *values.shape[1:]).sum(axis=1, dtype=values.dtype)
    wrong = (segment_ids < 0) | (segment_ids > num_segments)
    return jnp.where(wrong.reshape(wrong.shape + (1,) * (values.ndim - 2)), jnp.nan, joined)


def _segments(segment_ids: AnyArray, num_segments: int) -> jax.Array:
    """Return whether each token belongs to text `n` of row `b`, `[B * N, T]` bool."""
    ids = jnp.asarray(segment_ids)
    mask = ids[:, None] == jnp.arange(1, num_segments + 1, dtype=jnp.int32)[None, :, None]
    return mask.reshape(-1, ids.shape[1])


def _check_rows(**arrays: Any) -> None:
    """Raise a ValueError unless all arguments are arrays `[batch, tokens, ...]`."""
    for name, values in arrays.items():
        if not hasattr(values, "shape"):
            raise ValueError(f"{name} are a {type(values).__name__}: give an array, by jnp.asarray")
        if len(values.shape) < 2:
            raise ValueError(f"{name} of shape {values.shape}: give [batch, tokens, ...]")


def _real(mask: AnyArray, values: jax.Array | np.ndarray) -> jax.Array:
    _check_rows(values=values)
    if not hasattr(mask, "shape"):
        raise ValueError(f"a mask that is a {type(mask).__name__}: give an array, by jnp.asarray")
    if mask.shape != values.shape[:2]:
        raise ValueError(
            f"a mask of shape {mask.shape} for tokens of shape {values.shape}: give one entry "
            "for each token"
        )
    if jnp.issubdtype(mask.dtype, jnp.inexact):
        raise ValueError(f"a mask of type {mask.dtype}: give bool, such as mask > 0")
    return jnp.asarray(mask).astype(bool)

"""Score-attenuated causal attention: a reference path, a fast path, and one over a cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int

# The signature of `attend`, which kernels implement too.
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]
MIN_BLOCK = 64
MAX_BLOCKS = 8
SHORTEST_SPAN = 256


def attend(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    bias: Float[Array, "B S"] | None = None,
) -> Float[Array, "B S H K"]:
    """Causal attention over slots with a bias per key (arXiv 2510.00219, eq. 8).

    Queries are processed in blocks, each against the keys up to its end only, so that about half of
    the square above the diagonal is never computed and no array `[B, H, S, S]` is held.

    Args:
        query: Rotated queries of `H` heads.
        key: Rotated keys of `G` heads, where `G` divides `H` (grouped-query attention).
        value: Values, scaled by the streams' scores if the config scales values.
        bias: Float32 bias of each key, added to the logits after their division by sqrt(K).
    """
    slots = query.shape[1]
    block = block_size(slots)
    query, key, value = _heads_first(query, key, value)
    parts = []
    for start in range(0, slots, block):
        end = min(start + block, slots)
        seen = None if bias is None else bias[:, :end]
        keys, values = key[:, :, :end], value[:, :, :end]
        parts.append(_attend(query[:, :, :, start:end], keys, values, seen, jnp.arange(start, end)))
    return _slots_first(jnp.concatenate(parts, axis=3))


def attend_reference(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    bias: Float[Array, "B S"] | None = None,
) -> Float[Array, "B S H K"]:
    """`attend` without blocks: all queries against all keys at once."""
    last = jnp.arange(query.shape[1])
    return _slots_first(_attend(*_heads_first(query, key, value), bias, last))


def attend_where(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    visible: Bool[Array, "B S S"],
) -> Float[Array, "B S H K"]:
    """Attention under any mask, such as that of packed texts or of branches.

    Args:
        query: Rotated queries.
        key: Rotated keys.
        value: Values.
        visible: Whether a query (axis 1) attends to a key (axis 2); the result of a query without
            any key is arbitrary but finite.
    """
    return jax.nn.dot_product_attention(query, key, value, mask=visible[:, None])


def attend_cached(
    query: Float[Array, "B Q H K"],
    key: Float[Array, "B G N K"],
    value: Float[Array, "B G N K"],
    bias: Float[Array, "B N"] | None,
    first: Int[Array, " B"],
) -> Float[Array, "B Q H K"]:
    """Attention of new slots over a cache that already holds their own keys and values.

    Only a part of the cache is used: the shortest of a few static spans (`SHORTEST_SPAN` slots,
    doubled up to `N`) that covers the used slots of every row.

    Args:
        query: Rotated queries of the new slots.
        key: Keys of the cache, heads first, so that no step has to transpose the cache.
        value: Values of the cache, heads first.
        bias: Float32 bias of each key, added to the logits, or None.
        first: Cache slot of each row's query 0; query `q` attends to slots up to `first + q`.
    """
    queries, slots = query.shape[1], key.shape[2]
    query = _grouped(query, key.shape[1])
    last = first[:, None] + jnp.arange(queries)[None]

    def over(span: int):
        seen = None if bias is None else bias[:, :span]
        return lambda: _attend(query, key[:, :, :span], value[:, :, :span], seen, last, few=True)

    spans = cache_spans(slots)
    if len(spans) == 1:
        return _slots_first(over(slots)())
    branch = jnp.searchsorted(jnp.array(spans[:-1]), first.max() + queries)
    return _slots_first(jax.lax.switch(branch, [over(span) for span in spans]))


def cache_spans(slots: int) -> list[int]:
    """Numbers of slots that `attend_cached` chooses from; the last is that of the whole cache."""
    spans = [SHORTEST_SPAN]
    while spans[-1] < slots:
        spans.append(2 * spans[-1])
    return [*spans[:-1], slots]


def block_size(slots: int) -> int:
    """Number of queries of a block: at least `MIN_BLOCK`, in at most `MAX_BLOCKS` blocks."""
    return max(MIN_BLOCK, math.ceil(slots / MAX_BLOCKS))


def visited_pairs(slots: int) -> int:
    """Number of query-key pairs that `attend` computes for a row of `slots`, to count FLOPs."""
    block = block_size(slots)
    ends = [min(start + block, slots) for start in range(0, slots, block)]
    return sum((end - start) * end for start, end in zip(range(0, slots, block), ends, strict=True))


def _heads_first(query, key, value):
    """Query `[B, G, H/G, S, K]`, already divided by sqrt(K); key and value `[B, G, S, K]`."""
    return _grouped(query, key.shape[2]), key.swapaxes(1, 2), value.swapaxes(1, 2)


def _grouped(query, groups):
    batch, slots, heads, width = query.shape
    query = (query * width**-0.5).reshape(batch, slots, groups, heads // groups, width)
    return query.transpose(0, 2, 3, 1, 4)


def _slots_first(mixed):
    batch, groups, repeats, slots, width = mixed.shape
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, slots, groups * repeats, width)


def _attend(query, key, value, bias, last, few=False):
    """Attention with heads first; each query attends to keys up to slot `last`, `[Q]` or `[B, Q]`.

    `few` says that there are few queries for the keys; only speed depends on it.
    """
    if few:
        # Keys first: with the query first, XLA transposes all of a cache's keys on a CPU.
        logits = jnp.einsum("bgsk,bgrqk->bgsrq", key, query, preferred_element_type=jnp.float32)
        logits = jnp.moveaxis(logits, 2, -1)
    else:
        logits = jnp.einsum("bgrqk,bgsk->bgrqs", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias[:, None, None, None, :]
    sees = jnp.arange(key.shape[2])[None, None, None, None] <= last.reshape(
        -1, 1, 1, last.shape[-1], 1
    )
    logits = jnp.where(sees, logits, -jnp.inf)
    # The peak is taken out of the gradient and the sum divided out after the product with the
    # values: two passes over [q, s] less than jax.nn.softmax.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    mixed = jnp.einsum(
        "bgrqs,bgsk->bgrqk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return (mixed / weights.sum(axis=-1)[..., None]).astype(value.dtype)

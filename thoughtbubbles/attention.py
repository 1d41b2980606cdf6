"""Score-attenuated causal attention: a reference path, a fast path, and one over a cache."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

# What `attend` does, however: query, key, value and bias (or None) to `[B, S, H, K]`.
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]
MIN_BLOCK = 64
MAX_BLOCKS = 8
SHORTEST_SPAN = 256


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """Causal attention over slots with a bias per key (arXiv 2510.00219, eq. 8).

    Queries go in blocks, each against the keys up to its end only, so that about half of the
    square above the diagonal is never computed and no `[B, H, S, S]` array is held.

    Args:
        query: `[B, S, H, K]`.
        key: `[B, S, G, K]`, `G` dividing `H` (grouped-query attention).
        value: `[B, S, G, K]`, already scaled by the streams' scores where that is wanted.
        bias: `[B, S]` float32 added to the logits of each key after their division by sqrt(K).

    Returns:
        `[B, S, H, K]`.
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
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """The same as `attend`, all keys at once."""
    last = jnp.arange(query.shape[1])
    return _slots_first(_attend(*_heads_first(query, key, value), bias, last))


def attend_where(
    query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array
) -> jax.Array:
    """Attention in any pattern: `visible [B, S, S]` bool says which keys each query sees.

    Packed texts and branches are read so; a query that sees nothing gets some finite numbers.
    """
    return jax.nn.dot_product_attention(query, key, value, mask=visible[:, None])


def attend_cached(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    first: jax.Array,
) -> jax.Array:
    """Attention of new slots over a cache that holds their own keys and values already.

    Only a part of the cache is read: the shortest of a few static spans (`SHORTEST_SPAN` slots,
    doubled up to `N`) that reaches as far as any row does.

    Args:
        query: `[B, Q, H, K]`.
        key, value: `[B, G, N, K]`, heads first, so that no step has to transpose a cache.
        bias: `[B, N]` float32 added to the logits of each key, or None.
        first: `[B]` int32, each row's cache slot of its query 0; query `q` sees the cache up to
            slot `first + q`.

    Returns:
        `[B, Q, H, K]`.
    """
    queries, slots = query.shape[1], key.shape[2]
    query = _grouped(query, key.shape[1])
    last = first[:, None] + jnp.arange(queries)

    def over(span: int):
        seen = None if bias is None else bias[:, :span]
        return lambda: _attend(query, key[:, :, :span], value[:, :, :span], seen, last, few=True)

    spans = cache_spans(slots)
    if len(spans) == 1:
        return _slots_first(over(slots)())
    branch = jnp.searchsorted(jnp.array(spans[:-1]), first.max() + queries)
    return _slots_first(jax.lax.switch(branch, [over(span) for span in spans]))


def cache_spans(slots: int) -> list[int]:
    """Static numbers of slots of a cache that `attend_cached` chooses from, the last being all."""
    spans = [SHORTEST_SPAN]
    while spans[-1] < slots:
        spans.append(2 * spans[-1])
    return [*spans[:-1], slots]


def block_size(slots: int) -> int:
    """Queries per block: at least `MIN_BLOCK`, and at most `MAX_BLOCKS` blocks to compile."""
    return max(MIN_BLOCK, math.ceil(slots / MAX_BLOCKS))


def visited_pairs(slots: int) -> int:
    """Query-key pairs that `attend` computes for a row of `slots`, for FLOP counts."""
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
    """Heads first; each query sees the keys up to slot `last`, `[Q]` or `[B, Q]`.

    `few`: static, whether there are few queries for the keys; only speed depends on it.
    """
    if few:
        # Keys first: with the query first, XLA transposes all of a cache's keys on a CPU.
        logits = jnp.einsum("bgsk,bgrqk->bgsrq", key, query, preferred_element_type=jnp.float32)
        logits = jnp.moveaxis(logits, 2, -1)
    else:
        logits = jnp.einsum("bgrqk,bgsk->bgrqs", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias[:, None, None, None, :]
    sees = jnp.arange(key.shape[2]) <= last.reshape(-1, 1, 1, last.shape[-1], 1)
    logits = jnp.where(sees, logits, -jnp.inf)
    # The peak is taken out of the gradient and the sum divided out after the product with the
    # values: two passes over [q, s] less than jax.nn.softmax.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    mixed = jnp.einsum(
        "bgrqs,bgsk->bgrqk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return (mixed / weights.sum(axis=-1)[..., None]).astype(value.dtype)

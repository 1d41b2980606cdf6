"""Score-attenuated causal attention: a reference path and a fast path behind one function."""

import math

import jax
import jax.numpy as jnp

MIN_BLOCK = 64
MAX_BLOCKS = 8


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
    parts = []
    for start in range(0, slots, block):
        end = min(start + block, slots)
        seen = None if bias is None else bias[:, :end]
        parts.append(_attend(query[:, start:end], key[:, :end], value[:, :end], seen))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def attend_reference(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """The same as `attend`, all keys at once."""
    return _attend(query, key, value, bias)


def block_size(slots: int) -> int:
    """Queries per block: at least `MIN_BLOCK`, and at most `MAX_BLOCKS` blocks to compile."""
    return max(MIN_BLOCK, math.ceil(slots / MAX_BLOCKS))


def visited_pairs(slots: int) -> int:
    """Query-key pairs that `attend` computes for a row of `slots`, for FLOP counts."""
    block = block_size(slots)
    ends = [min(start + block, slots) for start in range(0, slots, block)]
    return sum((end - start) * end for start, end in zip(range(0, slots, block), ends, strict=True))


def _attend(query, key, value, bias):
    """Queries are the last of the keys' slots."""
    batch, queries, heads, width = query.shape
    keys, groups = key.shape[1:3]
    query = query.reshape(batch, queries, groups, heads // groups, width)
    logits = jnp.einsum("bqgrk,bsgk->bgrqs", query, key, preferred_element_type=jnp.float32)
    logits = logits * width**-0.5
    if bias is not None:
        logits = logits + bias[:, None, None, None, :]
    slot = jnp.arange(keys)
    logits = jnp.where(slot[keys - queries :, None] >= slot, logits, -jnp.inf)
    # The peak is taken out of the gradient and the sum divided out after the product with the
    # values: two passes over [q, s] less than jax.nn.softmax.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1)
    mixed = jnp.einsum(
        "bgrqs,bsgk->bqgrk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    mixed = mixed / jnp.moveaxis(total, 3, 1)[..., None]
    return mixed.astype(value.dtype).reshape(batch, queries, heads, width)

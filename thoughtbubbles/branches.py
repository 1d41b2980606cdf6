"""Attention in rows that contain a prefix and several continuations of the prefix (branches)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from thoughtbubbles import attention
from thoughtbubbles.attention import attend, heads_first, slots_first
from thoughtbubbles.recompute import once_known

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int

LARGEST_BRANCHES = 2**28
"""Bytes of float32 attention probabilities of branches, over all devices, above which
`attend_branches` processes the queries of the branches in several parts."""


def attend_branches(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    length: Int[Array, " B"],
    branches: tuple[int, int],
) -> Float[Array, "B S H K"]:
    """Compute causal attention in rows of a prefix and several branches that continue the prefix.

    A row consists of the slots of the prefix, then the slots of branch 0, of branch 1 and so on. A
    slot of a branch attends to the real slots of the prefix, which is not copied for each branch,
    and to the slots of the same branch up to itself. If the attention probabilities of all branches
    have more than `attention.LARGEST_PROBABILITIES` bytes, the backward pass recomputes them. If
    they have more than `LARGEST_BRANCHES` bytes, the queries of the branches are processed in
    several parts, each with some slots of every branch.

    Args:
        query: Queries of `H` heads with RoPE applied.
        key: Keys of `G` heads with RoPE applied, where `G` divides `H` (grouped-query attention).
        value: Values of `G` heads.
        length: Number of real slots of each prefix; its later slots are padding, to which no branch
            attends.
        branches: Number `N` of branches in a row, and number `C` of slots of each branch. The
            prefix has the remaining `S - N C` slots.
    """
    batch, slots, heads, _ = query.shape
    count, size = branches
    shared = slots - count * size
    first, own = (heads_first(*(x[:, where] for x in (query, key, value)))
                  for where in (slice(shared), slice(shared, None)))  # fmt: skip
    known = jnp.arange(shared) < length[:, None]
    weights = 4 * batch * heads * count * size * (shared + size)
    run = (
        _known_once(_attend_branches)
        if weights > attention.LARGEST_PROBABILITIES
        else _attend_branches
    )
    mine, own_key, own_value = (x.reshape(*x.shape[:-2], count, size, x.shape[-1]) for x in own)
    over = lambda part, at: run(part, *first[1:], own_key, own_value, known, at)  # noqa: E731
    divisors = (n for n in range(1, size + 1) if size % n == 0)
    parts = next((n for n in divisors if weights <= n * LARGEST_BRANCHES), size)
    if parts == 1:
        mixed = over(mine, 0)
    else:
        cut = mine.reshape(*mine.shape[:-2], parts, size // parts, mine.shape[-1])
        starts = jnp.arange(0, size, size // parts)
        mixed = jax.lax.map(lambda part: over(*part), (jnp.moveaxis(cut, -3, 0), starts))
        mixed = jnp.moveaxis(mixed, 0, -3)
    prefix = attend(query[:, :shared], key[:, :shared], value[:, :shared])
    return jnp.concatenate([prefix, slots_first(mixed.reshape(own[0].shape))], axis=1)


def _attend_branches(query, key, value, own_key, own_value, known, first):
    """Compute attention of slots `first` to `first + Q - 1` of each branch.

    Queries are `[B, G, H/G, N, Q, K]`; keys and values of the prefix are `[B, G, P, K]`, and
    `known [B, P]` marks real prefix slots; keys and values of the branches are `[B, G, N, C, K]`.
    """
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = jnp.where(known[:, None, None, None, None],
                       product("bgrnqk,bgsk->bgrnqs", query, key), -jnp.inf)  # fmt: skip
    last = first + jnp.arange(query.shape[-2])
    causal = jnp.arange(own_key.shape[-2]) <= last[:, None]
    own = jnp.where(causal, product("bgrnqk,bgnsk->bgrnqs", query, own_key), -jnp.inf)
    peak = jnp.maximum(logits.max(axis=-1, keepdims=True),
                       own.max(axis=-1, keepdims=True))  # fmt: skip
    peak = jax.lax.stop_gradient(peak)
    weights, own = jnp.exp(logits - peak), jnp.exp(own - peak)
    mixed = product("bgrnqs,bgsk->bgrnqk", weights.astype(value.dtype), value)
    mixed += product("bgrnqs,bgnsk->bgrnqk", own.astype(value.dtype), own_value)
    total = weights.sum(axis=-1) + own.sum(axis=-1)
    return (mixed / total[..., None]).astype(value.dtype)


def _known_once(run):
    """Wrap a function of queries and other arrays to be recomputed in its backward pass."""

    def backward(arrays, gradient):
        query, *others = arrays
        return jax.vjp(run, once_known(query, gradient), *others)[1](gradient)

    again = jax.custom_vjp(run)
    again.defvjp(lambda *arrays: (run(*arrays), arrays), backward)
    return again

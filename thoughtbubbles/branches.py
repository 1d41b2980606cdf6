"""Attention of rows that share a prefix: several continuations of it, laid out in one row."""

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
"""Bytes of such weights above which `attend_branches` takes some slots of branches at a time."""


def attend_branches(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    length: Int[Array, " B"],
    branches: tuple[int, int],
) -> Float[Array, "B S H K"]:
    """Attention of rows of a prefix and several continuations of it, causal along each of them.

    The first slots of a row are its prefix, and after them come the branches one by one. A branch
    attends to the prefix, which no branch copies, and to itself. Weights of more than
    `attention.LARGEST_WEIGHTS` bytes are not kept for the backward pass; where all have more than
    `LARGEST_BRANCHES` bytes, those of some slots are held at a time.

    Args:
        query: Rotated queries.
        key: Rotated keys.
        value: Values.
        length: Number of real slots of each prefix; the others are seen by no branch.
        branches: Number of branches of a row, and number of slots of each (`N`, `C`).
    """
    batch, slots, heads, _ = query.shape
    count, size = branches
    shared = slots - count * size
    first, own = (heads_first(*(x[:, where] for x in (query, key, value)))
                  for where in (slice(shared), slice(shared, None)))  # fmt: skip
    known = jnp.arange(shared) < length[:, None]
    weights = 4 * batch * heads * count * size * (shared + size)
    run = _known_once(_attend_branches) if weights > attention.LARGEST_WEIGHTS else _attend_branches
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
    """Attention of slots of branches, from `first` on, to the prefix, where `known`, and to theirs.

    Queries `[B, G, H/G, N, Q, K]`; the branches' own keys and values `[B, G, N, C, K]`.
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
    """A function of queries and other arrays whose backward pass computes its results again."""

    def backward(arrays, gradient):
        query, *others = arrays
        return jax.vjp(run, once_known(query, gradient), *others)[1](gradient)

    again = jax.custom_vjp(run)
    again.defvjp(lambda *arrays: (run(*arrays), arrays), backward)
    return again

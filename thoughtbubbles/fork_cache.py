"""State of a fork layer during cached decoding, and the KV-cache slots of new streams.

A decoder with fork layers stores keys and values itself, in blocks of any kind. This module tells
the decoder how many slots its KV caches need, which slots new streams fill, and to which slots the
query of a new stream attends, so that the decoder does not have to call the fork policy.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from thoughtbubbles.checks import check_sizes
from thoughtbubbles.placement import placed_beside
from thoughtbubbles.policies import append
from thoughtbubbles.policy import CausalPolicy, Policy
from thoughtbubbles.short_repr import ShortRepr
from thoughtbubbles.streams import Streams

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Int

Stored = TypeVar("Stored")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class KVSlots(ShortRepr):
    """Slots that new streams fill in KV caches with `N` slots per row.

    All blocks up to the next fork layer use the same slots.

    Attributes:
        used: `[B]` int32, number of slots that earlier streams of the row fill.
        alive: `[B, S]` bool, whether each new stream is alive and fills a slot. Live streams come
            first and fill the next slots in order.
        capacity: Static number `N` of slots per row.
    """

    used: jax.Array
    alive: jax.Array
    capacity: int = dataclasses.field(metadata={"static": True})

    def index(self) -> Int[Array, "B S"]:
        """Return the slot of each new stream, or `N` (past the last slot) for a dead stream."""
        return jnp.where(self.alive, self._slot(), self.capacity)

    def visible(self) -> Bool[Array, "B S N"]:
        """Return the causal mask: whether a new stream's query attends to the key in each slot."""
        return jnp.arange(self.capacity)[None, None] <= self._slot()[..., None]

    def _slot(self) -> Int[Array, "B S"]:
        return self.used[:, None] + jnp.arange(self.alive.shape[1], dtype=jnp.int32)[None]

    def write(self, stored: Stored, new: Stored) -> Stored:
        """Return caches with the entries of new streams written into the streams' slots.

        Args:
            stored: Caches, a pytree of arrays `[B, N, ...]`, such as a block's keys and values and
                the attention bias of each key (`Streams.attention_bias`). With
                `AxisType.Explicit` mesh axes, the batch axis of the result is sharded as in `new`.
            new: Entries of the new streams, a pytree of the same structure with arrays
                `[B, S, ...]`.

        Raises:
            ValueError: The pytrees differ in structure or in the last axes of an array, a cache is
                not `[B, N, ...]`, or an entry is not `[B, S, ...]`.
        """

        def write(stored: Any, new: Any) -> jax.Array:
            for name, value in (("a cache", stored), ("an entry", new)):
                if not hasattr(value, "shape"):
                    raise ValueError(
                        f"{name} that is a {type(value).__name__}: give arrays [batch, slots, ...]"
                    )
            if stored.shape[:2] != (self.alive.shape[0], self.capacity):
                raise ValueError(
                    f"a cache of shape {stored.shape} for {self.alive.shape[0]} rows of "
                    f"{self.capacity} slots: allocate [batch, slots, ...], with the `slots` of the "
                    "ForkCache behind a fork layer and max_tokens in front of the first"
                )
            if new.shape[:2] != self.alive.shape:
                raise ValueError(
                    f"entries of shape {new.shape} for new streams {self.alive.shape}: give "
                    "[batch, streams, ...] of the same call"
                )
            if new.shape[2:] != stored.shape[2:]:
                raise ValueError(
                    f"entries of shape {new.shape} for a cache of shape {stored.shape}: give "
                    "both the same axes behind the second"
                )
            return append(placed_beside(stored, new), new, self.used, self.alive)

        given, there = jax.tree.structure(new), jax.tree.structure(stored)
        if given != there:
            raise ValueError(f"entries {given} for caches {there}: give one for each cache")
        return jax.tree.map(write, stored, new)


def token_slots(streams: Streams, max_tokens: int) -> KVSlots:
    """Return the slots of new streams in the KV caches of the blocks before the first fork layer.

    Args:
        streams: Streams of the next tokens (`Streams.start` with `first`).
        max_tokens: Maximum number of tokens in a row.

    Raises:
        ValueError: The streams are not `Streams` or have passed a fork layer, or (outside of `jit`)
            a row would have more than `max_tokens` tokens.
    """
    check_sizes(max_tokens=max_tokens)
    if not isinstance(streams, Streams):
        shape = getattr(streams, "shape", type(streams).__name__)
        raise ValueError(f"token_slots takes Streams, not {shape}: Streams.start(x)")
    if streams.forked:
        raise ValueError(
            f"token_slots of {streams.token.shape} streams behind a fork layer: take the slots "
            "that Fork.extend returns"
        )
    if not isinstance(streams.alive, Tracer):
        longest = int((np.asarray(streams.first) + np.asarray(streams.length)).max(initial=0))
        if longest > max_tokens:
            raise ValueError(
                f"a row of {longest} tokens does not fit into max_tokens={max_tokens}: make larger "
                "caches"
            )
    copies = streams.token.shape[1] // streams.num_tokens
    return KVSlots(streams.first * copies, streams.alive, max_tokens * copies)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ForkCache(ShortRepr):
    """State of a fork layer after the tokens so far (`Fork.init_cache`, `Fork.extend`).

    Axis 0 of every array is the batch.

    Attributes:
        state: State of the fork policy, a pytree of arrays (`CausalPolicy.init_state`).
        length: `[B]` int32, number of tokens so far; above `max_tokens` for a row that an invalid
            call of `extend` under `jit` has marked, whose residuals are NaN in all later calls.
        used: `[B]` int32, number of live streams so far after the fork layer.
        max_tokens: Maximum number of tokens in a row (static).
        policies: Policies of all fork layers up to and including this one, in order (static).
    """

    state: Any
    length: jax.Array
    used: jax.Array
    max_tokens: int = dataclasses.field(metadata={"static": True})
    policies: tuple[Policy, ...] = dataclasses.field(metadata={"static": True})

    @property
    def slots(self) -> int:
        """Number of slots per row in the KV caches of the blocks after the fork layer."""
        return _slots(self.policies, self.max_tokens, self.max_tokens)


def init_fork_cache(
    policy: Policy, batch: int, max_tokens: int, before: ForkCache | None = None
) -> ForkCache:
    """Return the state of a fork layer before the first token.

    Args:
        policy: Policy of the fork layer, which must be causal.
        batch: Number of rows.
        max_tokens: Maximum number of tokens in a row.
        before: State of the previous fork layer; None for the first fork layer.

    Raises:
        ValueError: The policy is not causal or lacks the cache methods of `CausalPolicy`, a size is
            below 1, or `before` has another `batch` or `max_tokens`.
    """
    causal = _causal(policy)
    check_sizes(batch=batch, max_tokens=max_tokens)
    if before is not None and not isinstance(before, ForkCache):
        raise ValueError(
            f"before is a {type(before).__name__}: give the ForkCache of the fork layer in front, "
            "or leave it out"
        )
    if before is not None and (before.length.shape[0], before.max_tokens) != (batch, max_tokens):
        raise ValueError(
            f"batch={batch}, max_tokens={max_tokens} behind a fork layer of "
            f"batch={before.length.shape[0]}, max_tokens={before.max_tokens}: give both the same"
        )
    earlier = () if before is None else before.policies
    state = causal.init_state(batch, 2 * _slots(earlier, max_tokens, max_tokens))
    # Two arrays of zeros, because an array that occurs twice could not be donated.
    length, used = (jnp.zeros((batch,), jnp.int32) for _ in range(2))
    return ForkCache(state, length, used, max_tokens, (*earlier, policy))


def _causal(policy: Policy) -> CausalPolicy:
    if not policy.causal:
        raise ValueError(
            f"{policy} can't be cached, its choice looks at the whole row: use PrefixRank(...) or "
            "Threshold(...)"
        )
    if not isinstance(policy, CausalPolicy):
        raise ValueError(
            f"{policy} is causal but has no init_state() and keep_next(): add both for a cache"
        )
    return policy


def _slots(policies: tuple[Policy, ...], num_tokens: int, max_tokens: int) -> int:
    """Return the static number of slots for `num_tokens` tokens after these policies' forks."""
    slots = num_tokens
    for policy in policies:
        slots = min(2 * slots, policy.capacity(max_tokens))
    return slots


def check_next(policy: Policy, streams: Streams, cache: ForkCache, fresh: bool) -> None:
    """Raise a ValueError unless streams continue a cache's rows; skip traced lengths."""
    if not isinstance(cache, ForkCache):
        raise ValueError(
            f"extend from a {type(cache).__name__}: give the ForkCache of "
            "fork.init_cache(batch, max_tokens), or that of the last extend"
        )
    if cache.policies[-1] != policy:
        raise ValueError(
            f"this cache was made for {cache.policies[-1]}, the fork layer has {policy}: begin "
            "with a new one (fork.init_cache)"
        )
    if streams.token.shape[0] != cache.length.shape[0]:
        raise ValueError(
            f"streams of {streams.token.shape[0]} rows for a cache of {cache.length.shape[0]}: "
            "give one row each"
        )
    if not (streams.continued or fresh):
        raise ValueError(
            "streams that begin at token 0 (first=None) in a call with a cache: "
            "Streams.start(x, length, first=cache.length)"
        )
    bound = min(streams.num_tokens, cache.max_tokens) if fresh else cache.max_tokens
    earlier = cache.policies[:-1]
    expected = _slots(earlier, streams.num_tokens, bound)
    if streams.forked != bool(earlier) or streams.token.shape[1] != expected:
        raise ValueError(
            f"{streams.token.shape[1]} streams of {streams.num_tokens} tokens for a cache behind "
            f"{len(earlier)} fork layers, which give {expected}: make the cache of a later fork "
            "layer by fork.init_cache(batch, max_tokens, before=cache of the one in front)"
        )
    if any(isinstance(n, Tracer) for n in (streams.first, streams.length, cache.length)):
        return
    first, new, so_far = (np.asarray(n) for n in (streams.first, streams.length, cache.length))
    longest = int((so_far + new).max())
    if longest > cache.max_tokens:
        raise ValueError(
            f"a row would grow to {longest} tokens, the cache has max_tokens={cache.max_tokens}: "
            "make a larger one (fork.init_cache)"
        )
    if (first != so_far).any():
        raise ValueError(
            f"streams that begin at tokens {first.tolist()} for a cache of {so_far.tolist()} "
            "tokens: Streams.start(x, length, first=cache.length), and keep the cache that "
            "extend returns"
        )
    if fresh and so_far.any():
        raise ValueError(f"fresh=True with a cache of {so_far.tolist()} tokens: leave it out")


def wrong_rows(streams: Streams, cache: ForkCache, fresh: bool) -> Bool[Array, " B"]:
    """Check at run time whether each row's streams fail to continue the row of the cache."""
    wrong = (streams.first != cache.length) | (streams.length > streams.num_tokens)
    wrong |= (streams.length < 0) | (cache.length + streams.length > cache.max_tokens)
    return wrong | (cache.length > 0) if fresh else wrong


def advanced(cache: ForkCache, streams: Streams, state: Any) -> tuple[Streams, KVSlots, ForkCache]:
    """Assemble the results of `Fork.advance`.

    Args:
        cache: Cache before the new streams.
        streams: New streams after the fork layer.
        state: State of the fork policy after the new tokens.

    Returns:
        The streams, their slots in the KV caches of the next blocks, and the new cache.
    """
    slots = KVSlots(cache.used, streams.alive, cache.slots)
    length = cache.length + streams.length
    used = cache.used + streams.alive.sum(axis=1, dtype=jnp.int32)
    return streams, slots, dataclasses.replace(cache, state=state, length=length, used=used)


def with_wrong_rows(
    wrong: Bool[Array, " B"], streams: Streams, slots: KVSlots, cache: ForkCache
) -> tuple[Streams, KVSlots, ForkCache]:
    """Set the residuals of wrong rows to NaN, and the rows' lengths to more than `max_tokens`.

    The lengths make later calls treat these rows as wrong too, because the policy state of the rows
    is not valid.
    """
    streams = streams.replace(x=jnp.where(wrong[:, None, None], jnp.nan, streams.x))
    length = jnp.where(wrong, cache.max_tokens + 1, cache.length)
    return streams, slots, dataclasses.replace(cache, length=length)


def at_start(stored: jax.Array, new: jax.Array) -> jax.Array:
    """Overwrite the start of `stored`, along every axis, with the entries of `new` that fit."""
    new = jax.lax.slice(new, (0,) * new.ndim, tuple(map(min, new.shape, stored.shape)))
    return jax.lax.dynamic_update_slice(stored, new.astype(stored.dtype), (0,) * new.ndim)

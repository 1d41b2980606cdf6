"""Latents of the events of training texts, woven in order over a cache.

An event's latents depend on the text before it and on earlier latents. So events are woven one
after the other; but what stands before an event is computed once, and not anew for each event.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memgen.backbone import DecoderBackbone, cache_batch_axes
from memgen.insertion import Plan, stream_source
from memgen.placement import placed_beside
from memgen.weaver import Weaver

SHORTEST_SEGMENT = 32
LEAST_SAVED = 512
"""Number of vectors of a row that segments must save; with fewer, each event has a pass of its own
over the whole row."""
MOST_KEPT = 2**30
"""Number of bytes of caches on a device that segments may keep for the backward pass; with more,
each event has a pass of its own, of which only latents are kept. Under automatic axes, where shards
are unknown, those of all devices count."""


class Schedule(NamedTuple):
    """How rows are read, the same for all rows of a shape.

    Attributes:
        size: Number of vectors of a round, queries included.
        rounds: Largest number of rounds that a row can need.
    """

    size: int
    rounds: int

    @classmethod
    def of(cls, length: int, events: int, slots: int) -> Schedule:
        """The schedule for `length` tokens and `events` of `slots` latents.

        Segments grow with the row, so that the number of rounds, whose caches are kept for the
        backward pass, stays about three times that of events.
        """
        reach = length + (events - 1) * slots
        segment = max(SHORTEST_SEGMENT, -(-reach // (2 * events)))
        # A round without queries reads more than `segment` vectors.
        return cls(segment + slots, events + reach // (segment + 1))

    def saves(self, length: int, events: int, slots: int) -> bool:
        """Whether this is at most half of one pass for each event, and `LEAST_SAVED` fewer."""
        passes, mine = events * (length + events * slots), self.rounds * self.size
        return 2 * mine <= passes and mine + LEAST_SAVED <= passes


def schedule_for(
    weaver: Weaver, decoder: Any, reasoner: Any, sizes: tuple[int, int, int], shards: int = 1
) -> Schedule | None:
    """The schedule of `weave_in_segments`, or None where each event is to have a pass of its own.

    The choice depends on sizes and decoders alone; latents are the same up to rounding.

    Args:
        weaver: Weaver whose events these are.
        decoder: Decoder of the weaver.
        reasoner: Reasoner, whose hidden states are read with `context="hidden"`.
        sizes: Numbers of rows, of tokens of a row, and of events of a row.
        shards: Number of devices that share the rows.
    """
    batch, length, events = sizes
    row = length, events, weaver.config.latents
    if not events or not Schedule.of(*row).saves(*row):
        return None
    decoders = [decoder, reasoner] if weaver.config.context == "hidden" else [decoder]
    # Other caches, such as that of `Uncached`, may compute all that stands before anew.
    if not all(getattr(decoder, "can_forget", False) for decoder in decoders):
        return None
    slots = length + events * weaver.config.latents
    caches = [jax.eval_shape(lambda d=d: d.init_cache(batch, slots)) for d in decoders]
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
    schedule = Schedule.of(*row)
    return schedule if schedule.rounds * kept <= MOST_KEPT * shards else None


def weave_in_segments(
    weaver: Weaver,
    decoder: Any,
    reasoner: DecoderBackbone,
    vectors: jax.Array,
    plan: Plan,
    schedule: Schedule,
) -> jax.Array:
    """Latents `[B, E, K, D]` of all events, zeros for unused ones.

    In each round every row reads the next vectors before its next event; the round that comes to
    the event reads the queries too, and forgets them.

    Args:
        weaver: Weaver whose events these are.
        decoder: Decoder with the weaver's adapter, and with `extend_keeping`.
        reasoner: Reasoner, whose hidden states are read with `context="hidden"`.
        vectors: `[B, L, D]` embedded tokens.
        plan: Events of each row.
        schedule: Size and number of rounds.
    """
    batch, length, dim = vectors.shape
    events, slots = plan.point.shape[1], weaver.config.latents
    source = stream_source(plan, length, slots)
    used = plan.point >= 0
    order = jnp.argsort(~used, axis=1, stable=True)  # used events first
    count = used.sum(axis=1, dtype=jnp.int32)
    at = jnp.arange(schedule.size)
    reads_hidden = weaver.config.context == "hidden"

    def cache_of(decoder: Any) -> Any:
        cache = decoder.init_cache(batch, length + events * slots)
        return placed_beside(cache, vectors, cache_batch_axes(decoder, cache))

    def read(carry: tuple) -> tuple:
        event, done, latents, cache, hidden_cache = carry
        which = _pick(order, jnp.minimum(event, events - 1))
        left = jnp.maximum(_pick(plan.start, which) - done, 0)
        asks = event < count
        last = asks & (left + slots <= schedule.size)
        kept = jnp.where(asks, jnp.minimum(left, schedule.size), 0)
        x = _vectors(vectors, latents, _take(source, done[:, None] + at))
        if reads_hidden:
            x, hidden_cache = reasoner.extend(hidden_cache, x, kept)
        x = weaver.context(x)
        queries = weaver.queries(_pick(plan.kind, which)).astype(x.dtype)
        behind = at - left[:, None]
        x = jnp.where((behind >= 0)[..., None], _take(queries, jnp.maximum(behind, 0)), x)
        hidden, cache = decoder.extend_keeping(cache, x, kept + jnp.where(last, slots, 0), kept)
        new = weaver.memory(_take(hidden, left[:, None] + jnp.arange(slots)))
        here = last[:, None] & (jnp.arange(events) == which[:, None])
        latents = jnp.where(here[..., None, None], new[:, None].astype(latents.dtype), latents)
        return event + last, done + kept, latents, cache, hidden_cache

    def round_of(carry: tuple, _: None) -> tuple[tuple, None]:
        return jax.lax.cond((carry[0] < count).any(), read, lambda carry: carry, carry), None

    zeros = jnp.zeros_like(count)
    latents = placed_beside(jnp.zeros((batch, events, slots, dim), vectors.dtype), vectors)
    carry = zeros, zeros, latents, cache_of(decoder), cache_of(reasoner) if reads_hidden else None
    # The backward pass computes each round again; caches and latents before it are kept.
    carry, _ = jax.lax.scan(jax.checkpoint(round_of), carry, length=schedule.rounds)
    return carry[2]


def _pick(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Entry `index [B]` of each row of `rows [B, N]`."""
    return jnp.take_along_axis(rows, index[:, None], axis=1)[:, 0]


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Entries of `rows [B, N, ...]` at `index [B, C]`, arbitrary ones beyond the end."""
    index = jnp.minimum(index, rows.shape[1] - 1)
    return jnp.take_along_axis(rows, index.reshape(*index.shape, *[1] * (rows.ndim - 2)), axis=1)


def _vectors(vectors: jax.Array, latents: jax.Array, source: jax.Array) -> jax.Array:
    """Vectors of a stream by their indices `[B, C]` of `stream_source`."""
    length, flat = vectors.shape[1], latents.reshape(latents.shape[0], -1, latents.shape[-1])
    of_event = _take(flat, jnp.maximum(source - length, 0))
    return jnp.where((source < length)[..., None], _take(vectors, source), of_event)

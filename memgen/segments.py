"""Weave the events of training texts in order, over a cache.

An event's latents depend on the text before the event and on earlier latents, so events are woven
one after the other. The cache avoids a forward pass over the entire text before each event.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memgen.backbone import DecoderBackbone, cache_batch_axes
from memgen.insertion import Plan, woven_source
from memgen.placement import placed_beside
from memgen.weaver import Weaver

SHORTEST_SEGMENT = 32
LEAST_SAVED = 512
"""Minimum number of vectors per row that segments must save the weaver from processing; otherwise
each event is woven by its own forward pass over the entire row."""
MOST_KEPT = 2**30
"""Maximum number of bytes of caches that segments may keep on a device for the backward pass;
beyond it, each event is woven by its own forward pass, of which only the latents are kept. Under
`AxisType.Auto` mesh axes, where shards are unknown, the bytes of all devices are summed."""


class Schedule(NamedTuple):
    """Number and size of the rounds in which `weave_in_segments` processes the rows of a batch.

    A schedule depends on the batch's shape alone.

    Attributes:
        size: Number of vectors in each row that a round processes, queries included.
        rounds: Maximum number of rounds that a row can need.
    """

    size: int
    rounds: int

    @classmethod
    def of(cls, length: int, events: int, slots: int) -> Schedule:
        """Compute the schedule for rows of `length` tokens and `events` events of `slots` latents.

        A round processes more vectors if rows are longer, so that there are at most about three
        rounds per event: the caches of all rounds are kept for the backward pass.
        """
        reach = length + (events - 1) * slots
        segment = max(SHORTEST_SEGMENT, -(-reach // (2 * events)))
        # A round without queries processes more than `segment` vectors.
        return cls(segment + slots, events + reach // (segment + 1))

    def saves(self, length: int, events: int, slots: int) -> bool:
        """Return whether rounds process far fewer vectors than one forward pass per event does.

        Rounds must save at least half of the vectors, and at least `LEAST_SAVED` vectors per row.
        The arguments are as in `of`.
        """
        passes, mine = events * (length + events * slots), self.rounds * self.size
        return 2 * mine <= passes and mine + LEAST_SAVED <= passes


def schedule_for(
    weaver: Weaver, decoder: Any, reasoner: Any, sizes: tuple[int, int, int], shards: int = 1
) -> Schedule | None:
    """Choose between `weave_in_segments` and one forward pass per event.

    The choice depends on sizes and decoders alone. Both ways give the same latents up to rounding.

    Args:
        weaver: Weaver that writes the latents.
        decoder: The weaver's `DecoderBackbone`.
        reasoner: The reasoner, a `DecoderBackbone`, whose hidden states are the weaver's input with
            `context="hidden"`.
        sizes: Number of rows, number of tokens per row, and number of events per row.
        shards: Number of shards into which the rows are split over devices.

    Returns:
        Schedule for `weave_in_segments`; None for one forward pass per event.
    """
    batch, length, events = sizes
    row = length, events, weaver.config.latents
    if not events or not Schedule.of(*row).saves(*row):
        return None
    decoders = [decoder, reasoner] if weaver.config.context == "hidden" else [decoder]
    # Other caches, such as that of `Uncached`, may recompute all earlier vectors.
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
    """Weave all events of a batch in rounds, over a cache.

    In each round, the decoder processes the next vectors of every row up to the row's next event.
    The round that reaches the event also processes the weaver's queries, which the cache does not
    keep.

    Args:
        weaver: Weaver that writes the latents.
        decoder: The weaver's `DecoderBackbone` with the weaver's adapter; it must have the method
            `extend_keeping`.
        reasoner: Reasoner, whose hidden states are the weaver's input with `context="hidden"`.
        vectors: `[B, L, D]` embeddings of `L` tokens in each row.
        plan: Events of each row.
        schedule: Size and number of rounds.

    Returns:
        Latents `[B, E, K, D]` of all `E` events in `K` slots each; zeros for unused events.
    """
    batch, length, dim = vectors.shape
    events, slots = plan.point.shape[1], weaver.config.latents
    source = woven_source(plan, length, slots)
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
    # The backward pass recomputes each round from the caches and latents before it, which are kept.
    carry, _ = jax.lax.scan(jax.checkpoint(round_of), carry, length=schedule.rounds)
    return carry[2]


def _pick(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Return entry `index [B]` of each row of `rows [B, N]`."""
    return jnp.take_along_axis(rows, index[:, None], axis=1)[:, 0]


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Gather `rows [B, N, ...]` at `index [B, C]`; arbitrary where the index is too large."""
    index = jnp.minimum(index, rows.shape[1] - 1)
    return jnp.take_along_axis(rows, index.reshape(*index.shape, *[1] * (rows.ndim - 2)), axis=1)


def _vectors(vectors: jax.Array, latents: jax.Array, source: jax.Array) -> jax.Array:
    """Gather embedded tokens and latents by their source indices `[B, C]` (`woven_source`)."""
    length, flat = vectors.shape[1], latents.reshape(latents.shape[0], -1, latents.shape[-1])
    of_event = _take(flat, jnp.maximum(source - length, 0))
    return jnp.where((source < length)[..., None], _take(vectors, source), of_event)

"""Sessions: conversations of tokens and latents, one in each row, with the decoders' caches."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from memgen.backbone import cache_batch_axes, check_cache
from memgen.checks import check_woven_length, on_host
from memgen.model import MemGen, check_memgen
from memgen.placement import embed, placed_beside
from memgen.short_repr import ShortRepr

CHUNK = 32  # number of vectors by which one step extends a cache that lags behind


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class DecoderState(ShortRepr):
    """A decoder's cache, which may lag behind: it may not hold the last vectors of a row yet.

    Attributes:
        cache: Pytree from the decoder's `init_cache` or `extend`.
        length: `[B]` int32, number of vectors in each row that the cache holds.
        hidden: `[B, D]`, hidden state at the last vector that the cache holds.
    """

    cache: Any
    length: jax.Array
    hidden: jax.Array

    @classmethod
    def start(cls, decoder: Any, batch: int, capacity: int) -> "DecoderState":
        """Make an empty state of a `DecoderBackbone`, for up to `capacity` vectors in each row."""
        check_cache(decoder)
        hidden = jax.eval_shape(decoder.hidden_states, jnp.zeros((batch, 1, decoder.embed_dim)))
        return cls(
            decoder.init_cache(batch, capacity),
            jnp.zeros((batch,), jnp.int32),
            jnp.zeros((batch, hidden.shape[-1]), hidden.dtype),
        )

    def extend_to(
        self, decoder: Any, fetch: Callable, target: jax.Array, rows: jax.Array
    ) -> "DecoderState":
        """Extend the cache until every row of the mask `rows` has its target number of vectors.

        Other rows may be extended too, up to their targets.

        Args:
            decoder: The `DecoderBackbone` to which the cache belongs.
            fetch: Function from indices `[B, C]` of `C` input vectors in each row to these vectors,
                `[B, C, D]`.
            target: `[B]` int32, number of vectors in each row that the cache should hold.
            rows: `[B]` bool, True for rows that must reach their targets.
        """

        def behind(state: DecoderState) -> jax.Array:
            return (rows & (state.length < target)).any()

        def catch_up(state: DecoderState) -> DecoderState:
            count = jnp.clip(target - state.length, 0, CHUNK)
            vectors = fetch(state.length[:, None] + jnp.arange(CHUNK))
            hidden, cache = decoder.extend(state.cache, vectors, count)
            hidden = last_hidden(hidden, count, state.hidden)
            return DecoderState(cache, state.length + count, hidden)

        return jax.lax.while_loop(behind, catch_up, self)

    def extend_and_query(
        self,
        decoder: Any,
        fetch: Callable,
        target: jax.Array,
        rows: jax.Array,
        queries: jax.Array,
        count: jax.Array,
    ) -> tuple[jax.Array, "DecoderState"]:
        """Extend the cache as `extend_to` does, and compute the hidden states of queries after it.

        One forward pass processes the queries together with the last vectors before the target. The
        cache does not keep the queries. The decoder must have `extend_keeping` (see
        `DecoderBackbone`).

        Args:
            decoder: The `DecoderBackbone` to which the cache belongs.
            fetch: Function from indices `[B, C]` of `C` input vectors in each row to these vectors,
                `[B, C, D]`.
            target: `[B]` int32, number of vectors in each row that the cache should hold.
            rows: `[B]` bool, True for rows that must reach their targets.
            queries: `[B, Q, D]` up to `Q` vectors that follow the target in each row, padded on the
                right.
            count: `[B]` int32, number of real queries in each row.

        Returns:
            Hidden states `[B, Q, D]` of the queries, arbitrary where `rows` is False, and the
            extended state without the queries.
        """
        size, width = CHUNK + queries.shape[1], queries.shape[1]

        def unanswered(carry: tuple) -> jax.Array:
            return carry[0].any()

        def catch_up(carry: tuple) -> tuple:
            asks, state, found = carry
            left = jnp.maximum(target - state.length, 0)
            last = asks & (left <= CHUNK + width - count)
            kept = jnp.minimum(left, size)
            at = jnp.arange(size)
            behind = at - left[:, None]
            vectors = fetch(state.length[:, None] + at)
            added = take(queries, jnp.maximum(behind, 0)).astype(vectors.dtype)
            vectors = jnp.where((behind >= 0)[..., None], added, vectors)
            hidden, cache = decoder.extend_keeping(
                state.cache, vectors, kept + jnp.where(last, count, 0), kept
            )
            answers = take(hidden, left[:, None] + jnp.arange(width))
            found = jnp.where(last[:, None, None], answers, found)
            here = last_hidden(hidden, kept, state.hidden)
            return asks & ~last, DecoderState(cache, state.length + kept, here), found

        found = jnp.zeros((*queries.shape[:2], self.hidden.shape[-1]), self.hidden.dtype)
        carry = rows, self, placed_beside(found, rows)
        _, state, found = jax.lax.while_loop(unanswered, catch_up, carry)
        return found, state

    def batch_axes(self, decoder: Any) -> "DecoderState":
        """Return a pytree with each array's row axis, None for an array that all rows share."""
        row_axis: Any = 0
        return DecoderState(cache_batch_axes(decoder, self.cache), row_axis, row_axis)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Session(ShortRepr):
    """One conversation per row: its tokens, its sequence of input vectors, and decoder caches.

    Attributes:
        tokens: `[B, N]` int32 token ids, without latents; `N` is the maximum number of tokens.
        count: `[B]` int32, number of real tokens in each row.
        vectors: `[B, S, D]` input vectors of the reasoner (embedded tokens and latents); None if
            neither the weaver nor the trigger takes these vectors as input.
        hidden: `[B, S, D]` hidden states of the reasoner; None if the weaver does not take hidden
            states as input.
        reasoner: State of the reasoner, always up to date.
        weaver: State of the weaver's decoder, updated at events only; None if the weaver has no
            decoder.
        trigger: State of the trigger's decoder, updated at decisions only; None if the trigger has
            no decoder.
        keys: `[B]` PRNG keys, from which all random draws of a row are derived.
        responses: `[B]` int32, number of responses in each row so far, without those of 0 tokens.
        capacity: Maximum number `S` of tokens and latents of a row (static).
        snippet_capacity: Maximum number of retrieved tokens of an event (static).
    """

    tokens: jax.Array
    count: jax.Array
    vectors: jax.Array | None
    hidden: jax.Array | None
    reasoner: DecoderState
    weaver: DecoderState | None
    trigger: DecoderState | None
    keys: jax.Array
    responses: jax.Array
    capacity: int = dataclasses.field(metadata={"static": True})
    snippet_capacity: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def start(
        cls,
        memgen: MemGen,
        keys: jax.Array,
        max_tokens: int,
        max_responses: int,
        snippet_capacity: int = 0,
    ) -> "Session":
        """Make a session of empty rows.

        Args:
            memgen: Model that the session is for.
            keys: `[B]` PRNG keys, one for each row.
            max_tokens: Maximum number of tokens per row.
            max_responses: Maximum number of responses for whose latents there is capacity.
            snippet_capacity: Maximum number of retrieved tokens of an event.
        """
        config, batch = memgen.config, keys.shape[0]
        capacity = max_tokens + max_responses * config.max_latents
        zeros = jnp.zeros((batch,), jnp.int32)
        reasoner = DecoderState.start(memgen.reasoner, batch, capacity)
        weaver = trigger = weaving = triggering = None
        if config.weaver.latents and config.weaver.context != "nothing":
            extra = config.weaver.latents + snippet_capacity
            weaving = memgen.weaving()
            weaver = DecoderState.start(weaving, batch, capacity + extra)
        source = config.trigger.source if config.trigger else None
        if source in ("tokens", "stream"):
            triggering = memgen.triggering()
            trigger = DecoderState.start(triggering, batch, capacity)
        embedded = jax.eval_shape(embed, memgen.reasoner, zeros[:, None])
        from_vectors = config.weaver.context == "embeddings" and config.weaver.latents_see_latents

        def buffer(like: Any) -> jax.Array:
            return jnp.zeros((batch, capacity, like.shape[-1]), like.dtype)

        session = cls(
            tokens=jnp.zeros((batch, max_tokens), jnp.int32),
            count=zeros,
            vectors=buffer(embedded) if source == "stream" or from_vectors else None,
            hidden=buffer(reasoner.hidden) if config.weaver.context == "hidden" else None,
            reasoner=reasoner,
            weaver=weaver,
            trigger=trigger,
            keys=keys,
            responses=zeros,
            capacity=capacity,
            snippet_capacity=snippet_capacity,
        )
        return placed_beside(
            session, keys, session.batch_axes(memgen.reasoner, weaving, triggering)
        )

    def replace(self, **changes) -> "Session":
        """Return a copy with some fields changed, as `dataclasses.replace` does."""
        return dataclasses.replace(self, **changes)

    @property
    def last_two(self) -> tuple[jax.Array, jax.Array]:
        """Second-to-last and last token id of each row, `[B]` int32 each; 0 if there is none."""
        at = self.count[:, None] - jnp.array([2, 1])
        ids = jnp.take_along_axis(self.tokens, jnp.maximum(at, 0), axis=1)
        return tuple(jnp.where(at >= 0, ids, 0).T)

    def step_keys(self, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Derive the PRNG keys of each row's random draws in one step of generation.

        Args:
            step: `[B]` int32, index of each row's next token in its response.

        Returns:
            Three arrays of keys, `[B]` each: for sampling the token, for the trigger's decision
            before the token, and for `Request.keep_memory`.
        """
        fold = jax.vmap(jax.random.fold_in)
        here = fold(fold(self.keys, self.responses), step)
        fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
        return fold(here, 0), fold(here, 1), fold(here, 2)

    def append_tokens(
        self, memgen: MemGen, tokens: jax.Array, count: jax.Array, *, fresh: bool = False
    ) -> "Session":
        """Append the first `count [B]` tokens of `tokens [B, C]` to each row.

        Rows that would exceed the session's capacity become NaN.
        """
        session = self.append(memgen, embed(memgen.reasoner, tokens), count, fresh=fresh)
        return session.replace(
            tokens=put(self.tokens, tokens, self.count, count), count=self.count + count
        )

    def append(
        self, memgen: MemGen, vectors: jax.Array, count: jax.Array, *, fresh: bool = False
    ) -> "Session":
        """Append the first `count [B]` vectors of `vectors [B, C, D]` to each row."""
        state = self.reasoner
        hidden, cache = memgen.reasoner.extend(state.cache, vectors, count, fresh=fresh)
        last = last_hidden(hidden, count, state.hidden)
        append = lambda rows, new: None if rows is None else put(rows, new, state.length, count)  # noqa: E731
        return self.replace(
            reasoner=DecoderState(cache, state.length + count, last),
            vectors=append(self.vectors, vectors),
            hidden=append(self.hidden, hidden),
        )

    def take_rows(self, memgen: MemGen, rows: jax.Array, keys: jax.Array) -> "Session":
        """Return a session whose row `i` continues row `rows[i]` of this session with a new key.

        A row may be taken many times, so that a shared prompt is prefilled once. This session is
        not modified.

        Args:
            memgen: Model to which the session belongs.
            rows: `[R]` int32, indices in this session of the `R` rows to take.
            keys: `[R]` PRNG keys, one for each new row.

        Raises:
            ValueError: An index is out of range (under `jit` the new row becomes NaN instead).
        """
        _check_rows(rows, self.count.shape[0])
        weaver = None if self.weaver is None else memgen.weaving()
        trigger = None if self.trigger is None else memgen.triggering()
        axes = self.batch_axes(memgen.reasoner, weaver, trigger)

        def take(leaf, axis):  # a copy: generation donates the buffers of the new session
            return jnp.copy(leaf) if axis is None else jnp.take(leaf, rows, axis=axis)

        return jax.tree.map(take, self, axes).replace(keys=jnp.copy(keys))

    def batch_axes(self, reasoner: Any, weaver: Any, trigger: Any) -> "Session":
        """Return a pytree like the session with the row axis of each array.

        The entry is None for an array that all rows share.

        Args:
            reasoner: The reasoner, a `DecoderBackbone`.
            weaver: The weaver's `DecoderBackbone`; ignored if the session has no weaver state.
            trigger: The trigger's `DecoderBackbone`; ignored if the session has no trigger state.
        """
        axes = lambda state, decoder: None if state is None else state.batch_axes(decoder)  # noqa: E731
        return jax.tree.map(lambda _: 0, self).replace(
            reasoner=self.reasoner.batch_axes(reasoner),
            weaver=axes(self.weaver, weaver),
            trigger=axes(self.trigger, trigger),
        )

    def weaver_inputs(self, memgen: MemGen) -> tuple[Callable, jax.Array]:
        """Return a function from indices to the weaver's input vectors, and the vectors' number.

        Returns:
            Function `fetch` of `DecoderState.extend_to`, and the number of input vectors of each
            row so far, `[B]` int32.
        """
        if not memgen.config.weaver.latents_see_latents:
            fetch, target = self._embedded_tokens(memgen.reasoner), self.count
        else:
            rows = self.hidden if memgen.config.weaver.context == "hidden" else self.vectors
            fetch, target = _vectors_of(rows), self.reasoner.length
        return lambda index: memgen.weaver.context(fetch(index)), target

    def trigger_inputs(self, memgen: MemGen, decoder: Any) -> tuple[Callable, jax.Array]:
        """Return a function from indices to the trigger's input vectors, and the vectors' number.

        Args:
            memgen: Model to which the session belongs.
            decoder: The trigger's `DecoderBackbone`.

        Returns:
            As in `weaver_inputs`.
        """
        if memgen.checked_trigger().config.source == "tokens":
            return self._embedded_tokens(decoder), self.count
        return _vectors_of(self.vectors), self.reasoner.length

    def _embedded_tokens(self, decoder: Any) -> Callable:
        return lambda index: embed(decoder, take(self.tokens, index))


def _vectors_of(rows: Any) -> Callable:
    return lambda index: take(rows, index)


def _check_rows(rows: jax.Array, count: int) -> None:
    if isinstance(rows, Tracer):
        return
    wrong = [row for row in np.asarray(rows).tolist() if not 0 <= row < count]
    if wrong:
        raise ValueError(f"row {wrong[0]} of a session of {count}: choose from 0 to {count - 1}")


def check_session(memgen: Any, session: Any) -> None:
    """Raise a ValueError unless `memgen` is a `MemGen` and `session` a `Session`."""
    check_memgen(memgen)
    if not isinstance(session, Session):
        raise ValueError(f"a {type(session).__name__} in place of a session: give begin(...)")


def check_capacity(session: Session, tokens: Any, latents: int = 0) -> None:
    """Raise a ValueError if rows would exceed the session's capacity, unless lengths are traced.

    Args:
        session: Session that is to be extended.
        tokens: Number of new tokens in each row, `[B]` or a scalar.
        latents: Number of new latents in each row that gets new tokens, `[B]` or a scalar.
    """
    if isinstance(tokens, Tracer) or isinstance(session.count, Tracer):
        return
    tokens = on_host(tokens)
    count = int((on_host(session.count) + tokens).max())
    if count > session.tokens.shape[1]:
        raise ValueError(
            f"a row would grow to {count} tokens, the session has max_tokens="
            f"{session.tokens.shape[1]}: begin with more"
        )
    more = tokens + latents * (tokens > 0)
    check_woven_length(int((on_host(session.reasoner.length) + more).max()), session.capacity)


def take(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Gather `rows [B, S, ...]` at `index [B, C]`; arbitrary where the index is too large."""
    index = jnp.minimum(index, rows.shape[1] - 1)
    index = index.reshape(index.shape + (1,) * (rows.ndim - 2))
    return jnp.take_along_axis(rows, index, axis=1)


def put(rows: jax.Array, new: jax.Array, start: jax.Array, count: jax.Array) -> jax.Array:
    """Write each row's first `count [B]` entries of `new [B, C, ...]` into an array of rows.

    Args:
        rows: `[B, S, ...]` array with `S` entries in each row; it is not modified.
        new: `[B, C, ...]` new entries.
        start: `[B]` int32, index in each row of the first new entry.
        count: `[B]` int32, number of entries to write in each row.

    Returns:
        Array like `rows`; entries beyond the end of a row are dropped.
    """

    def write(row, new, start, count):
        offset = jnp.arange(new.shape[0])
        index = jnp.where(offset < count, start + offset, row.shape[0])
        return row.at[index].set(new.astype(row.dtype), mode="drop")

    return jax.vmap(write)(rows, new, start, count)


def last_hidden(hidden: jax.Array, count: jax.Array, before: jax.Array) -> jax.Array:
    """Return the last of each row's first `count [B]` hidden states, `[B, D]`.

    Args:
        hidden: `[B, C, D]` hidden states of `C` vectors.
        count: `[B]` int32, number of real vectors in each row.
        before: `[B, D]` hidden state to return for rows with a count of 0.
    """
    last = take(hidden, jnp.maximum(count - 1, 0)[:, None])[:, 0]
    return jnp.where((count > 0)[:, None], last, before)

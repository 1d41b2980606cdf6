"""What rows have read so far, and how more is read: live caches that are only appended to."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from memgen.model import MemGen

CHUNK = 32
NO_ROWS = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reader:
    """A decoder's cache that is brought up to date only when it is asked.

    Attributes:
        cache: of the decoder.
        read: `[B]` int32, places it has read.
        hidden: `[B, D]`, its hidden state at the last of them.
    """

    cache: Any
    read: jax.Array
    hidden: jax.Array

    @classmethod
    def start(cls, decoder: Any, batch: int, room: int) -> "Reader":
        hidden = jax.eval_shape(decoder.hidden_states, jnp.zeros((batch, 1, decoder.embed_dim)))
        return cls(
            decoder.init_cache(batch, room),
            jnp.zeros((batch,), jnp.int32),
            jnp.zeros((batch, hidden.shape[-1]), hidden.dtype),
        )

    def extend_to(
        self, decoder: Any, fetch: Callable, target: jax.Array, asked: jax.Array
    ) -> "Reader":
        """Read on until every asked row is at its target; other rows may come along.

        Args:
            fetch: places `[B, C]` to the vectors that stand there `[B, C, D]`.
            target: `[B]` int32.
            asked: `[B]` bool.
        """

        def behind(reader: Reader) -> jax.Array:
            return (asked & (reader.read < target)).any()

        def step(reader: Reader) -> Reader:
            count = jnp.clip(target - reader.read, 0, CHUNK)
            vectors = fetch(reader.read[:, None] + jnp.arange(CHUNK))
            hidden, cache = decoder.extend(reader.cache, vectors, count)
            return Reader(cache, reader.read + count, last_hidden(hidden, count, reader.hidden))

        return jax.lax.while_loop(behind, step, self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Session:
    """Rows of one conversation each: their tokens, their streams, and who has read how far.

    Attributes:
        tokens: `[B, N]` int32, and
        count: `[B]` int32 of them real.
        vectors: `[B, S, D]`, the stream that the reasoner reads, or None where nobody asks.
        hidden: `[B, S, D]` its hidden states, or None where nobody asks.
        reasoner: always up to date.
        weaver, trigger: lag behind; None where the model has none.
        keys: `[B]`, of which all that is random in a row is made.
        responses: `[B]` int32 so far.
        places: `S`, room for tokens and latents in each row.
        snippets: room for so many retrieved tokens at an event.
    """

    tokens: jax.Array
    count: jax.Array
    vectors: jax.Array | None
    hidden: jax.Array | None
    reasoner: Reader
    weaver: Reader | None
    trigger: Reader | None
    keys: jax.Array
    responses: jax.Array
    places: int = dataclasses.field(metadata={"static": True})
    snippets: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def start(
        cls, memgen: MemGen, keys: jax.Array, max_tokens: int, max_responses: int, snippets: int = 0
    ) -> "Session":
        """Empty rows.

        Args:
            keys: `[B]`, one for each row.
            max_tokens: room for tokens in each row.
            max_responses: room for the latents of so many responses.
            snippets: room for so many retrieved tokens at an event.
        """
        config, batch = memgen.config, keys.shape[0]
        room = max_tokens + max_responses * config.room
        none = jnp.zeros((batch,), jnp.int32)
        reasoner = Reader.start(memgen.reasoner, batch, room)
        weaver = trigger = None
        if config.weaver.latents and config.weaver.context != "nothing":
            extra = config.weaver.latents + snippets
            weaver = Reader.start(memgen.weaving(), batch, room + extra)
        source = config.trigger.source if config.trigger else None
        if source in ("tokens", "stream"):
            trigger = Reader.start(memgen.triggering(), batch, room)
        embedded = jax.eval_shape(memgen.reasoner.embed_tokens, none[:, None])
        buffer = lambda like: jnp.zeros((batch, room, like.shape[-1]), like.dtype)  # noqa: E731
        from_vectors = config.weaver.context == "embeddings" and config.weaver.latents_see_latents
        return cls(
            jnp.zeros((batch, max_tokens), jnp.int32),
            none,
            buffer(embedded) if source == "stream" or from_vectors else None,
            buffer(reasoner.hidden) if config.weaver.context == "hidden" else None,
            reasoner,
            weaver,
            trigger,
            keys,
            none,
            room,
            snippets,
        )

    def replace(self, **changes) -> "Session":
        return dataclasses.replace(self, **changes)

    @property
    def last_two(self) -> tuple[jax.Array, jax.Array]:
        """Ids `[B]` before the last one, and the last one; 0 where there is none."""
        at = self.count[:, None] - jnp.array([2, 1])
        ids = jnp.take_along_axis(self.tokens, jnp.maximum(at, 0), axis=1)
        return tuple(jnp.where(at >= 0, ids, 0).T)

    def append_tokens(
        self, memgen: MemGen, tokens: jax.Array, count: jax.Array, *, fresh: bool = False
    ) -> "Session":
        """Read the first `count [B]` of `tokens [B, C]`; rows that would overflow become NaN."""
        session = self.append(memgen, memgen.reasoner.embed_tokens(tokens), count, fresh=fresh)
        return session.replace(
            tokens=put(self.tokens, tokens, self.count, count), count=self.count + count
        )

    def append(
        self, memgen: MemGen, vectors: jax.Array, count: jax.Array, *, fresh: bool = False
    ) -> "Session":
        """Read the first `count [B]` of `vectors [B, C, D]` into the stream of each row."""
        at, reader = self.reasoner.read, self.reasoner
        hidden, cache = memgen.reasoner.extend(reader.cache, vectors, count, fresh=fresh)
        last = last_hidden(hidden, count, reader.hidden)
        return self.replace(
            reasoner=Reader(cache, at + count, last),
            vectors=None if self.vectors is None else put(self.vectors, vectors, at, count),
            hidden=None if self.hidden is None else put(self.hidden, hidden, at, count),
        )

    def take_rows(self, memgen: MemGen, rows: jax.Array, keys: jax.Array) -> "Session":
        """A session whose row `i` goes on from row `rows[i]` of this one, with a key of its own.

        One row may be taken many times: what it has read is read once. The old session stays
        usable.

        Args:
            rows: `[R]` int32.
            keys: `[R]`.

        Raises:
            ValueError: there is no such row (under `jit` it becomes NaN).
        """
        _check_rows(rows, self.count.shape[0])
        weaver = None if self.weaver is None else memgen.weaving()
        trigger = None if self.trigger is None else memgen.triggering()
        axes = self.row_axes(memgen.reasoner, weaver, trigger)
        take = lambda leaf, axis: leaf if axis == NO_ROWS else jnp.take(leaf, rows, axis=axis)  # noqa: E731
        return jax.tree.map(take, self, axes).replace(keys=keys)

    def row_axes(self, reasoner: Any, weaver: Any, trigger: Any) -> "Session":
        """The axis that counts rows in place of each array, `NO_ROWS` where none does.

        Args:
            reasoner, weaver, trigger: the decoders whose caches these are.
        """

        def of(reader: Reader | None, decoder: Any) -> Reader | None:
            if reader is None:
                return None
            axes: Any = 0
            return Reader(_cache_axes(decoder, reader.cache), axes, axes)

        return jax.tree.map(lambda _: 0, self).replace(
            reasoner=of(self.reasoner, reasoner),
            weaver=of(self.weaver, weaver),
            trigger=of(self.trigger, trigger),
        )

    def weaver_sees(self, memgen: MemGen) -> tuple[Callable, jax.Array]:
        """What the weaver reads: places to vectors of its own width, and how many there are."""
        if not memgen.config.weaver.latents_see_latents:
            fetch, target = self._tokens_of(memgen.reasoner), self.count
        else:
            rows = self.hidden if memgen.config.weaver.context == "hidden" else self.vectors
            fetch, target = rows_of(rows), self.reasoner.read
        return lambda places: memgen.weaver.context(fetch(places)), target

    def trigger_sees(self, memgen: MemGen, decoder: Any) -> tuple[Callable, jax.Array]:
        """What the trigger's decoder reads, and how many there are."""
        if memgen.checked_trigger().config.source == "tokens":
            return self._tokens_of(decoder), self.count
        return rows_of(self.vectors), self.reasoner.read

    def _tokens_of(self, decoder: Any) -> Callable:
        return lambda places: decoder.embed_tokens(take(self.tokens, places))


def _check_rows(rows: jax.Array, count: int) -> None:
    if isinstance(rows, Tracer):
        return
    wrong = [row for row in np.asarray(rows).tolist() if not 0 <= row < count]
    if wrong:
        raise ValueError(f"row {wrong[0]} of a session of {count}: choose from 0 to {count - 1}")


def _cache_axes(decoder: Any, cache: Any) -> Any:
    """The axis of rows of each array of a decoder's cache; two shapes of it tell.

    Raises:
        ValueError: an array grows with rows, but not along one axis that counts them.
    """
    shapes = lambda batch: jax.eval_shape(lambda: decoder.init_cache(batch, 8))  # noqa: E731
    few, more = (jax.tree.leaves(shapes(batch)) for batch in (2, 3))
    axes = [_axis_of_rows(a.shape, b.shape) for a, b in zip(few, more, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(cache), axes)


def _axis_of_rows(of_two: tuple[int, ...], of_three: tuple[int, ...]) -> int:
    sizes = list(zip(of_two, of_three, strict=True))
    differs = [axis for axis, (two, three) in enumerate(sizes) if two != three]
    if [sizes[axis] for axis in differs] not in ([], [(2, 3)]):
        raise ValueError(
            f"init_cache gives an array {of_two} for 2 rows and {of_three} for 3: give rows an "
            "axis of their own"
        )
    return differs[0] if differs else NO_ROWS


@dataclasses.dataclass(frozen=True)
class RowChunk:
    """One row of each lane; lanes are equal parts of a batch, rows in a lane stand together.

    Attributes:
        place: `[G]` int32, the row of each lane.
    """

    place: jax.Array

    @classmethod
    def next(cls, waiting: jax.Array, lanes: int) -> "RowChunk":
        """The first row of each lane that waits, `[B]` bool; its first row where none does."""
        return cls(waiting.reshape(lanes, -1).argmax(axis=1).astype(jnp.int32))

    def take(self, tree: Any, axes: Any = None) -> Any:
        """The chosen rows of arrays whose axis of rows is 0, or as `axes` says."""

        def rows(leaf, axis):
            if axis == NO_ROWS:
                return leaf
            one = lambda lane, place: jax.lax.dynamic_index_in_dim(lane, place, axis, False)  # noqa: E731
            return jax.vmap(one, (axis, 0), axis)(self._lanes(leaf, axis), self.place)

        return jax.tree.map(rows, tree, self._axes(tree, axes))

    def put(self, tree: Any, new: Any, axes: Any = None) -> Any:
        """The arrays with other chosen rows; what counts no rows is taken from `new`."""

        def rows(leaf, new, axis):
            if axis == NO_ROWS:
                return new
            one = lambda lane, new, place: jax.lax.dynamic_update_index_in_dim(  # noqa: E731
                lane, new, place, axis
            )
            lanes = self._lanes(leaf, axis)
            changed = jax.vmap(one, (axis, axis, 0), axis)(lanes, new, self.place)
            return changed.reshape(leaf.shape)

        return jax.tree.map(rows, tree, new, self._axes(tree, axes))

    @staticmethod
    def _axes(tree: Any, axes: Any) -> Any:
        return jax.tree.map(lambda _: 0, tree) if axes is None else axes

    def _lanes(self, leaf: jax.Array, axis: int) -> jax.Array:
        lanes = self.place.shape[0]
        split = (lanes, leaf.shape[axis] // lanes)
        return leaf.reshape(*leaf.shape[:axis], *split, *leaf.shape[axis + 1 :])


def check_room(session: Session, tokens: Any, latents: int = 0) -> None:
    """Raise a ValueError where rows would outgrow the session; not where lengths are traced."""
    if isinstance(tokens, Tracer) or isinstance(session.count, Tracer):
        return
    count = int((np.asarray(session.count) + np.asarray(tokens)).max())
    if count > session.tokens.shape[1]:
        raise ValueError(
            f"a row would grow to {count} tokens, the session has max_tokens="
            f"{session.tokens.shape[1]}: begin with more"
        )
    more = np.asarray(tokens) + latents * (np.asarray(tokens) > 0)
    places = int((np.asarray(session.reasoner.read) + more).max())
    if places > session.places:
        raise ValueError(
            f"a row would grow to {places} tokens and latents, the session has room for "
            f"{session.places}: begin with more max_responses"
        )


def rows_of(rows: Any) -> Callable:
    """Places `[B, C]` to what stands there in `rows [B, S, D]`."""
    return lambda places: take(rows, places)


def take(rows: jax.Array, places: jax.Array) -> jax.Array:
    """`rows [B, S, ...]` at `places [B, C]`; beyond the end, anything."""
    places = jnp.minimum(places, rows.shape[1] - 1)
    places = places.reshape(places.shape + (1,) * (rows.ndim - 2))
    return jnp.take_along_axis(rows, places, axis=1)


def put(rows: jax.Array, new: jax.Array, at: jax.Array, count: jax.Array) -> jax.Array:
    """`rows [B, S, ...]` with the first `count [B]` of `new [B, C, ...]` from place `at [B]` on."""

    def write(row, new, at, count):
        offset = jnp.arange(new.shape[0])
        place = jnp.where(offset < count, at + offset, row.shape[0])
        return row.at[place].set(new.astype(row.dtype), mode="drop")

    return jax.vmap(write)(rows, new, at, count)


def last_hidden(hidden: jax.Array, count: jax.Array, before: jax.Array) -> jax.Array:
    """The state after `count [B]` of `hidden [B, C, D]`, or the one before where none was read."""
    last = take(hidden, jnp.maximum(count - 1, 0)[:, None])[:, 0]
    return jnp.where((count > 0)[:, None], last, before)

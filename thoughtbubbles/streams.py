"""Streams: the value that is passed from block to block."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from thoughtbubbles.changes import replaced
from thoughtbubbles.pages import Page, streams_page
from thoughtbubbles.placement import broadcast_beside
from thoughtbubbles.short_repr import ShortRepr

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int, Shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Streams(ShortRepr):
    """Residual streams of a batch, several per token, in the order of the text; dead slots last.

    The value that flows through a model (arXiv 2510.00219). Causal attention over slots is enough:
    a live stream never attends to a dead one.

    Attributes:
        x: `[B, S, D]` residuals.
        log_score: `[B, S]` float32 cumulative log-score of each stream, 0 at the input.
        token: `[B, S]` int32, index of each stream's input token, non-decreasing over live slots.
        alive: `[B, S]` bool, slots that hold a stream.
        length: `[B]` int32, number of real tokens of each row.
        first: `[B]` int32, number of tokens of the sequence before the row's token 0; 0 except in
            cached decoding.
        num_tokens: Static number `T` of tokens of a row, padding on the right included.
        forked: Whether a fork layer came before (static); until then all log-scores are exactly 0.
        continued: Whether the row may have earlier tokens (static): whether `first` was given.
    """

    x: jax.Array
    log_score: jax.Array
    token: jax.Array
    alive: jax.Array
    length: jax.Array
    first: jax.Array
    num_tokens: int = dataclasses.field(metadata={"static": True})
    forked: bool = dataclasses.field(default=False, metadata={"static": True})
    continued: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def start(
        cls,
        x: Float[Array | np.ndarray, "B T D"],
        length: Int[Array | np.ndarray, " B"] | None = None,
        copies: int = 1,
        first: Int[Array | np.ndarray, " B"] | None = None,
    ) -> Streams:
        """The streams at the input: one per token, or `copies` of it for copy-k.

        Args:
            x: Residuals of the tokens, padded on the right.
            length: Number of real tokens of each row; all `T` by default.
            copies: Number of equal streams of each token.
            first: Number of tokens of the sequence before these; 0 by default.

        Raises:
            ValueError: A shape or type is wrong, or a length is not from 0 to `T` (lengths that are
                traced by `jit` are checked by `Fork.extend` alone, whose rows become NaN).
        """
        _check_start(x, length, copies, first)
        x = jnp.asarray(x)
        num_tokens, continued = x.shape[1], first is not None
        length = broadcast_beside(num_tokens if length is None else length, x, 1)
        first = broadcast_beside(0 if first is None else first, x, 1)
        token = broadcast_beside(jnp.arange(num_tokens), x, 2)
        if copies > 1:
            x, token = jnp.repeat(x, copies, axis=1), jnp.repeat(token, copies, axis=1)
        log_score, alive = jnp.zeros_like(token, jnp.float32), token < length[:, None]
        return cls(x, log_score, token, alive, length, first, num_tokens, continued=continued)

    def replace(self, **changes: Unpack[StreamsChanges]) -> Streams:
        """The same streams with some fields changed, as `dataclasses.replace`.

        Args:
            changes: New values of the fields, such as `x`.

        Raises:
            TypeError: A change is of no field.
        """
        return replaced(self, changes)

    @property
    def original(self) -> Bool[Array, "B S"]:
        """The rightmost live stream of each token."""
        # Not jnp.roll, which would compare the only stream of a row with itself.
        ends_bubble = self.token[:, :-1] != self.token[:, 1:]
        last = jnp.ones_like(self.alive[:, :1])
        return self.alive & jnp.concatenate([ends_bubble | ~self.alive[:, 1:], last], axis=1)

    def bubbles(self) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
        """Each stream's distance to the left of its original, and the size of its bubble.

        Both follow from the sorted token indices by running extremes, without scatter or
        collective.
        """
        slots = self.token.shape[1]
        slot = broadcast_beside(jnp.arange(slots), self.token, 2)
        ends = self.original
        starts = jnp.concatenate([jnp.ones_like(ends[:, :1]), ends[:, :-1]], axis=1)
        first = jax.lax.cummax(jnp.where(starts, slot, 0), axis=1)
        last = jax.lax.cummin(jnp.where(ends, slot, slots), axis=1, reverse=True)
        return last - slot, last - first + 1

    def positions(self, fractional: bool = True) -> Float[Array, "B S"]:
        """Float32 rotary positions (arXiv 2510.00219, App. D, eq. 13).

        The original of token `i` has position `i`, and the `p`-th fork to its left has `i - p / n`
        in a bubble of `n` streams. With `fractional=False` all streams of token `i` have `i`.
        """
        token = (self.token + self.first[:, None]).astype(jnp.float32)
        if not fractional:
            return token
        distance, size = self.bubbles()
        return jnp.where(self.alive, token - distance / size, 0.0)

    def score(self) -> Float[Array, "B S"]:
        """Float32 cumulative score p of each stream, from 0 to 1."""
        return jnp.exp(self.log_score)

    def attention_bias(self, head_dim: int | None = None) -> Float[Array, "B S"]:
        """Float32 bias of each stream's key, added to the attention logits (eq. 8).

        Args:
            head_dim: Width K of a head, for the bias log p / sqrt(K) of the authors' code; without
                it the bias is log p, which weighs a key by exactly p. Both are added to logits that
                are already divided by sqrt(K).
        """
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"head_dim={head_dim} is below 1: give the width of a head, or None")
        return self.log_score * (1.0 if head_dim is None else head_dim**-0.5)

    def attenuate(self, values: Float[Array, "B S *rest"]) -> Float[Array, "B S *rest"]:
        """Each stream's values times its score p, in their dtype.

        Applied to the values of attention (eq. 8) and to what a block adds to the residuals (eqs.
        9-10).
        """
        if jnp.shape(values)[:2] != self.log_score.shape:
            raise ValueError(
                f"values of shape {jnp.shape(values)} for streams {self.log_score.shape}: give "
                "[batch, streams, ...] of these streams"
            )
        score = self.score().reshape(self.log_score.shape + (1,) * (values.ndim - 2))
        return values * score.astype(values.dtype)

    def bubble_of(self, token: Int[Array, " B"], max_bubble: int) -> Streams:
        """The bubble of one token of each row, as streams of rows of one token; dead slots first.

        Args:
            token: Index of the token in each row.
            max_bubble: Static upper bound on the number of streams of a token.
        """
        if jnp.shape(token) != self.token.shape[:1]:
            raise ValueError(
                f"tokens of shape {jnp.shape(token)} for {self.token.shape[0]} rows: give one "
                "index a row"
            )
        slots = self.token.shape[1]
        mine = (self.token == token[:, None]) & self.alive
        last = slots - 1 - jnp.argmax(mine[:, ::-1], axis=1)
        slot = last[:, None] - jnp.arange(max_bubble - 1, -1, -1)[None]
        alive = (slot >= 0) & jnp.take_along_axis(mine, jnp.maximum(slot, 0), axis=1)
        slot = jnp.maximum(slot, 0)
        return self.replace(
            x=jnp.take_along_axis(self.x, slot[..., None], axis=1),
            log_score=jnp.take_along_axis(self.log_score, slot, axis=1),
            token=jnp.zeros_like(slot),
            alive=alive,
            length=jnp.ones_like(self.length),
            first=self.first + token,
            num_tokens=1,
        )

    def page(self, texts: Sequence[Sequence[str]] | None = None) -> Page:
        """The streams in HTML: a dot for each, whose slot, score and position are its title.

        `page().save("streams.html")` writes a page that needs no other file.

        Args:
            texts: Text of each token of each row, padding included; indices by default.

        Raises:
            ValueError: The arrays are not here (traced, donated, or on other hosts) or of no batch,
                or the texts are not as many as the tokens.
        """
        if not self._is_batch():
            raise ValueError(
                f"streams of tokens {jnp.shape(self.token)}: give [B, S], such as a[None] of each "
                "array of one row"
            )
        if not self._is_here():
            raise ValueError(f"{self!r} has no values here: show it outside of jit, on one host")
        log_score, token = np.asarray(self.log_score), np.asarray(self.token)
        alive, first = np.asarray(self.alive), np.asarray(self.first)
        return streams_page(log_score, token, alive, first, self.num_tokens, texts)

    def _is_batch(self) -> bool:
        return (jnp.ndim(self.token), jnp.ndim(self.first)) == (2, 1)

    def _is_here(self) -> bool:
        return all(map(_is_here, (self.log_score, self.token, self.alive, self.first)))

    def _repr_html_(self) -> str | None:
        here = self._is_here() and self._is_batch()
        return self.page()._repr_html_() if here else None


class StreamsChanges(TypedDict, total=False):
    """The fields of `Streams` as keyword arguments, so that type checkers find a typo."""

    x: jax.Array
    log_score: jax.Array
    token: jax.Array
    alive: jax.Array
    length: jax.Array
    first: jax.Array
    num_tokens: int
    forked: bool
    continued: bool


def _is_here(value: object) -> bool:
    """Whether a value of streams can be read: neither traced nor donated."""
    if isinstance(value, Tracer) or not isinstance(value, (jax.Array, np.ndarray)):
        return False
    return isinstance(value, np.ndarray) or (value.is_fully_addressable and not value.is_deleted())


def _check_start(x, length, copies, first) -> None:
    if not hasattr(x, "dtype"):
        raise ValueError(f"residuals are a {type(x).__name__}: give an array, by jnp.asarray(...)")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"residuals of type {x.dtype}: embed token ids first, into floats")
    if jnp.ndim(x) != 3:
        raise ValueError(
            f"residuals of shape {jnp.shape(x)}: Streams.start takes [batch, tokens, width]"
        )
    if not hasattr(copies, "__index__"):
        raise ValueError(f"copies={copies!r}: give a whole number; 1 means no copies")
    if copies < 1:
        raise ValueError(f"copies={copies} is below 1: 1 means no copies")
    for name, value in (("length", length), ("first", first)):
        if value is None:
            continue
        given = value if hasattr(value, "dtype") else jnp.asarray(value)
        if given.shape != x.shape[:1]:
            raise ValueError(
                f"{name} of shape {given.shape} for {x.shape[0]} rows: give one number a row"
            )
        _check_integers(name, given.dtype)
    if length is None or isinstance(length, Tracer):
        return
    lengths = np.asarray(length)
    if lengths.max(initial=0) > x.shape[1] or lengths.min(initial=0) < 0:
        raise ValueError(
            f"lengths {lengths.tolist()} of {x.shape[1]} tokens: choose 0 to {x.shape[1]}"
        )


def _check_integers(name: str, dtype: Any) -> None:
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name} of type {dtype}: give integers, such as int32")


def left_align(
    tokens: Shaped[Array | np.ndarray, "B T *rest"], mask: Bool[Array | np.ndarray, "B T"]
) -> tuple[Shaped[Array, "B T *rest"], Int[Array, " B"], Int[Array, "B T"]]:
    """Move the real tokens of each row to its start, in order.

    Args:
        tokens: Token ids or vectors of tokens, with padding anywhere.
        mask: Real tokens.

    Returns:
        The aligned tokens, the number of real tokens of each row, and `rank`, the new index of each
        token.

    Raises:
        ValueError: The mask is not of these tokens.
    """
    mask = _real(mask, tokens)
    order = jnp.argsort(~mask, axis=1, stable=True)
    length = mask.sum(axis=1, dtype=jnp.int32)
    rank = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    order = order.reshape(order.shape + (1,) * (tokens.ndim - 2))
    return jnp.take_along_axis(tokens, order, axis=1), length, rank


def restore_alignment(
    values: Shaped[Array, "B T *rest"],
    mask: Bool[Array | np.ndarray, "B T"],
    rank: Int[Array, "B T"],
) -> Shaped[Array, "B T *rest"]:
    """Undo `left_align` for values of each token; those of padding become 0.

    Args:
        values: Values of the aligned tokens.
        mask: Mask that `left_align` was given.
        rank: New index of each token, as `left_align` returned it.

    Raises:
        ValueError: The mask is not of these tokens.
    """
    mask = _real(mask, values)
    if not hasattr(rank, "shape") or rank.shape != mask.shape:
        raise ValueError(
            f"a rank of shape {jnp.shape(rank)} for a mask of shape {mask.shape}: give what "
            "left_align returned for this mask"
        )
    _check_integers("rank", rank.dtype)
    mask = mask.reshape(mask.shape + (1,) * (values.ndim - 2))
    rank = rank.reshape(rank.shape + (1,) * (values.ndim - 2))
    return jnp.where(mask, jnp.take_along_axis(values, rank, axis=1), 0)


def split_segments(
    tokens: Shaped[Array | np.ndarray, "B T *rest"],
    segment_ids: Int[Array | np.ndarray, "B T"],
    num_segments: int,
) -> tuple[Shaped[Array, "B*N T *rest"], Int[Array, " B*N"]]:
    """Rows of one text each, out of packed rows: a fork policy's budget is that of a row.

    Args:
        tokens: Token ids or vectors of tokens, several texts in a row.
        segment_ids: Number of each token's text in its row, from 1; 0 for padding.
        num_segments: Static largest number `N` of texts of a row.

    Returns:
        The aligned tokens, those of text `n` of row `b` in row `b * N + n - 1`, and the number of
        tokens of each new row. `join_segments` takes values of tokens back.

    Raises:
        ValueError: `N` is below 1, there is not one id for each token, or a segment id is not from
            0 to `N`; under `jit`, where ids are unknown, `join_segments` gives NaN for its tokens.
    """
    _check_rows(tokens=tokens, segment_ids=segment_ids)
    if not hasattr(num_segments, "__index__"):
        raise ValueError(f"num_segments={num_segments!r}: give a whole number")
    if num_segments < 1:
        raise ValueError(f"num_segments={num_segments} is below 1: give the largest segment id")
    if segment_ids.shape != tokens.shape[:2]:
        raise ValueError(
            f"segment ids of shape {segment_ids.shape} for tokens of shape {tokens.shape}: give "
            "one id for each token"
        )
    _check_integers("segment ids", segment_ids.dtype)
    if not isinstance(segment_ids, Tracer):
        ids = np.asarray(segment_ids)
        if ids.max(initial=0) > num_segments or ids.min(initial=0) < 0:
            raise ValueError(
                f"segment ids from {ids.min()} to {ids.max()} with num_segments={num_segments}: "
                "choose the largest id, and 0 for padding"
            )
    mask = _segments(segment_ids, num_segments)
    aligned, length, _ = left_align(jnp.repeat(tokens, num_segments, axis=0), mask)
    return aligned, length


def join_segments(
    values: Shaped[Array, "B*N T *rest"], segment_ids: Int[Array | np.ndarray, "B T"]
) -> Shaped[Array, "B T *rest"]:
    """Undo `split_segments` for float values of each token; those of padding become 0.

    Args:
        values: Values of the rows of one text each.
        segment_ids: Ids that `split_segments` was given.

    Raises:
        ValueError: The rows of values are not a multiple of those of ids, or of other lengths.
    """
    _check_rows(values=values, segment_ids=segment_ids)
    if values.shape[0] % segment_ids.shape[0] or values.shape[1] != segment_ids.shape[1]:
        raise ValueError(
            f"values of shape {values.shape} for segment ids of shape {segment_ids.shape}: give "
            "num_segments rows for each row of ids, as split_segments made them"
        )
    _check_integers("segment ids", segment_ids.dtype)
    batch, num_segments = segment_ids.shape[0], values.shape[0] // segment_ids.shape[0]
    mask = _segments(segment_ids, num_segments)
    rank = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    rows = restore_alignment(values, mask, rank)
    joined = rows.reshape(batch, num_segments, *values.shape[1:]).sum(axis=1, dtype=values.dtype)
    wrong = (segment_ids < 0) | (segment_ids > num_segments)
    return jnp.where(wrong.reshape(wrong.shape + (1,) * (values.ndim - 2)), jnp.nan, joined)


def _segments(segment_ids: jax.Array | np.ndarray, num_segments: int) -> jax.Array:
    """`[B*N, T]` bool, tokens of each text of each row."""
    ids = jnp.asarray(segment_ids)
    mask = ids[:, None] == jnp.arange(1, num_segments + 1, dtype=jnp.int32)[None, :, None]
    return mask.reshape(-1, ids.shape[1])


def _check_rows(**arrays: Any) -> None:
    """Raise a ValueError unless these are arrays `[batch, tokens, ...]`."""
    for name, values in arrays.items():
        if not hasattr(values, "shape"):
            raise ValueError(f"{name} are a {type(values).__name__}: give an array, by jnp.asarray")
        if len(values.shape) < 2:
            raise ValueError(f"{name} of shape {values.shape}: give [batch, tokens, ...]")


def _real(mask: jax.Array | np.ndarray, values: jax.Array | np.ndarray) -> jax.Array:
    _check_rows(values=values)
    if not hasattr(mask, "shape"):
        raise ValueError(f"a mask that is a {type(mask).__name__}: give an array, by jnp.asarray")
    if mask.shape != values.shape[:2]:
        raise ValueError(
            f"a mask of shape {mask.shape} for tokens of shape {values.shape}: give one entry "
            "for each token"
        )
    if jnp.issubdtype(mask.dtype, jnp.inexact):
        raise ValueError(f"a mask of type {mask.dtype}: give bool, such as mask > 0")
    return jnp.asarray(mask).astype(bool)

"""Streams: the residual streams of a batch, which pass from block to block."""

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
from thoughtbubbles.placement import AnyArray, broadcast_beside
from thoughtbubbles.short_repr import ShortRepr

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Streams(ShortRepr):
    """Residual streams of a batch, several per token, in the order of the text; dead slots last.

    `Streams` is the input and output of each block (arXiv 2510.00219). Because dead slots come
    last, a live stream never attends to a dead slot in plain causal attention over slots.

    Attributes:
        x: `[B, S, D]` residuals.
        log_score: `[B, S]` float32 cumulative log-score of each stream, 0 at the input.
        token: `[B, S]` int32, index of each stream's input token, non-decreasing over live slots.
        alive: `[B, S]` bool, whether the slot holds a stream.
        length: `[B]` int32, number of real tokens in each row.
        first: `[B]` int32, number of tokens of the sequence before the row's token 0; 0 except in
            cached decoding.
        num_tokens: Static number `T` of tokens of a row, padding on the right included.
        forked: Whether a fork layer came before (static); otherwise all log-scores are exactly 0.
        continued: Whether `first` was given (static), so that the row may have earlier tokens.
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
        x: Float[AnyArray, "B T D"],
        length: Int[AnyArray, " B"] | None = None,
        copies: int = 1,
        first: Int[AnyArray, " B"] | None = None,
    ) -> Streams:
        """Make the streams at the model's input: one per token, or `copies` equal streams (copy-k).

        Args:
            x: Residuals of the tokens, padded on the right.
            length: Number of real tokens in each row; all `T` by default.
            copies: Number of equal streams of each token.
            first: Number of tokens of the sequence before these tokens; 0 by default.

        Raises:
            ValueError: A shape or dtype is wrong, or a length is not from 0 to `T`. Lengths that
                `jit` traces are not checked here; `Fork.extend` makes rows of wrong lengths NaN.
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
        """Return the streams with some fields changed, as `dataclasses.replace` does.

        Args:
            changes: New values of the fields, such as `x`.

        Raises:
            TypeError: A name in `changes` is not a field.
            ValueError: New residuals have other rows or slots than the streams.
        """
        new = replaced(self, changes)
        # Leaves need not be arrays: a pytree of shardings has this class too.
        shape, streams = (getattr(part, "shape", None) for part in (new.x, new.token))
        if "x" in changes and shape and streams is not None and shape[:-1] != streams:
            raise ValueError(
                f"residuals of shape {shape} for streams {streams}: give [batch, streams, width] "
                "of these streams"
            )
        return new

    @property
    def original(self) -> Bool[Array, "B S"]:
        """Whether a slot holds its token's original, the rightmost live stream of the token."""
        # Not jnp.roll, which would compare the only stream of a row with itself.
        ends_bubble = self.token[:, :-1] != self.token[:, 1:]
        last = jnp.ones_like(self.alive[:, :1])
        return self.alive & jnp.concatenate([ends_bubble | ~self.alive[:, 1:], last], axis=1)

    def bubbles(self) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
        """Return each stream's distance in slots to its original, and the size of its bubble.

        A bubble is all streams of one token. Both results are int32. They are computed from the
        sorted token indices by running maxima and minima, without scatters or collectives.
        """
        slots = self.token.shape[1]
        slot = broadcast_beside(jnp.arange(slots), self.token, 2)
        ends = self.original
        starts = jnp.concatenate([jnp.ones_like(ends[:, :1]), ends[:, :-1]], axis=1)
        first = jax.lax.cummax(jnp.where(starts, slot, 0), axis=1)
        last = jax.lax.cummin(jnp.where(ends, slot, slots), axis=1, reverse=True)
        return last - slot, last - first + 1

    def positions(self, fractional: bool = True) -> Float[Array, "B S"]:
        """Compute float32 rotary positions (arXiv 2510.00219, App. D, eq. 13).

        The original of token `i` has position `i`, and the `p`-th fork to its left has position
        `i - p / n` in a bubble of `n` streams. With `fractional=False`, all streams of token `i`
        have position `i`.
        """
        whole, offset = self.split_positions(fractional)
        whole = whole.astype(jnp.float32)
        return whole if offset is None else whole + offset

    def split_positions(
        self, fractional: bool = True
    ) -> tuple[Int[Array, "B S"], Float[Array, "B S"] | None]:
        """Compute `positions` as int32 token positions and float32 fractions in (-1, 0].

        The two are separate because the float32 sum of a large position and a fraction would be
        rounded. With `fractional=False`, the fractions are None.
        """
        token = self.token + self.first[:, None]
        if not fractional:
            return token, None
        distance, size = self.bubbles()
        return jnp.where(self.alive, token, 0), jnp.where(self.alive, -(distance / size), 0.0)

    def score(self) -> Float[Array, "B S"]:
        """Return the float32 cumulative score p of each stream, from 0 to 1."""
        return jnp.exp(self.log_score)

    def attention_bias(self, head_dim: int | None = None) -> Float[Array, "B S"]:
        """Compute the float32 bias of each stream's key in the attention logits (eq. 8).

        The bias is to be added after the division of the logits by sqrt(K).

        Args:
            head_dim: Width K of a head, for the bias log p / sqrt(K) of the authors' code. None
                gives the bias log p, which multiplies the key's unnormalised attention probability
                by p.

        Raises:
            ValueError: `head_dim` is not an integer of at least 1.
        """
        if head_dim is not None and (
            np.ndim(head_dim) or not hasattr(head_dim, "__index__") or head_dim < 1
        ):
            raise ValueError(f"head_dim={head_dim!r} is below 1: give the width of a head, or None")
        return self.log_score * (1.0 if head_dim is None else head_dim**-0.5)

    def attenuate(self, values: Float[Array, "B S *rest"]) -> Float[Array, "B S *rest"]:
        """Multiply each stream's values by the stream's score p, in the dtype of the values.

        The paper scales attention values (eq. 8) and residual updates (eqs. 9-10) in this way.

        Raises:
            ValueError: The values have other rows or slots than the streams.
        """
        if jnp.shape(values)[:2] != self.log_score.shape:
            raise ValueError(
                f"values of shape {jnp.shape(values)} for streams {self.log_score.shape}: give "
                "[batch, streams, ...] of these streams"
            )
        score = self.score().reshape(self.log_score.shape + (1,) * (values.ndim - 2))
        return values * score.astype(values.dtype)

    def bubble_of(self, token: Int[AnyArray, " B"], max_bubble: int) -> Streams:
        """Select the streams of one token of each row, as rows of one token; dead slots come first.

        Args:
            token: Index of the selected token in each row.
            max_bubble: Static upper bound on the number of streams of a token, which is the number
                of slots of the result.

        Raises:
            ValueError: `token` is not `[B]`.
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
        """Draw the streams in HTML: each stream is a dot whose tooltip shows slot, score, position.

        `page().save("streams.html")` writes a page that needs no other file.

        Args:
            texts: Text of each token of each row, padding included; None shows token indices.

        Raises:
            ValueError: The arrays are traced, donated, not fully addressable or without a batch
                axis, or the number of texts is not the number of tokens.
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
    """Keyword arguments of `Streams.replace`, so that type checkers find misspelled fields."""

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
    """Whether the values of an array can be read: not traced, fully addressable, not donated."""
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
        given = value if hasattr(value, "dtype") else np.asarray(value)
        if given.shape != x.shape[:1]:
            raise ValueError(
                f"{name} of shape {given.shape} for {x.shape[0]} rows: give one number a row"
            )
        check_integer_type(name, given.dtype)
    if length is None or isinstance(length, Tracer):
        return
    lengths = np.asarray(length)
    if lengths.max(initial=0) > x.shape[1] or lengths.min(initial=0) < 0:
        raise ValueError(
            f"lengths {lengths.tolist()} of {x.shape[1]} tokens: choose 0 to {x.shape[1]}"
        )


def check_integer_type(name: str, dtype: Any) -> None:
    """Raise a ValueError unless `dtype` is an integer dtype.

    Args:
        name: Name of the array in the message.
        dtype: Dtype to check.
    """
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name} of type {dtype}: give integers, such as int32")

"""Streams: the one value that flows between blocks."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streams:
    """Residual streams of a batch, several per token, in reading order; dead slots stand last.

    Causal attention over slots is therefore enough: a live stream never sees a dead one.

    Attributes:
        x: `[B, S, D]` residuals.
        log_score: `[B, S]` float32 cumulative log-score, 0 at the input.
        token: `[B, S]` int32 index of the input token, non-decreasing over live slots.
        alive: `[B, S]` bool.
        length: `[B]` int32 number of real tokens in each row.
        num_tokens: `T`, static number of token places; shorter rows are padded on the right.
        first: `[B]` int32 tokens of the sequence before token 0 of the row (cached decoding).
        forked: static; false until the first fork layer, while all scores are exactly 0.
    """

    x: jax.Array
    log_score: jax.Array
    token: jax.Array
    alive: jax.Array
    length: jax.Array
    first: jax.Array
    num_tokens: int = dataclasses.field(metadata={"static": True})
    forked: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def start(
        cls,
        x: jax.Array,
        length: jax.Array | None = None,
        copies: int = 1,
        first: jax.Array | None = None,
    ) -> "Streams":
        """One stream per token from residuals `x [B, T, D]` (`copies` of each for copy-k).

        Args:
            x: residuals of right-padded rows.
            length: `[B]` number of real tokens in each row; all `T` if not given.
            copies: how many equal streams each token starts with.
            first: `[B]` tokens of the sequence before these; none if not given.
        """
        batch, num_tokens, _ = x.shape
        if length is None:
            length = jnp.full((batch,), num_tokens, jnp.int32)
        if first is None:
            first = jnp.zeros((batch,), jnp.int32)
        token = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), (batch, num_tokens))
        if copies > 1:
            x, token = jnp.repeat(x, copies, axis=1), jnp.repeat(token, copies, axis=1)
        log_score = jnp.zeros(token.shape, jnp.float32)
        return cls(x, log_score, token, token < length[:, None], length, first, num_tokens)

    def replace(self, **changes) -> "Streams":
        """The same streams with some fields changed, as `dataclasses.replace`."""
        return dataclasses.replace(self, **changes)

    @property
    def original(self) -> jax.Array:
        """`[B, S]` bool: the rightmost live stream of each token."""
        # A sentinel, not a roll: a roll would compare a one-stream row with itself.
        ends_bubble = self.token[:, :-1] != self.token[:, 1:]
        last = jnp.ones_like(self.alive[:, :1])
        return self.alive & jnp.concatenate([ends_bubble | ~self.alive[:, 1:], last], axis=1)

    def bubbles(self) -> tuple[jax.Array, jax.Array]:
        """`(place, size)`, `[B, S]` int32: steps left of the original, and streams in the bubble.

        Read off the sorted token index by running maxima; no scatter, no collective.
        """
        slots = self.token.shape[1]
        slot = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), self.token.shape)
        ends = self.original
        starts = jnp.concatenate([jnp.ones_like(ends[:, :1]), ends[:, :-1]], axis=1)
        first = jax.lax.cummax(jnp.where(starts, slot, 0), axis=1)
        last = jax.lax.cummin(jnp.where(ends, slot, slots), axis=1, reverse=True)
        return last - slot, last - first + 1

    def positions(self, fractional: bool = True) -> jax.Array:
        """`[B, S]` float32 rotary positions (arXiv 2510.00219, App. D, eq. 13).

        The original of token `i` sits at `i`, the `p`-th fork to its left at `i - p / n` for a
        bubble of `n` streams. With `fractional=False` all streams of token `i` sit at `i`.
        """
        token = (self.token + self.first[:, None]).astype(jnp.float32)
        if not fractional:
            return token
        place, size = self.bubbles()
        return jnp.where(self.alive, token - place / size, 0.0)

    def bubble_of(self, token: jax.Array, max_bubble: int) -> "Streams":
        """The bubble of one token per row, as streams of one-token rows (dead slots first).

        Args:
            token: `[B]` int32.
            max_bubble: static bound on the streams of one token.
        """
        slots = self.token.shape[1]
        mine = (self.token == token[:, None]) & self.alive
        last = slots - 1 - jnp.argmax(mine[:, ::-1], axis=1)
        slot = last[:, None] - jnp.arange(max_bubble - 1, -1, -1)
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


def left_align(tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Move the real tokens of each row to its start, in order.

    Args:
        tokens: `[B, T]` int32.
        mask: `[B, T]` bool, true for real tokens (padding may stand anywhere).

    Returns:
        aligned tokens `[B, T]`, lengths `[B]`, and `rank [B, T]`: where each place went.
    """
    order = jnp.argsort(~mask, axis=1, stable=True)
    length = mask.sum(axis=1, dtype=jnp.int32)
    rank = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return jnp.take_along_axis(tokens, order, axis=1), length, rank


def restore_alignment(values: jax.Array, mask: jax.Array, rank: jax.Array) -> jax.Array:
    """Undo `left_align` for per-token `values [B, T, ...]`; padded places become 0."""
    mask = mask.reshape(mask.shape + (1,) * (values.ndim - 2))
    rank = rank.reshape(rank.shape + (1,) * (values.ndim - 2))
    return jnp.where(mask, jnp.take_along_axis(values, rank, axis=1), 0)

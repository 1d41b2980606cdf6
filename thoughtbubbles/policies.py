"""Policies: which candidates of a fork layer live on."""

import dataclasses
import math
from fractions import Fraction
from typing import Protocol

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Candidates:
    """What a policy sees: two candidates for each of `S` streams, `[fork_0, keep_0, fork_1, ...]`.

    Attributes:
        log_score: `[B, 2S]` float32, cumulative log-score of each candidate.
        token: `[B, 2S]` int32, index of the input token that the candidate belongs to.
        alive: `[B, 2S]` bool, false for candidates of dead slots (they stand last).
        forced: `[B, 2S]` bool, candidates that must be kept: the keep candidate of each original.
        length: `[B]` int32, number of real tokens in the row.
        num_tokens: `T`, the static number of token places in a row.
    """

    log_score: jax.Array
    token: jax.Array
    alive: jax.Array
    forced: jax.Array
    length: jax.Array
    num_tokens: int = dataclasses.field(metadata={"static": True})


class Policy(Protocol):
    """Chooses candidates. Must keep every forced one and at most `capacity(T)` in all."""

    @property
    def causal(self) -> bool:
        """Whether the fate of a token's candidates depends on tokens up to it alone."""
        ...

    def capacity(self, num_tokens: int) -> int:
        """Static number of slots that a row of `num_tokens` tokens can fill."""
        ...

    def keep(self, candidates: Candidates) -> jax.Array:
        """Keep mask over the candidates, `[B, 2S]` bool."""
        ...


@dataclasses.dataclass(frozen=True)
class TopK:
    """The paper's policy: the best candidates of the whole row (arXiv 2510.00219, eqs. 4-6).

    It is **not causal**: scores of later tokens decide whether an earlier token's fork lives.

    Attributes:
        ratio: streams per token; a row of `n` tokens keeps `ceil(ratio * n)` streams.
        streams: a fixed budget of streams per row whatever its length, in place of the ratio.
    """

    ratio: float = 2.0
    streams: int | None = None

    def __post_init__(self):
        if not (math.isfinite(self.ratio) and self.ratio >= 1):
            raise ValueError(
                f"ratio={self.ratio} is below 1: every token needs a stream, choose 1 or more"
            )
        if self.streams is not None and self.streams < 1:
            raise ValueError(
                f"streams={self.streams} is below 1: choose the streams of a whole row"
            )

    @property
    def causal(self) -> bool:
        return False

    def capacity(self, num_tokens: int) -> int:
        if self.streams is None:
            return -(-self._fraction.numerator * num_tokens // self._fraction.denominator)
        if self.streams < num_tokens:
            raise ValueError(
                f"streams={self.streams} is less than the {num_tokens} tokens of a row: "
                "raise it, shorten the row, or use ratio"
            )
        return self.streams

    @property
    def _fraction(self) -> Fraction:
        # Exact, so that ratio 1.1 gives 11 streams for 10 tokens, not 12; small enough for int32.
        return Fraction(str(self.ratio)).limit_denominator(1000)

    def keep(self, candidates: Candidates) -> jax.Array:
        if self.streams is None:
            ratio = self._fraction
            budget = -(-ratio.numerator * candidates.length // ratio.denominator)
        else:
            budget = jnp.full_like(candidates.length, self.streams)
        keys = jnp.where(candidates.forced, jnp.inf, candidates.log_score)
        # NaN ranks first, so that it goes on to the loss instead of dying here unseen.
        keys = jnp.where(jnp.isnan(candidates.log_score), jnp.inf, keys)
        keys = jnp.where(candidates.alive, keys, -jnp.inf)
        budget = jnp.minimum(budget, candidates.alive.sum(axis=-1))
        return best(jax.lax.stop_gradient(keys), budget) & candidates.alive


def best(keys: jax.Array, count: jax.Array) -> jax.Array:
    """Mask of the `count [B]` largest `keys [B, N]` of each row; ties go to the lower index.

    By sorting rather than `lax.top_k`, which all-gathers a batch-sharded operand.
    """
    count = count[:, None]
    descending = -jnp.sort(-keys, axis=-1)
    last = jnp.take_along_axis(descending, jnp.maximum(count - 1, 0), axis=-1)
    above = keys > last
    tied = (keys == last) & (count > 0)
    room = count - above.sum(axis=-1, keepdims=True)
    return above | (tied & (jnp.cumsum(tied, axis=-1) <= room))

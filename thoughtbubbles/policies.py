"""Policies: which candidates of a fork layer live on."""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp

from thoughtbubbles.policy import Candidates, PolicyDefaults
from thoughtbubbles.ranking import NO_TOKEN, best, prefix_ranks, ranks_among

HIGHEST_THRESHOLD = 0.999
TRACKING_RATE = 0.05
UNBOUNDED = 2**30


@dataclasses.dataclass(frozen=True)
class TopK(PolicyDefaults):
    """The paper's policy: the best candidates of the whole row (arXiv 2510.00219, eqs. 4-6).

    It is **not causal**: scores of later tokens decide whether an earlier token's fork lives.

    Attributes:
        ratio: streams per token; a row of `n` tokens keeps `ceil(ratio * n)` streams.
        streams: a fixed budget of streams per row whatever its length, in place of the ratio.
    """

    ratio: float = 2.0
    streams: int | None = None

    def __post_init__(self):
        _check_ratio(self.ratio)
        if self.streams is not None and self.streams < 1:
            raise ValueError(
                f"streams={self.streams} is below 1: choose the streams of a whole row"
            )

    @property
    def causal(self) -> bool:
        return False

    def capacity(self, num_tokens: int) -> int:
        if self.streams is None:
            ratio = _fraction(self.ratio)
            return -(-ratio.numerator * num_tokens // ratio.denominator)
        if self.streams < num_tokens:
            raise ValueError(
                f"streams={self.streams} is less than the {num_tokens} tokens of a row: "
                "raise it, shorten the row, or use ratio"
            )
        return self.streams

    def keep(self, candidates: Candidates) -> jax.Array:
        if self.streams is None:
            ratio = _fraction(self.ratio)
            budget = -(-ratio.numerator * candidates.length // ratio.denominator)
        else:
            budget = jnp.full_like(candidates.length, self.streams)
        budget = jnp.minimum(budget, candidates.alive.sum(axis=-1))
        return best(_keys(candidates), budget) & candidates.alive


class Bucketed(PolicyDefaults):
    """What policies behind a token bucket (`grant`) have in common."""

    ratio: float
    burst: int

    @property
    def causal(self) -> bool:
        return True

    def capacity(self, num_tokens: int) -> int:
        return num_tokens + _extras(self.ratio, self.burst, num_tokens)


@dataclasses.dataclass(frozen=True)
class PrefixRank(Bucketed):
    """Wants a candidate iff it ranks within the budget of its own prefix; causal.

    A candidate of token `t` is wanted iff fewer than `floor(ratio * (t + 1))` candidates of tokens
    up to `t` score higher: what `TopK` would decide for the newest token of each prefix (but for
    rounding the budget down), made final. Wants then pass a token bucket (`grant`).

    Attributes:
        ratio: streams per token, at most, in every prefix.
        window: rank among the candidates of the last `window` tokens alone; all if None.
        burst: streams that the bucket may run ahead of `ratio`.
        noise: scale of the Gumbel noise on log-scores by which candidates are ranked in a forward
            pass that is given a key, as in pretraining (with 1, a draw without replacement in
            proportion to scores); evaluation and decoding rank by the scores alone.
    """

    ratio: float = 2.0
    window: int | None = None
    burst: int = 0
    noise: float = 0.0

    def __post_init__(self):
        _check_ratio(self.ratio)
        _check_burst(self.burst)
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} is below 1: choose tokens to rank among")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ValueError(f"noise={self.noise} scales noise on log-scores: choose 0 or more")

    def keep(self, candidates: Candidates) -> jax.Array:
        ranks = prefix_ranks(_ties(_keys(candidates)), self._tokens(candidates), self.window)
        return self._grant(candidates, ranks, jnp.zeros_like(candidates.length))[0]

    def explore(self, candidates: Candidates, key: jax.Array) -> Candidates:
        """Log-scores with Gumbel noise of scale `noise`."""
        if not self.noise:
            return candidates
        noise = jax.random.gumbel(key, candidates.log_score.shape)
        return dataclasses.replace(candidates, log_score=candidates.log_score + self.noise * noise)

    def memory(self, batch: int, num_candidates: int) -> "RankMemory":
        zeros = jnp.zeros((batch,), jnp.int32)
        key = jnp.full((batch, num_candidates), -jnp.inf)
        return RankMemory(zeros, key, jnp.full(key.shape, NO_TOKEN, jnp.int32), zeros)

    def keep_next(
        self, candidates: Candidates, memory: "RankMemory"
    ) -> tuple[jax.Array, "RankMemory"]:
        keys, token = _ties(_keys(candidates)), self._tokens(candidates)
        seen = dataclasses.replace(
            memory,
            key=append(memory.key, keys, memory.used, candidates.alive),
            token=append(memory.token, token, memory.used, candidates.alive),
            used=memory.used + candidates.alive.sum(axis=1, dtype=jnp.int32),
        )
        place = memory.used[:, None] + jnp.arange(keys.shape[1])
        if keys.shape[1] ** 2 > seen.key.shape[1]:
            ranks = prefix_ranks(seen.key, seen.token, self.window)
            ranks = jnp.take_along_axis(ranks, place, axis=1, mode="clip")
        else:
            ranks = ranks_among(seen.key, seen.token, keys, token, place, self.window)
        keep, granted = self._grant(candidates, ranks, memory.granted)
        return keep, dataclasses.replace(seen, granted=granted)

    def _tokens(self, candidates: Candidates) -> jax.Array:
        token = candidates.token + candidates.first[:, None]
        return jnp.where(candidates.alive, token, NO_TOKEN)

    def _grant(
        self, candidates: Candidates, ranks: jax.Array, granted: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        prefix = candidates.token + candidates.first[:, None] + 1
        if self.window is not None:
            prefix = jnp.minimum(prefix, self.window)
        ratio = _fraction(self.ratio)
        wanted = ranks < ratio.numerator * prefix // ratio.denominator
        return grant(candidates, wanted, self.ratio, self.burst, granted)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RankMemory:
    """What `PrefixRank` remembers of a row.

    Attributes:
        granted: `[B]` int32, streams beyond the forced ones so far.
        key: `[B, N]` float32, rank keys of all candidates so far (-inf where unused).
        token: `[B, N]` int32, their tokens' places in the sequence (`NO_TOKEN` where unused).
        used: `[B]` int32, how many there are.
    """

    granted: jax.Array
    key: jax.Array
    token: jax.Array
    used: jax.Array


@dataclasses.dataclass(frozen=True)
class Threshold(Bucketed):
    """Wants a candidate iff its score p exceeds the fork layer's threshold θ; causal.

    θ is state of the fork layer, not a parameter: in training it follows the score at which wants
    meet the budget (`meeting_point`), otherwise it is a constant. Wants pass a token bucket.

    Attributes:
        ratio: streams per token, at most, in every prefix.
        burst: streams that the bucket may run ahead of `ratio`.
        gate: give a kept candidate the score max(p - θ, 0) / (1 - θ) in place of p, so that a
            stream is born without weight. Forced candidates keep theirs. (The loss is continuous
            there with `score_bias="none"` and without fractional positions.)
        offset: added to θ: a dial at inference, positive for fewer streams.
    """

    ratio: float = 2.0
    burst: int = 0
    gate: bool = True
    offset: float = 0.0

    def __post_init__(self):
        _check_ratio(self.ratio)
        _check_burst(self.burst)
        if not -1 < self.offset < 1:
            raise ValueError(f"offset={self.offset} is added to a score: choose from -1 to 1")

    def keep(self, candidates: Candidates) -> jax.Array:
        return self.keep_next(candidates, self.memory(candidates.token.shape[0], 0))[0]

    def memory(self, batch: int, num_candidates: int) -> jax.Array:
        """`[B]` int32, streams granted so far beyond the forced ones."""
        del num_candidates
        return jnp.zeros((batch,), jnp.int32)

    def keep_next(self, candidates: Candidates, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Not "above": NaN is wanted, so that it goes on to the loss.
        wanted = ~(jnp.exp(candidates.log_score) <= self._threshold(candidates))
        return grant(candidates, wanted, self.ratio, self.burst, memory)

    def scores(self, candidates: Candidates) -> jax.Array:
        """Log-scores `[B, 2S]` that the kept candidates go on with."""
        if not self.gate:
            return candidates.log_score
        threshold = self._threshold(candidates)
        # Only candidates above θ have a gate; the others are replaced first, for the gradient.
        score = jnp.exp(candidates.log_score)
        above = (score > threshold) & ~candidates.forced
        score = jnp.where(above, score, (1 + threshold) / 2)
        gated = jnp.log(score - threshold) - jnp.log1p(-threshold)
        return jnp.where(above, gated, candidates.log_score)

    def init_tracked(self) -> float:
        return 0.0

    def track(self, candidates: Candidates) -> jax.Array | None:
        """θ one step of an exponential average nearer to where wants meet the budget."""
        threshold = candidates.threshold
        if threshold is None:
            return None
        return threshold + TRACKING_RATE * (self.meeting_point(candidates) - threshold)

    def meeting_point(self, candidates: Candidates) -> jax.Array:
        """Score p, a scalar, above which as many candidates lie as the budget has room for.

        Taken in each row (0 where all have room) and averaged over rows.
        """
        keys = jnp.where(candidates.alive & ~candidates.forced, candidates.log_score, -jnp.inf)
        descending = -jnp.sort(-jax.lax.stop_gradient(keys), axis=1)
        ratio = _fraction(self.ratio) - 1
        room = ratio.numerator * candidates.length // ratio.denominator
        place = jnp.minimum(room, keys.shape[1] - 1)[:, None]
        point = jnp.exp(jnp.take_along_axis(descending, place, axis=1)[:, 0])
        filled = candidates.length > 0
        point = jnp.where(filled & (room < keys.shape[1]), point, 0)
        return point.sum() / jnp.maximum(filled.sum(), 1)

    def _threshold(self, candidates: Candidates) -> jax.Array:
        if candidates.threshold is None:
            raise ValueError("Threshold needs candidates with a threshold: use it in a Fork")
        return jnp.clip(candidates.threshold + self.offset, 0, HIGHEST_THRESHOLD)


def grant(
    candidates: Candidates, wanted: jax.Array, ratio: float, burst: int, granted: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Token bucket: keep the wanted candidates that the budget of every prefix has room for.

    With `w_i` wants of token `i`, forced candidates being free of charge,
    `n_i = min(n_{i-1} + w_i, floor((ratio - 1) * (i + 1)) + burst)` is what tokens up to `i` got;
    token `i` keeps its `n_i - n_{i-1}` best-scored wants. The steps `n -> min(n + a, b)` compose,
    so one associative scan gives all `n_i`.

    Args:
        wanted: `[B, 2S]` bool.
        granted: `[B]` int32, `n` before the first of these tokens.

    Returns:
        keep mask `[B, 2S]`, and `n` after the last token `[B]`.
    """
    wanted = wanted & candidates.alive & ~candidates.forced
    budget = _extras(ratio, burst, candidates.token + candidates.first[:, None] + 1)
    budget = jnp.where(candidates.alive, budget, UNBOUNDED)

    def compose(step, then):
        return step[0] + then[0], jnp.minimum(step[1] + then[0], then[1])

    # One step for each candidate: those of a token have the same b, so w steps are one with a = w.
    steps = (wanted.astype(jnp.int32), budget)
    total, limit = jax.lax.associative_scan(compose, steps, axis=1)
    after = jnp.minimum(granted[:, None] + total, limit)
    before = jnp.concatenate([granted[:, None], after[:, :-1]], axis=1)
    # n never falls, so a token's first "before" and last "after" are found by running extremes.
    ends = candidates.token[:, :-1] != candidates.token[:, 1:]
    edge = jnp.ones_like(ends[:, :1])
    starts, ends = jnp.concatenate([edge, ends], axis=1), jnp.concatenate([ends, edge], axis=1)
    had = jax.lax.cummax(jnp.where(starts, before, 0), axis=1)
    has = jax.lax.cummin(jnp.where(ends, after, UNBOUNDED), axis=1, reverse=True)
    keep = wanted & (_place_in_token(candidates, wanted) < has - had)
    return keep | (candidates.forced & candidates.alive), after[:, -1]


def _place_in_token(candidates: Candidates, wanted: jax.Array) -> jax.Array:
    """`[B, 2S]` int32: how many wanted candidates of the same token rank before each."""
    batch, count = wanted.shape
    index = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
    keys = jnp.where(wanted, -_ties(_keys(candidates)), jnp.inf)
    token, _, order = jax.lax.sort((candidates.token, keys, index), dimension=1, num_keys=3)
    new_token = jnp.concatenate([index[:, :1] == 0, token[:, 1:] != token[:, :-1]], axis=1)
    place = index - jax.lax.cummax(jnp.where(new_token, index, 0), axis=1)
    return jax.lax.sort((order, place), dimension=1, num_keys=1)[1]


def append(stored: jax.Array, new: jax.Array, used: jax.Array, valid: jax.Array) -> jax.Array:
    """Rows `stored [B, N, ...]` with the valid entries of `new [B, M, ...]` from place `used [B]`.

    Valid entries of `valid [B, M]` stand first; what has no place is dropped.
    """

    def write(row, entries, start, mask):
        place = jnp.where(mask, start + jnp.arange(mask.shape[0]), row.shape[0])
        return row.at[place].set(entries, mode="drop")

    return jax.vmap(write)(stored, new.astype(stored.dtype), used, valid)


def _keys(candidates: Candidates) -> jax.Array:
    """Rank keys `[B, 2S]`: forced ones and NaN first, dead ones last."""
    keys = jnp.where(candidates.forced, jnp.inf, candidates.log_score)
    # NaN ranks first, so that it goes on to the loss instead of dying here unseen.
    keys = jnp.where(jnp.isnan(candidates.log_score), jnp.inf, keys)
    return jax.lax.stop_gradient(jnp.where(candidates.alive, keys, -jnp.inf))


def _ties(keys: jax.Array) -> jax.Array:
    """Keys to 1/1024: equal tokens can score the same, and float noise seldom decides then."""
    return jnp.round(keys * 1024) / 1024


def _check_ratio(ratio: float) -> None:
    if not (math.isfinite(ratio) and ratio >= 1):
        raise ValueError(f"ratio={ratio} is below 1: every token needs a stream, choose 1 or more")


def _check_burst(burst: int) -> None:
    if burst < 0:
        raise ValueError(f"burst={burst} is below 0: choose how many streams may come early")


def _fraction(ratio: float) -> Fraction:
    # Exact, so that ratio 1.1 gives 11 streams for 10 tokens, not 12; small enough for int32.
    return Fraction(str(ratio)).limit_denominator(1000)


def _extras(ratio: float, burst: int, tokens):
    """Streams beyond one for each of `tokens` that a token bucket allows."""
    extra = _fraction(ratio) - 1
    whole, rest = divmod(extra.numerator, extra.denominator)
    return whole * tokens + rest * tokens // extra.denominator + burst

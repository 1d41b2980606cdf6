"""Fork policies `TopK`, `PrefixRank` and `Threshold`: which candidates of a fork layer are kept."""

import dataclasses
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from thoughtbubbles.checks import check_fields
from thoughtbubbles.fields import LARGEST
from thoughtbubbles.placement import broadcast_beside
from thoughtbubbles.policy import Candidates, PolicyDefaults
from thoughtbubbles.ranking import NO_TOKEN, at_least, best, prefix_ranks, ranks_among
from thoughtbubbles.registry import Registry
from thoughtbubbles.short_repr import ShortRepr

HIGHEST_THRESHOLD = 0.999
TRACKING_RATE = 0.05
UNBOUNDED = 2**30


@dataclasses.dataclass(frozen=True)
class TopK(PolicyDefaults):
    """The paper's policy: keep the best candidates of the whole row (arXiv 2510.00219, eqs. 4-6).

    It is **not causal**: scores of later tokens decide whether an earlier token's fork is kept.

    Attributes:
        ratio: Streams per token, ρ; a row of `n` tokens keeps up to `ceil(ratio * n)` candidates.
        streams: Maximum number of streams per row of any length, which replaces the ratio; None
            uses the ratio.
    """

    ratio: float = 2.0
    streams: int | None = None

    def __post_init__(self):
        check_fields(self)
        _check_ratio(self.ratio)
        if self.streams is not None and self.streams > LARGEST:
            raise ValueError(f"streams={self.streams} is above {LARGEST}: choose less")
        if self.streams is not None and self.streams < 1:
            raise ValueError(
                f"streams={self.streams} is below 1: choose the number of streams of a row"
            )

    @property
    def causal(self) -> bool:
        return False

    def capacity(self, num_tokens: int) -> int:
        if self.streams is None:
            return -_times(-_fraction(self.ratio), num_tokens)
        if self.streams < num_tokens:
            raise ValueError(
                f"streams={self.streams} is less than the {num_tokens} tokens of a row: "
                "raise it, shorten the row, or use ratio"
            )
        return self.streams

    def keep(self, candidates: Candidates) -> jax.Array:
        if self.streams is None:
            budget = -_times(-_fraction(self.ratio), candidates.length)
        else:
            budget = jnp.full_like(candidates.length, self.streams)
        budget = jnp.minimum(budget, candidates.alive.sum(axis=-1))
        return best(_keys(candidates), budget) & candidates.alive


FEW_RANKED = 32
"""Number of new candidates above which ranks without a window are computed by sorting."""
LARGEST_RANKED = 2**17
"""Number of candidates above which `prefix_ranks` needs too much memory."""


class Bucketed(PolicyDefaults):
    """Base class of causal policies whose demand a token bucket limits (`grant`)."""

    ratio: float
    burst: int

    @property
    def causal(self) -> bool:
        return True

    def capacity(self, num_tokens: int) -> int:
        return num_tokens + _extras(self.ratio, self.burst, num_tokens)


@dataclasses.dataclass(frozen=True)
class PrefixRank(Bucketed):
    """Causal policy that keeps a candidate if its score ranks high among its own prefix.

    A candidate of token `t` is demanded if fewer than `floor(ratio * (t + 1))` candidates of tokens
    up to `t` score higher. `TopK` on the prefix that ends at token `t`, with its budget rounded
    down, would make the same choice for token `t`; later tokens never change it. A token bucket
    (`grant`) then limits the demanded candidates to the budget.

    Attributes:
        ratio: Streams per token, ρ; a prefix of `n` tokens keeps at most
            `floor(ratio * n) + burst` streams.
        window: Number of latest tokens whose candidates are ranked together, which also replaces
            `t + 1` once it is smaller; None ranks the candidates of all tokens so far.
        burst: Number of streams that a prefix may keep beyond `floor(ratio * n)`.
        noise: Scale of the Gumbel noise that is added to the log-scores for ranking if the forward
            pass gets a PRNG key, as in pretraining. A scale of 1 samples candidates without
            replacement in proportion to their scores. Evaluation and decoding add no noise.
    """

    ratio: float = 2.0
    window: int | None = None
    burst: int = 0
    noise: float = 0.0

    def __post_init__(self):
        check_fields(self)
        _check_ratio(self.ratio)
        _check_burst(self.burst)
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} is below 1: choose 1 token or more")
        if self.window is not None and self.window > LARGEST:
            raise ValueError(f"window={self.window} is above {LARGEST}: leave it out")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ValueError(f"noise={self.noise} scales noise: choose a finite number, 0 or more")
        _check_forks(self.ratio, self.window, self.burst)

    def keep(self, candidates: Candidates) -> jax.Array:
        ranks = prefix_ranks(_ties(_keys(candidates)), self._tokens(candidates), self.window)
        return self._grant(candidates, ranks, jnp.zeros_like(candidates.length))[0]

    def explore(self, candidates: Candidates, key: jax.Array) -> Candidates:
        """Return the candidates with Gumbel noise of scale `noise` added to their log-scores."""
        if not self.noise:
            return candidates
        noise = jax.random.gumbel(key, candidates.log_score.shape)
        return dataclasses.replace(candidates, log_score=candidates.log_score + self.noise * noise)

    def init_state(self, batch: int, num_candidates: int) -> "RankState":
        """Return the state before the first token, with capacity for `num_candidates`."""
        # Two arrays of zeros: one that occurs twice could not be donated.
        granted, used = (jnp.zeros((batch,), jnp.int32) for _ in range(2))
        key = jnp.full((batch, num_candidates), -jnp.inf)
        return RankState(granted, key, jnp.full(key.shape, NO_TOKEN, jnp.int32), used)

    def keep_next(
        self, candidates: Candidates, state: "RankState"
    ) -> tuple[jax.Array, "RankState"]:
        keys, token = _ties(_keys(candidates)), self._tokens(candidates)
        seen = dataclasses.replace(
            state,
            key=append(state.key, keys, state.used, candidates.alive),
            token=append(state.token, token, state.used, candidates.alive),
            used=state.used + candidates.alive.sum(axis=1, dtype=jnp.int32),
        )
        index = state.used[:, None] + jnp.arange(keys.shape[1])[None]
        new, total = keys.shape[1], seen.key.shape[1]
        if self.window is None and FEW_RANKED < new < total:
            # All earlier tokens compete, and win ties.
            ranks = prefix_ranks(keys, token) + at_least(state.key, state.used, keys)
        elif new**2 > total and total <= LARGEST_RANKED:
            ranks = prefix_ranks(seen.key, seen.token, self.window)
            ranks = jnp.take_along_axis(ranks, index, axis=1, mode="clip")
        else:
            ranks = ranks_among(seen.key, seen.token, keys, token, index, self.window)
        keep, granted = self._grant(candidates, ranks, state.granted)
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
        demand = ranks < _times(_fraction(self.ratio), prefix)
        return grant(candidates, demand, self.ratio, self.burst, granted)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class RankState(ShortRepr):
    """State of `PrefixRank` between consecutive parts of a row, with capacity for `N` candidates.

    Attributes:
        granted: `[B]` int32, number of unforced candidates kept so far.
        key: `[B, N]` float32, scores by which the candidates so far rank (-inf in unused entries).
        token: `[B, N]` int32, index in the sequence of each candidate's token (`NO_TOKEN` in unused
            entries).
        used: `[B]` int32, number of used entries.
    """

    granted: jax.Array
    key: jax.Array
    token: jax.Array
    used: jax.Array


@dataclasses.dataclass(frozen=True)
class Threshold(Bucketed):
    """Causal policy that keeps a candidate if its score p exceeds the fork layer's threshold θ.

    θ is state of the fork layer, not a trained parameter. During training, θ follows the score at
    which the demand equals the budget (`meeting_point`); otherwise θ is constant. A token bucket
    (`grant`) then limits the demanded candidates to the budget.

    Attributes:
        ratio: Streams per token, ρ; a prefix of `n` tokens keeps at most
            `floor(ratio * n) + burst` streams.
        burst: Number of streams that a prefix may keep beyond `floor(ratio * n)`.
        gate: Whether the score of a kept candidate becomes max(p - θ, 0) / (1 - θ), which is 0 at
            p = θ; the score of a forced candidate stays p. (With `score_bias="none"` and without
            fractional positions, the loss is then continuous where p crosses θ.)
        offset: Number added to θ at inference; a positive offset gives fewer streams.
    """

    ratio: float = 2.0
    burst: int = 0
    gate: bool = True
    offset: float = 0.0

    def __post_init__(self):
        check_fields(self)
        _check_ratio(self.ratio)
        _check_burst(self.burst)
        if not -1 < self.offset < 1:
            raise ValueError(f"offset={self.offset} is added to a score: choose from -1 to 1")

    def keep(self, candidates: Candidates) -> jax.Array:
        return self.keep_next(candidates, jnp.zeros_like(candidates.length))[0]

    def init_state(self, batch: int, num_candidates: int) -> jax.Array:
        """Return the number of unforced candidates kept before the first token, `[B]` zeros."""
        del num_candidates
        return jnp.zeros((batch,), jnp.int32)

    def keep_next(self, candidates: Candidates, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Not `>`: a NaN is demanded, so that it reaches the loss.
        demand = ~(jnp.exp(candidates.log_score) <= self._threshold(candidates))
        return grant(candidates, demand, self.ratio, self.burst, state)

    def scores(self, candidates: Candidates) -> jax.Array:
        """Return the log-scores `[B, 2S]` that kept candidates give their streams (see `gate`)."""
        if not self.gate:
            return candidates.log_score
        threshold = self._threshold(candidates)
        # Candidates up to θ are replaced before the logarithm, so that no gradient is NaN.
        score = jnp.exp(candidates.log_score)
        above = (score > threshold) & ~candidates.forced
        score = jnp.where(above, score, (1 + threshold) / 2)
        gated = jnp.log(score - threshold) - jnp.log1p(-threshold)
        return jnp.where(above, gated, candidates.log_score)

    def init_tracked(self) -> float:
        return 0.0

    def track(self, candidates: Candidates) -> jax.Array | None:
        """Return θ after one step of its exponential moving average of `meeting_point`."""
        threshold = candidates.threshold
        if threshold is None:
            return None
        return threshold + TRACKING_RATE * (self.meeting_point(candidates) - threshold)

    def meeting_point(self, candidates: Candidates) -> jax.Array:
        """Compute the threshold at which the demand equals the budget, a scalar score p.

        With a budget of `b` unforced candidates, the threshold of a row is the score of its
        `b + 1`-th best unforced candidate, or 0 if the row has no more than `b` unforced
        candidates. The result is the mean over rows that have tokens.
        """
        keys = jnp.where(candidates.alive & ~candidates.forced, candidates.log_score, -jnp.inf)
        descending = -jnp.sort(-jax.lax.stop_gradient(keys), axis=1)
        budget = _times(_fraction(self.ratio) - 1, candidates.length)
        next_best = jnp.minimum(budget, keys.shape[1] - 1)[:, None]
        point = jnp.exp(jnp.take_along_axis(descending, next_best, axis=1)[:, 0])
        filled = candidates.length > 0
        point = jnp.where(filled & (budget < keys.shape[1]), point, 0)
        return point.sum() / jnp.maximum(filled.sum(), 1)

    def _threshold(self, candidates: Candidates) -> jax.Array:
        if candidates.threshold is None:
            raise ValueError("Threshold needs Candidates.threshold: use it in a Fork")
        return jnp.clip(candidates.threshold + self.offset, 0, HIGHEST_THRESHOLD)


def grant(
    candidates: Candidates, demand: jax.Array, ratio: float, burst: int, granted: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Token bucket: keep as many demanded candidates as the budget of every prefix allows.

    Forced candidates are always kept and use no budget. Token `i` has `w_i` demanded candidates
    that are not forced. The prefix that ends at token `i` has the budget
    `b_i = floor((ratio - 1) * (i + 1)) + burst` and keeps `n_i = min(n_{i-1} + w_i, b_i)` unforced
    candidates. Token `i` therefore keeps its `n_i - n_{i-1}` demanded candidates with the best
    scores. Example of five tokens with a ratio of 1.5 and no burst:

        token i             0  1  2  3  4
        demand w_i          1  0  2  1  1
        budget b_i          0  1  1  2  2
        granted n_i         0  0  1  2  2
        kept n_i - n_{i-1}  0  0  1  1  0

    The budget that token 1 does not use pays for the better of token 2's two candidates. Two steps
    `n -> min(n + w, b)` compose to a step of the same form, so an associative scan computes all
    `n_i`.

    Args:
        candidates: Candidates of the tokens of each row.
        demand: `[B, 2S]` bool, whether the policy demands each candidate.
        ratio: Streams per token, ρ; a prefix of `n` tokens keeps at most
            `floor(ratio * n) + burst` streams.
        burst: Number of streams that a prefix may keep beyond `floor(ratio * n)`.
        granted: `[B]` int32, number of unforced candidates kept before the first token (`n_{-1}`).

    Returns:
        Keep mask `[B, 2S]` bool, and number of unforced candidates kept up to the last token, `[B]`
        int32.
    """
    demand = demand & candidates.alive & ~candidates.forced
    budget = _extras(ratio, burst, candidates.token + candidates.first[:, None] + 1)
    budget = jnp.where(candidates.alive, budget, UNBOUNDED)

    def compose(step, then):
        (added, limit), (added_then, limit_then) = step, then
        return added + added_then, jnp.minimum(limit + added_then, limit_then)

    # One step per candidate: the candidates of a token share the limit, and together add w_i.
    steps = (demand.astype(jnp.int32), budget)
    total, limit = jax.lax.associative_scan(compose, steps, axis=1)
    after = jnp.minimum(granted[:, None] + total, limit)
    before = jnp.concatenate([granted[:, None], after[:, :-1]], axis=1)
    # n never falls, so running extremes find n before a token's first and after its last candidate.
    changes = candidates.token[:, :-1] != candidates.token[:, 1:]
    edge = jnp.ones_like(changes[:, :1])
    is_first = jnp.concatenate([edge, changes], axis=1)
    is_last = jnp.concatenate([changes, edge], axis=1)
    n_before = jax.lax.cummax(jnp.where(is_first, before, 0), axis=1)
    n_after = jax.lax.cummin(jnp.where(is_last, after, UNBOUNDED), axis=1, reverse=True)
    keep = demand & (_rank_in_token(candidates, demand) < n_after - n_before)
    return keep | (candidates.forced & candidates.alive), after[:, -1]


def _rank_in_token(candidates: Candidates, demand: jax.Array) -> jax.Array:
    """`[B, 2S]` int32: rank of each candidate among the demanded candidates of its token."""
    index = broadcast_beside(jnp.arange(demand.shape[1]), candidates.token, 2)
    keys = jnp.where(demand, -_ties(_keys(candidates)), jnp.inf)
    token, _, order = jax.lax.sort((candidates.token, keys, index), dimension=1, num_keys=3)
    new_token = jnp.concatenate([index[:, :1] == 0, token[:, 1:] != token[:, :-1]], axis=1)
    rank = index - jax.lax.cummax(jnp.where(new_token, index, 0), axis=1)
    return jax.lax.sort((order, rank), dimension=1, num_keys=1)[1]


def append(stored: jax.Array, new: jax.Array, used: jax.Array, valid: jax.Array) -> jax.Array:
    """Write new entries after the used entries of each row; entries that do not fit are dropped.

    Args:
        stored: `[B, N, ...]` entries, of which the first `used` of each row are used.
        new: `[B, M, ...]` entries to append.
        used: `[B]` int32, number of used entries.
        valid: `[B, M]` bool, whether to append each entry of `new`; invalid entries must come last.
    """

    def write(row, entries, start, mask):
        index = jnp.where(mask, start + jnp.arange(mask.shape[0]), row.shape[0])
        return row.at[index].set(entries, mode="drop")

    return jax.vmap(write)(stored, new.astype(stored.dtype), used, valid)


def _keys(candidates: Candidates) -> jax.Array:
    """Sort keys `[B, 2S]`, larger for better: forced candidates and NaN +inf, dead ones -inf."""
    keys = jnp.where(candidates.forced, jnp.inf, candidates.log_score)
    # A NaN ranks first, so that it reaches the loss instead of being dropped unseen.
    keys = jnp.where(jnp.isnan(candidates.log_score), jnp.inf, keys)
    return jax.lax.stop_gradient(jnp.where(candidates.alive, keys, -jnp.inf))


def _ties(keys: jax.Array) -> jax.Array:
    """Round keys to 1/1024, so that float noise seldom breaks ties between equal tokens."""
    return jnp.round(keys * 1024) / 1024


_LARGEST_RATIO = 1000  # so that budgets of a row fit 32 bits


def _check_ratio(ratio: float) -> None:
    if not (math.isfinite(ratio) and ratio >= 1):
        raise ValueError(f"ratio={ratio} is below 1: every token needs a stream, choose 1 or more")
    if ratio > _LARGEST_RATIO:
        raise ValueError(f"ratio={ratio} is above {_LARGEST_RATIO} streams of a token: choose less")


def _check_forks(ratio: float, window: int | None, burst: int) -> None:
    """Raise a ValueError if originals use up the budget, unless only `ratio=1` is the cause."""
    extra = _fraction(ratio) - 1
    if extra == 0 and burst:
        raise ValueError(
            f"burst={burst} with ratio={ratio} never forks, as originals use up the budget: "
            "choose a ratio above 1, or burst=0"
        )
    if extra > 0 and window is not None and extra * window < 1:
        raise ValueError(
            f"window={window} with ratio={ratio} never forks, as its originals use up "
            f"floor({ratio} * {window}) = {window} streams: choose a window of "
            f"{math.ceil(1 / extra)} or more"
        )


def _check_burst(burst: int) -> None:
    if burst < 0:
        raise ValueError(f"burst={burst} is below 0: choose a number of streams, 0 or more")
    if burst > UNBOUNDED:  # a budget is the sum of the burst and a multiple of the tokens
        raise ValueError(f"burst={burst} is above {UNBOUNDED}: choose less")


def _fraction(ratio: float) -> Fraction:
    # Exact, so that ratio 1.1 gives 11 streams for 10 tokens, not 12; small enough for int32.
    return Fraction(str(ratio)).limit_denominator(1000)


def _extras(ratio: float, burst: int, tokens):
    """Maximum number of streams that `tokens` tokens may have beyond their originals."""
    return _times(_fraction(ratio) - 1, tokens) + burst


def _times(ratio: Fraction, tokens):
    """Compute floor(ratio * tokens); whole part and rest of the ratio apart, to fit 32 bits."""
    whole, rest = divmod(ratio.numerator, ratio.denominator)
    return whole * tokens + rest * tokens // ratio.denominator


POLICIES = Registry[Any](
    "policy", {policy.__name__: policy for policy in (TopK, PrefixRank, Threshold)}
)
"""Fork policies that configs can name, by class name."""

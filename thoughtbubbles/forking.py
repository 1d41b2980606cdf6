"""Forking as pure functions: score, plan, fork, merge (arXiv 2510.00219, eqs. 1-6 and 11)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from thoughtbubbles.policy import Candidates, Policy
from thoughtbubbles.streams import Streams

Merge = Literal["probability", "residual", "rightmost"]
LOWEST_LOG_SCORE = -20.0
GATE_UNIT = 10.0
LOWEST_GATE = 1e-12


def candidate_log_scores(
    score_logits: jax.Array, log_score: jax.Array, gate: jax.Array | None = None
) -> jax.Array:
    """Cumulative log-scores of the candidates (eqs. 1-3), always in float32.

    Args:
        score_logits: `[B, S, 2]`, fork in column 0 and keep in column 1.
        log_score: `[B, S]` cumulative log-score of the streams.
        gate: scalar; `GATE_UNIT` times its magnitude multiplies the score of every fork.

    Returns:
        `[B, 2S]` in candidate order `[fork_0, keep_0, fork_1, keep_1, ...]`.
    """
    own = jax.nn.log_sigmoid(score_logits.astype(jnp.float32))
    own = jnp.maximum(own, LOWEST_LOG_SCORE)
    if gate is not None:
        # The magnitude, so that a step of the optimizer over 0 shuts no gate for ever; in units,
        # so that it moves as far in a step as the scores do, which are sums over the width.
        log_gate = jnp.log(jnp.maximum(GATE_UNIT * jnp.abs(gate), LOWEST_GATE))
        own = own + jnp.stack([log_gate, jnp.zeros_like(log_gate)])
    cumulative = log_score[..., None] + own
    return cumulative.reshape(cumulative.shape[0], -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForkPlan:
    """Where each new slot comes from, and where each candidate went.

    Attributes:
        source: `[B, S']` int32, the candidate in each new slot (0 where dead).
        slot: `[B, 2S]` int32, the new slot of each candidate (meaningless where not kept).
        kept: `[B, 2S]` bool.
        alive: `[B, S']` bool, the filled slots.
    """

    source: jax.Array
    slot: jax.Array
    kept: jax.Array
    alive: jax.Array


def candidates_of(
    streams: Streams,
    log_scores: jax.Array,
    forced_keep: bool = True,
    threshold: jax.Array | None = None,
) -> Candidates:
    """What a policy sees of the streams.

    Args:
        streams: `S` streams a row.
        log_scores: `[B, 2S]` from `candidate_log_scores`.
        forced_keep: keep every original whatever its score (eq. 4).
        threshold: the fork layer's, for policies that have one.
    """
    twice = lambda values: jnp.repeat(values, 2, axis=1)  # noqa: E731
    is_keep = jnp.arange(log_scores.shape[1]) % 2 == 1
    return Candidates(
        log_scores,
        twice(streams.token),
        alive=twice(streams.alive),
        forced=twice(streams.original) & is_keep & forced_keep,
        length=streams.length,
        first=streams.first,
        num_tokens=streams.num_tokens,
        threshold=threshold,
    )


def plan_fork(
    streams: Streams, log_scores: jax.Array, policy: Policy, forced_keep: bool = True
) -> ForkPlan:
    """Let the policy choose among the candidates and compact the kept ones, order preserved.

    Args:
        streams: `S` streams a row.
        log_scores: `[B, 2S]` from `candidate_log_scores`.
        policy: what decides.
        forced_keep: keep every original whatever its score (eq. 4).
    """
    keep = policy.keep(candidates_of(streams, log_scores, forced_keep))
    return compact(keep, min(keep.shape[1], policy.capacity(streams.num_tokens)))


def compact(keep: jax.Array, slots: int) -> ForkPlan:
    """Plan that puts the candidates of the mask `keep [B, N]` into the first of `slots` slots."""
    slot = jnp.cumsum(keep, axis=1, dtype=jnp.int32) - 1
    kept = keep & (slot < slots)
    candidate = jnp.arange(keep.shape[1], dtype=jnp.int32)
    source = jnp.sort(jnp.where(kept, candidate, keep.shape[1]), axis=1)[:, :slots]
    alive = source < keep.shape[1]
    return ForkPlan(jnp.where(alive, source, 0), slot, kept, alive)


def fork(
    streams: Streams, log_scores: jax.Array, plan: ForkPlan, embedding: jax.Array | None
) -> Streams:
    """Carry out a plan: forks copy their parent's residual plus the fork embedding (eq. 6).

    Args:
        streams: `S` streams a row.
        log_scores: `[B, 2S]` cumulative log-scores of the candidates.
        plan: `S'` slots a row.
        embedding: `[D]` added to forks, or None.

    Returns:
        `S'` streams a row.
    """
    batch, slots = streams.token.shape
    parent = plan.source // 2
    per_parent = (batch, slots, 2)
    x = take(streams.x, parent, plan.slot.reshape(per_parent), plan.kept.reshape(per_parent))
    if embedding is not None:
        is_fork = (plan.source % 2 == 0)[..., None]
        x = jnp.where(is_fork, x + embedding.astype(x.dtype), x)
    log_score = take(log_scores, plan.source, plan.slot[..., None], plan.kept[..., None])
    return dataclasses.replace(
        streams,
        x=jnp.where(plan.alive[..., None], x, 0),
        log_score=jnp.where(plan.alive, log_score, 0.0),
        token=jnp.take_along_axis(streams.token, parent, axis=1),
        alive=plan.alive,
        forked=True,
    )


@jax.custom_vjp
def take(values: jax.Array, index: jax.Array, inverse: jax.Array, used: jax.Array) -> jax.Array:
    """Gather along axis 1 whose gradient is a gather too, never a scatter.

    Args:
        values: `[B, N]` or `[B, N, D]`.
        index: `[B, M]` int32.
        inverse: `[B, N, R]` int32, the up to `R` places of the result that each value went to.
        used: `[B, N, R]` bool, which of them are meant; other places of the result get no gradient.

    Returns:
        `[B, M]` or `[B, M, D]`.
    """
    del inverse, used
    return _gather(values, index)


def _gather(values: jax.Array, index: jax.Array) -> jax.Array:
    # take_along_axis, not values[arange[:, None], index]: the latter all-gathers a sharded batch.
    return jnp.take_along_axis(values, index if values.ndim == 2 else index[..., None], axis=1)


def _take_forward(values, index, inverse, used):
    return _gather(values, index), (inverse, used)


def _take_backward(residuals, gradient):
    inverse, used = residuals
    total = 0
    for copy in range(inverse.shape[-1]):
        mask = used[..., copy] if gradient.ndim == 2 else used[..., copy, None]
        total = total + jnp.where(mask, _gather(gradient, inverse[..., copy]), 0)
    return total, None, None, None


take.defvjp(_take_forward, _take_backward)


def merge(streams: Streams, kind: Merge = "residual") -> jax.Array:
    """Bubble to one residual per token, `[B, T, D]`; 0 for a token without live streams.

    Args:
        streams: the streams after the last block.
        kind: `"residual"` sums residuals weighted by their scores p (a sum, not a mean: the norm
            before the head takes the scale out); `"rightmost"` takes the original.
    """
    if not streams.forked and streams.x.shape[1] == streams.num_tokens:
        return jnp.where(streams.alive[..., None], streams.x, 0)
    if kind == "residual":
        weight = jnp.exp(streams.log_score)
    elif kind == "rightmost":
        weight = streams.original.astype(jnp.float32)
    else:
        raise ValueError(
            f"merge={kind!r} has no residual: use 'residual', 'rightmost' or merge_log_probs"
        )
    weights = jnp.where(membership(streams), weight[:, None, :], 0).astype(streams.x.dtype)
    # The highest precision makes the rightmost stream an exact copy on every backend.
    merged = jnp.einsum("bts,bsd->btd", weights, streams.x, precision=jax.lax.Precision.HIGHEST)
    return merged.astype(streams.x.dtype)


def membership(streams: Streams) -> jax.Array:
    """`[B, T, S]` bool: whether live stream `s` belongs to token `t`."""
    token = jnp.arange(streams.num_tokens, dtype=jnp.int32)[:, None]
    return (streams.token[:, None, :] == token) & streams.alive[:, None, :]


def merge_log_prob(streams: Streams, log_prob: jax.Array, vocab_size: int) -> jax.Array:
    """Mixture of the streams' predictions for one outcome per token (eq. 11), in log space.

    Args:
        streams: the streams after the last block.
        log_prob: `[B, S]` float32, each stream's log-probability of its token's outcome.
        vocab_size: a token without live streams predicts uniformly.

    Returns:
        `[B, T]` float32: log of sum(p_j q_j) / sum(p_j) over the bubble of each token.
    """
    members = membership(streams)
    joint = _masked_logsumexp(members, streams.log_score + log_prob)
    total = _masked_logsumexp(members, streams.log_score)
    return jnp.where(members.any(axis=-1), joint - total, -jnp.log(float(vocab_size)))


def _masked_logsumexp(members: jax.Array, values: jax.Array) -> jax.Array:
    any_member = members.any(axis=-1)
    peak = jnp.where(members, jax.lax.stop_gradient(values)[:, None, :], -jnp.inf).max(axis=-1)
    peak = jnp.where(any_member, peak, 0.0)
    shifted = jnp.where(members, values[:, None, :] - peak[..., None], -jnp.inf)
    total = jnp.where(members, jnp.exp(shifted), 0.0).sum(axis=-1)
    return jnp.log(jnp.where(any_member, total, 1.0)) + peak


def merge_log_probs(streams: Streams, log_probs: jax.Array, max_bubble: int) -> jax.Array:
    """Mixture of the streams' whole predictions (eq. 11), `[B, T, V]` float32 log-probabilities.

    Args:
        streams: the streams after the last block.
        log_probs: `[B, S, V]` float32 log-probabilities of each stream.
        max_bubble: static bound on the streams of one token (2 ** fork layers, at most S).
    """
    members = membership(streams)
    count = members.sum(axis=-1)
    last = streams.token.shape[1] - 1 - jnp.argmax(members[..., ::-1], axis=-1)
    terms, weights = [], []
    for place in range(max_bubble):
        slot = jnp.maximum(last - place, 0)
        # The first weight is finite, so that no term of a gradient is NaN.
        weight = _gather(streams.log_score, slot)
        weights.append(jnp.where(place < jnp.maximum(count, 1), weight, -jnp.inf))
        terms.append(weights[-1][..., None] + _gather(log_probs, slot))
    mixture, total = _log_add_exp(terms), _log_add_exp(weights)
    uniform = -jnp.log(float(log_probs.shape[-1]))
    return jnp.where((count > 0)[..., None], mixture - total[..., None], uniform)


def _log_add_exp(terms: Sequence[jax.Array]) -> jax.Array:
    """Elementwise log-sum-exp of arrays of one shape, without stacking them in memory."""
    peak = jax.lax.stop_gradient(functools.reduce(jnp.maximum, terms))
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)  # an outcome that no stream thinks possible
    return jnp.log(sum(jnp.exp(term - peak) for term in terms)) + peak

"""Pure functions that score, fork and merge streams (arXiv 2510.00219, eqs. 1-6 and 11)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from thoughtbubbles.placement import zeros_beside
from thoughtbubbles.policy import Candidates, Policy
from thoughtbubbles.short_repr import ShortRepr
from thoughtbubbles.streams import Streams

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int

LOWEST_LOG_SCORE = -20.0
GATE_UNIT = 10.0
LOWEST_GATE = 1e-12
LARGEST_MEMBERSHIP = 2**18
"""Maximum number of tokens times slots per row for merges by a matrix `[T, S]`; longer rows are
merged without the matrix."""


def candidate_log_scores(
    score_logits: Float[Array, "B S 2"],
    log_score: Float[Array, "B S"],
    gate: Float[Array, ""] | None = None,
) -> Float[Array, "B 2*S"]:
    """Compute cumulative log-scores of the fork and keep candidates (eqs. 1-3) in float32.

    Args:
        score_logits: Score logits of each stream: the fork logit at index 0, the keep logit at 1.
        log_score: Cumulative log-score of each stream.
        gate: Learned scalar whose magnitude times `GATE_UNIT` multiplies the score p of every fork;
            None for no such factor.

    Returns:
        Cumulative log-scores of the candidates in the order `[fork_0, keep_0, fork_1, keep_1, ...]`
        of streams.
    """
    own = jax.nn.log_sigmoid(score_logits.astype(jnp.float32))
    own = jnp.maximum(own, LOWEST_LOG_SCORE)
    if gate is not None:
        # The magnitude, so that an optimizer step across 0 can't close the gate for good; the unit,
        # so that a step changes the gate as much as the scores, which are sums over the width.
        log_gate = jnp.log(jnp.maximum(GATE_UNIT * jnp.abs(gate), LOWEST_GATE))
        own = own + jnp.stack([log_gate, jnp.zeros_like(log_gate)])[None, None]
    cumulative = log_score[..., None] + own
    return cumulative.reshape(cumulative.shape[0], -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ForkPlan(ShortRepr):
    """Assignment of the kept candidates, out of `2S`, to `S'` new slots, and its inverse.

    Candidate `2s` is the fork of the stream in slot `s`, candidate `2s + 1` is its keep.

    Attributes:
        source: `[B, S']` int32, index of the candidate in each new slot; 0 for a dead slot.
        slot: `[B, 2S]` int32, new slot of each candidate; arbitrary if the candidate is not kept.
        kept: `[B, 2S]` bool, whether each candidate is kept.
        alive: `[B, S']` bool, whether each new slot holds a stream.
    """

    source: jax.Array
    slot: jax.Array
    kept: jax.Array
    alive: jax.Array


def candidates_of(
    streams: Streams,
    log_scores: Float[Array, "B 2*S"],
    forced_keep: bool = True,
    threshold: Float[Array, ""] | None = None,
) -> Candidates:
    """Make the input of a fork policy: the fork and keep candidate of each stream, with scores.

    Args:
        streams: Streams before the fork layer, `S` slots per row.
        log_scores: Cumulative log-scores in the order `[fork_0, keep_0, fork_1, keep_1, ...]`
            (`candidate_log_scores`).
        forced_keep: Whether every original is kept regardless of its score (eq. 4).
        threshold: Threshold that the fork layer tracks; None if the policy tracks no threshold.
    """
    twice = lambda values: jnp.repeat(values, 2, axis=1)  # noqa: E731
    is_keep = (jnp.arange(log_scores.shape[1]) % 2 == 1)[None]
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
    streams: Streams, log_scores: Float[Array, "B 2*S"], policy: Policy, forced_keep: bool = True
) -> ForkPlan:
    """Select candidates with a fork policy, and assign the kept candidates to new slots in order.

    Args:
        streams: Streams before the fork layer, `S` slots per row.
        log_scores: Cumulative log-scores in the order `[fork_0, keep_0, fork_1, keep_1, ...]`
            (`candidate_log_scores`).
        policy: Fork policy that selects the candidates to keep.
        forced_keep: Whether every original is kept regardless of its score (eq. 4).

    Returns:
        Plan to pass to `fork`.
    """
    keep = policy.keep(candidates_of(streams, log_scores, forced_keep))
    return compact(keep, min(keep.shape[1], policy.capacity(streams.num_tokens)))


def compact(keep: Bool[Array, "B N"], slots: int) -> ForkPlan:
    """Assign the candidates to keep, in order, to the first of `slots` new slots per row.

    Args:
        keep: Whether each of `N` candidates is to be kept; candidates that do not fit are dropped.
        slots: Number of new slots per row.
    """
    slot = jnp.cumsum(keep, axis=1, dtype=jnp.int32) - 1
    kept = keep & (slot < slots)
    candidate = jnp.arange(keep.shape[1], dtype=jnp.int32)[None]
    source = jnp.sort(jnp.where(kept, candidate, keep.shape[1]), axis=1)[:, :slots]
    alive = source < keep.shape[1]
    return ForkPlan(jnp.where(alive, source, 0), slot, kept, alive)


def fork(
    streams: Streams,
    log_scores: Float[Array, "B 2*S"],
    plan: ForkPlan,
    embedding: Float[Array, " D"] | None,
) -> Streams:
    """Fork streams by a plan: a fork is its parent's residual plus the fork embedding (eq. 6).

    Args:
        streams: Streams before the fork layer, `S` slots per row.
        log_scores: Cumulative log-scores of the candidates, which the kept candidates retain.
        plan: Assignment of candidates to `S'` new slots per row (`plan_fork`).
        embedding: Fork embedding; None adds nothing to forks.

    Returns:
        Streams after the fork layer, `S'` slots per row.
    """
    batch, slots = streams.token.shape
    parent = plan.source // 2
    per_parent = (batch, slots, 2)
    x = take(streams.x, parent, plan.slot.reshape(per_parent), plan.kept.reshape(per_parent))
    if embedding is not None:
        is_fork = (plan.source % 2 == 0)[..., None]
        x = jnp.where(is_fork, x + embedding.astype(x.dtype)[None, None], x)
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
def take(
    values: Float[Array, "B N *D"],
    index: Int[Array, "B M"],
    inverse: Int[Array, "B N R"],
    used: Bool[Array, "B N R"],
) -> Float[Array, "B M *D"]:
    """Gather values along axis 1, with a backward pass that gathers too instead of scattering.

    Args:
        values: `N` scalars or vectors per row.
        index: Index into `values` for each of the `M` entries of the result.
        inverse: Indices of the result entries, at most `R`, to which each value is copied.
        used: Whether each index in `inverse` is valid. A result entry without a valid index in
            `inverse` passes no gradient to its value.
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


def merge(
    streams: Streams,
    kind: Literal["residual", "rightmost"] = "residual",
    max_bubble: int | None = None,
) -> Float[Array, "B T D"]:
    """Merge the streams of each token into one residual; 0 for a token without live streams.

    Args:
        streams: Streams after the last block.
        kind: Kind of the merge. "residual" sums the residuals, weighted by their scores p (not a
            mean, because the norm before the LM head removes the scale); "rightmost" takes the
            residual of the original.
        max_bubble: Static upper bound on the number of streams of a token; `S` by default.

    Raises:
        ValueError: `kind` is unknown, such as "probability", which merges predictions instead of
            residuals (`merge_log_probs`), or `streams` are not `Streams`.
    """
    if not isinstance(streams, Streams):
        shape = getattr(streams, "shape", type(streams).__name__)
        raise ValueError(f"merge takes Streams, not {shape}: Streams.start(x)")
    if kind not in ("residual", "rightmost"):
        raise ValueError(
            f"merge={kind!r} has no residual: use 'residual', 'rightmost' or merge_log_probs"
        )
    if not streams.forked and streams.x.shape[1] == streams.num_tokens:
        return jnp.where(streams.alive[..., None], streams.x, 0)
    is_sum, dtype = kind == "residual", streams.x.dtype
    weight = jnp.exp(streams.log_score) if is_sum else streams.original.astype(jnp.float32)
    if _is_long(streams):
        if not is_sum:
            return _last_of_bubble(streams, streams.x)
        weighted = (
            streams.x.astype(jnp.float32) * weight.astype(dtype).astype(jnp.float32)[..., None]
        )
        return bubble_sum(streams, weighted, max_bubble).astype(dtype)
    weights = jnp.where(membership(streams), weight[:, None, :], 0).astype(dtype)
    # The highest precision makes the rightmost stream an exact copy on every backend.
    merged = jnp.einsum("bts,bsd->btd", weights, streams.x, precision=jax.lax.Precision.HIGHEST)
    return merged.astype(dtype)


def membership(streams: Streams) -> Bool[Array, "B T S"]:
    """Return a mask that tells whether slot `s` holds a live stream of token `t`."""
    token = jnp.arange(streams.num_tokens, dtype=jnp.int32)[None, :, None]
    return (streams.token[:, None, :] == token) & streams.alive[:, None, :]


def bubble_sum(
    streams: Streams, values: Float[Array, "B S *D"], max_bubble: int | None = None
) -> Float[Array, "B T *D"]:
    """Sum values over the live streams of each token, in time and memory O(S log max_bubble).

    Args:
        streams: Streams of rows of several tokens, with dead slots last.
        values: Scalar or vector of each stream; those of dead slots are ignored.
        max_bubble: Static upper bound on the number of streams of a token; `S` by default.

    Returns:
        Sum for each token, 0 for a token without live streams.
    """
    return _last_of_bubble(streams, _over_bubble(streams, values, jnp.add, 0.0, max_bubble))


def _is_long(streams: Streams) -> bool:
    """Whether a merge avoids arrays `[T, S]` and therefore sums in another order."""
    return streams.num_tokens * streams.token.shape[1] > LARGEST_MEMBERSHIP


def _over_bubble(streams, values, combine, neutral, max_bubble):
    """Scan within bubbles: combine the values of a slot's token up to that slot, by doubling."""
    extra = [(0, 0)] * (values.ndim - 2)
    values = jnp.where(_beside(streams.alive, values), values, neutral)
    reach = 1
    while reach < min(max_bubble or values.shape[1], values.shape[1]):
        shift = [(0, 0), (reach, 0)]
        same = (streams.token[:, reach:] == streams.token[:, :-reach]) & streams.alive[:, reach:]
        earlier = jnp.pad(values[:, :-reach], shift + extra, constant_values=neutral)
        same = _beside(jnp.pad(same, shift), values)
        values = combine(values, jnp.where(same, earlier, neutral))
        reach *= 2
    return values


def _last_of_bubble(streams: Streams, values: jax.Array) -> jax.Array:
    """Return the value of each token's rightmost live stream; 0 without live streams."""
    last, count = bubble_ends(streams)
    used = streams.original[..., None]
    picked = take(values, jnp.maximum(last, 0), streams.token[..., None], used)
    return jnp.where(_beside(count > 0, picked), picked, 0)


def _beside(mask: jax.Array, values: jax.Array) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (values.ndim - 2))


def bubble_ends(streams: Streams) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Return the slot of each token's rightmost live stream, and its number of live streams.

    For a token without live streams, the slot is arbitrary and may be -1.
    """
    slots = streams.token.shape[1]
    if streams.num_tokens == 1:  # dead slots may come first (Streams.bubble_of)
        last = slots - 1 - jnp.argmax(streams.alive[:, ::-1], axis=1)
        return last[:, None], streams.alive.sum(axis=1, dtype=jnp.int32)[:, None]
    token = jnp.where(streams.alive, streams.token, streams.num_tokens)
    ends = _counts_up_to(token, streams.num_tokens)
    return ends - 1, ends - jnp.pad(ends[:, :-1], ((0, 0), (1, 0)))


def _counts_up_to(rows: Int[Array, "B S"], bound: int) -> Int[Array, "B bound"]:
    """Count the entries of each sorted row that are at most `i`, for each `i` below a bound.

    This is a bisection like `jnp.searchsorted`, whose `vmap` fails with `AxisType.Explicit` axes.
    """
    size = rows.shape[1]
    value = jnp.arange(bound, dtype=jnp.int32)[None]
    rounds = size.bit_length()

    def advance(index: jax.Array, count: jax.Array) -> jax.Array:
        probe = count + jnp.right_shift(1 << (rounds - 1), index)
        is_in = _gather(rows, jnp.minimum(probe, size) - 1) <= value
        return jnp.where((probe <= size) & is_in, probe, count)

    start = zeros_beside(rows, (rows.shape[0], bound), jnp.int32)
    return jax.lax.fori_loop(0, rounds, advance, start)


def merge_log_prob(
    streams: Streams,
    log_prob: Float[Array, "B S"],
    vocab_size: int,
    max_bubble: int | None = None,
) -> Float[Array, "B T"]:
    """Mix the streams' predictions of one target per token: its mixture log-probability (eq. 11).

    Args:
        streams: Streams after the last block.
        log_prob: Float32 log-probability that each stream assigns to the target of its token.
        vocab_size: Size of the vocabulary; a token without live streams predicts uniformly.
        max_bubble: Static upper bound on the number of streams of a token; `S` by default.

    Returns:
        Float32 log(sum(p_j q_j) / sum(p_j)) over the live streams j of each token, where p_j is the
        score of a stream and q_j the probability that the stream assigns to the target.
    """
    if _is_long(streams):
        joint = _bubble_logsumexp(streams, streams.log_score + log_prob, max_bubble)
        total = _bubble_logsumexp(streams, streams.log_score, max_bubble)
        found = bubble_ends(streams)[1] > 0
    else:
        members = membership(streams)
        joint = _masked_logsumexp(members, streams.log_score + log_prob)
        total = _masked_logsumexp(members, streams.log_score)
        found = members.any(axis=-1)
    return jnp.where(found, joint - total, -jnp.log(float(vocab_size)))


def _bubble_logsumexp(streams: Streams, values: jax.Array, max_bubble: int | None) -> jax.Array:
    fixed = jax.lax.stop_gradient(values)
    peak = _over_bubble(streams, fixed, jnp.maximum, -jnp.inf, max_bubble)
    peak = _last_of_bubble(streams, peak)
    shifted = values - jnp.take_along_axis(peak, streams.token, axis=1)
    total = bubble_sum(streams, jnp.exp(jnp.where(streams.alive, shifted, 0)), max_bubble)
    return jnp.log(jnp.where(total > 0, total, 1.0)) + peak


def _masked_logsumexp(
    members: Bool[Array, "B T S"], values: Float[Array, "B S"]
) -> Float[Array, "B T"]:
    any_member = members.any(axis=-1)
    peak = jnp.where(members, jax.lax.stop_gradient(values)[:, None, :], -jnp.inf).max(axis=-1)
    peak = jnp.where(any_member, peak, 0.0)
    shifted = jnp.where(members, values[:, None, :] - peak[..., None], -jnp.inf)
    total = jnp.where(members, jnp.exp(shifted), 0.0).sum(axis=-1)
    return jnp.log(jnp.where(any_member, total, 1.0)) + peak


def merge_log_probs(
    streams: Streams, log_probs: Float[Array, "B S V"], max_bubble: int
) -> Float[Array, "B T V"]:
    """Mix the streams' predictions over the vocabulary: mixture log-probabilities (eq. 11).

    Args:
        streams: Streams after the last block.
        log_probs: Float32 next-token log-probabilities of each stream.
        max_bubble: Static upper bound on the number of streams of a token: `S`, or 2 ** (number of
            fork layers) if this is less.

    Returns:
        Float32 next-token log-probabilities of each token, uniform for a token without live
        streams.
    """
    last, count = bubble_ends(streams)
    terms, weights = [], []
    for distance in range(max_bubble):
        slot = jnp.maximum(last - distance, 0)
        # The first weight is finite, so that no term of a gradient is NaN.
        weight = _gather(streams.log_score, slot)
        weights.append(jnp.where(distance < jnp.maximum(count, 1), weight, -jnp.inf))
        terms.append(weights[-1][..., None] + _gather(log_probs, slot))
    mixture, total = _log_add_exp(terms), _log_add_exp(weights)
    uniform = -jnp.log(float(log_probs.shape[-1]))
    return jnp.where((count > 0)[..., None], mixture - total[..., None], uniform)


def _log_add_exp(terms: Sequence[jax.Array]) -> jax.Array:
    """Compute the elementwise log-sum-exp of arrays of equal shape, without stacking the arrays."""
    peak = jax.lax.stop_gradient(functools.reduce(jnp.maximum, terms))
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)  # an outcome impossible for every stream
    return jnp.log(sum(jnp.exp(term - peak) for term in terms)) + peak

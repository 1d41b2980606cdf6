"""The loss of a policy that was rewarded: sums and weights, divided once by the learner.

Means are never taken here. Micro-batches are added up, and so is all that is reported.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

Aggregate = Literal["sequence", "token", "constant"]

# Differences of log-probabilities are cut to plus and minus this before they are exponents.
FARTHEST = 20.0


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How advantages become a loss.

    Attributes:
        clip_low: a ratio below 1 - clip_low gets no gradient from a negative advantage.
        clip_high: a ratio above 1 + clip_high gets none from a positive one (DAPO: 0.28).
        dual_clip: where the advantage is negative the loss is at most so many times its size;
            more than 1.
        aggregate: what is averaged. "token": all tokens of the batch (DAPO). "sequence": rows,
            each by its own mean over tokens (GRPO). "constant": rows, each by its sum over tokens
            divided by the greatest length (Dr. GRPO).
        kl: coefficient of the divergence from the reference, k3, added to each token's loss. (k1
            has no gradient in expectation.)
        importance_cap: correct for tokens being drawn by a sampler that isn't quite the trainer:
            each counts by the ratio of the two probabilities, at most so much.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    aggregate: Aggregate = "token"
    kl: float = 0.0
    importance_cap: float | None = None

    def __post_init__(self):
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low={self.clip_low}: choose from 0 to 1")
        if not self.clip_high >= 0:
            raise ValueError(f"clip_high={self.clip_high}: choose 0 or more")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip={self.dual_clip}: choose more than 1, or None")
        if self.aggregate not in get_args(Aggregate):
            names = ", ".join(get_args(Aggregate))
            raise ValueError(f"aggregate={self.aggregate!r}: choose one of {names}")
        if not self.kl >= 0:
            raise ValueError(f"kl={self.kl}: choose 0 or more")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise ValueError(f"importance_cap={self.importance_cap}: choose more than 0, or None")


def policy_loss(
    config: LossConfig,
    log_probs: jax.Array,
    old: jax.Array,
    advantages: jax.Array,
    trained: jax.Array,
    *,
    valid: jax.Array,
    max_length: int,
    weight: jax.Array | None = None,
    reference: jax.Array | None = None,
    sampler: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The clipped surrogate, to be minimised. Only `log_probs` gets a gradient.

    What is not trained or not valid may hold anything, NaN too: it changes nothing, and its
    gradient is exactly 0.

    Args:
        config: clipping, KL, aggregation.
        log_probs: `[K, L]` of tokens under the parameters that are optimised.
        old: `[K, L]` under those that the data came from, by the same program.
        advantages: `[K, L]`.
        trained: `[K, L]` bool, tokens that the policy wrote.
        valid: `[K]` bool, False for filler. A valid row without trained tokens is a rollout like
            any other, of loss 0: it counts in "sequence" and in "constant". Whether a policy had
            anything to decide can depend on the policy, so leaving it out would be a bias.
        max_length: tokens that a response has at most, for "constant".
        weight: `[K]`, a row counts so many times in both sums; 1 if not given.
        reference: `[K, L]` under the reference; needed for `config.kl`, else only reported.
        sampler: `[K, L]` as the sampler saw them; needed for `config.importance_cap`, else unused.

    Returns:
        numerator, denominator, and sums over trained tokens: `tokens` counts them, `clipped` those
        that the clip keeps from their gradient (before `dual_clip`), `ratio` is that to `old`,
        `approx_kl` and `ref_kl` are k3 estimates in nats of the divergence of `old` from here and
        from here to the reference. They do not know weights.
    """
    if config.kl and reference is None:
        raise ValueError(f"kl={config.kl} needs the reference's log-probabilities")
    if config.importance_cap is not None and sampler is None:
        raise ValueError(f"importance_cap={config.importance_cap} needs the sampler's")
    if max_length < 1:
        raise ValueError(f"max_length={max_length}: choose 1 or more")
    counts = trained & valid[:, None]

    def known(values: jax.Array) -> jax.Array:
        """Chosen before anything is computed, so that no NaN comes back multiplied by 0."""
        if values.shape != trained.shape:
            raise ValueError(f"log-probabilities {values.shape} are not of tokens {trained.shape}")
        return jnp.where(counts, values, 0)

    def constant(values: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(known(values))

    log_probs, old, advantages = known(log_probs), constant(old), constant(advantages)
    exponent = _cut(log_probs - old)
    ratio = jnp.exp(exponent)
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    loss = jnp.maximum(plain, clipped)
    if config.dual_clip is not None:
        bounded = jnp.minimum(loss, -config.dual_clip * advantages)
        loss = jnp.where(advantages < 0, bounded, loss)
    if config.importance_cap is not None and sampler is not None:
        drawn = jnp.exp(_cut(old - constant(sampler)))
        loss = loss * jnp.minimum(drawn, config.importance_cap)
    sums = {
        "tokens": counts.sum(dtype=loss.dtype),
        "clipped": (clipped > plain).sum(dtype=loss.dtype),
        "ratio": jnp.where(counts, ratio, 0).sum(),
        "approx_kl": (jnp.expm1(exponent) - exponent).sum(),
    }
    if reference is not None:
        kl = _k3(log_probs, constant(reference))
        sums["ref_kl"] = kl.sum()
        loss = loss + config.kl * kl
    numerator, denominator = _aggregate(config.aggregate, loss, counts, valid, weight, max_length)
    return numerator, denominator, jax.lax.stop_gradient(sums)


def _cut(difference: jax.Array) -> jax.Array:
    return jnp.clip(difference, -FARTHEST, FARTHEST)


def _k3(log_probs: jax.Array, reference: jax.Array) -> jax.Array:
    """Unbiased for KL(policy || reference) of tokens that the policy drew, and never negative."""
    difference = _cut(reference - log_probs)
    return jnp.expm1(difference) - difference


def _aggregate(
    aggregate: Aggregate,
    loss: jax.Array,
    counts: jax.Array,
    valid: jax.Array,
    weight: jax.Array | None,
    max_length: int,
) -> tuple[jax.Array, jax.Array]:
    """Numerator and denominator of losses `[K, L]`, which are 0 where nothing counts."""
    tokens = counts.sum(axis=1, dtype=loss.dtype)
    of_row = jnp.ones_like(tokens) if weight is None else jax.lax.stop_gradient(weight)
    of_row = jnp.where(valid, of_row, 0).astype(loss.dtype)
    total = loss.sum(axis=1)
    if aggregate == "sequence":
        return (of_row * total / jnp.maximum(tokens, 1)).sum(), of_row.sum()
    if aggregate == "token":
        return (of_row * total).sum(), (of_row * tokens).sum()
    return (of_row * total).sum(), of_row.sum() * max_length

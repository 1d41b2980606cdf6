"""Policy losses by name.

A loss returns a numerator and a denominator, and metrics as sums. The train step adds up
numerators, denominators and sums over micro-batches, and divides the total numerator by the total
denominator once.
"""

import dataclasses
import math
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp

from thoughtbubbles.registry import Registry

Aggregate = Literal["sequence", "token", "constant"]

# Differences of log-probabilities are clipped to plus and minus this bound before `exp`.
FARTHEST = 20.0


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """Base of all policy losses, functions of log-probabilities and advantages of tokens.

    A new loss is a frozen dataclass with a `word`, options as fields, and `__call__`. Adding the
    class as `LOSSES[word]` makes it known to `--loss`.
    """

    word: ClassVar[str]
    """Name of the loss on the command line and in configs."""

    @property
    def uses_reference(self) -> bool:
        """Whether the loss reads log-probabilities under the reference policy."""
        return False

    @property
    def uses_sampler(self) -> bool:
        """Whether the loss reads the log-probabilities that the sampler computed."""
        return False

    def __call__(
        self,
        log_probs: jax.Array,
        old_log_probs: jax.Array,
        advantages: jax.Array,
        loss_mask: jax.Array,
        *,
        valid: jax.Array,
        max_length: int,
        weight: jax.Array | None = None,
        ref_log_probs: jax.Array | None = None,
        sampling_log_probs: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Compute the numerator and denominator of the loss, to be minimised, and metrics.

        Only `log_probs` gets a gradient. Entries that are not trained or not valid may be NaN: such
        entries change nothing, and their gradient is exactly 0. Where a trigger is trained, the
        trigger's decisions take the place of tokens.

        Args:
            log_probs: Log-probabilities of tokens under the parameters being optimised, `[K, L]`
                for `K` rows of `L` tokens.
            old_log_probs: Log-probabilities under the parameters that sampled the data, as the
                learner (not the sampler) computes them, `[K, L]`.
            advantages: Advantage of each token, `[K, L]`.
            loss_mask: Tokens that are trained, those that the policy generated, `[K, L]` bool.
            valid: Rows that are not padding, `[K]` bool. A valid row without trained tokens has
                loss 0 and counts as a rollout in the means "sequence" and "constant". Leaving the
                row out would be a bias, since the policy can influence whether there is anything to
                decide.
            max_length: Maximum number of trained tokens per row, the divisor in "constant".
            weight: Multiplicity of each row in numerator and denominator, `[K]`; None for 1.
            ref_log_probs: Log-probabilities under the reference policy, `[K, L]`; given if
                `uses_reference`.
            sampling_log_probs: Log-probabilities that the sampler computed, `[K, L]`; given if
                `uses_sampler`.

        Returns:
            Numerator, denominator, and a mapping from metric name to its sum over trained tokens,
            not weighted by `weight`. The sum `tokens`, the number of trained tokens, is required.
        """
        raise NotImplementedError(f"{type(self).__name__} computes no loss")

    def reduce(
        self,
        loss: jax.Array,
        loss_mask: jax.Array,
        *,
        valid: jax.Array,
        max_length: int,
        weight: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Reduce losses of tokens to a numerator and a denominator, as `__call__` does.

        The learner reduces the loss of a value head with this method, and adds the numerator to the
        numerator of `__call__`. A loss that is never used with a value head need not define
        `reduce`.

        Args:
            loss: Loss of each token of `K` rows of `L` tokens, `[K, L]`, 0 outside of the loss
                mask.
            loss_mask: Tokens that are trained, `[K, L]` bool.
            valid: Rows that are not padding, `[K]` bool.
            max_length: Maximum number of trained tokens per row.
            weight: Multiplicity of each row in numerator and denominator, `[K]`; None for 1.

        Returns:
            Numerator, and the denominator that `__call__` returns for the same arguments.
        """
        raise NotImplementedError(f"{type(self).__name__} reduces no losses")


@dataclasses.dataclass(frozen=True)
class ClippedLoss(PolicyLoss):
    """Clipped surrogate of PPO with an optional KL penalty and importance correction.

    The loss of a token with probability ratio r, advantage A and estimate k3 of the KL divergence:

    max(-A r, -A clip(r, 1 - ε_low, 1 + ε_high)) + β k3.

    Attributes:
        clip_low: Clipping range below 1 of the probability ratio (ε_low): a ratio under
            1 - clip_low gets no gradient from a negative advantage.
        clip_high: Clipping range above 1 of the probability ratio (ε_high): a ratio over
            1 + clip_high gets no gradient from a positive advantage (DAPO: 0.28).
        dual_clip: Bound on the loss of a token with a negative advantage, in multiples of that
            advantage (c of dual-clip PPO, above 1); None for no bound.
        aggregate: Reduction over tokens: "sequence" averages the means of rows (GRPO), "token"
            averages all tokens of the batch (DAPO), "constant" averages the sums of rows, each
            divided by the maximum length of a row (Dr. GRPO).
        kl: Weight of the KL penalty (β, estimator k3) towards the reference policy. (The estimator
            k1 would have no gradient in expectation.)
        importance_cap: Upper bound on the importance weight of a token, the ratio of the learner's
            to the sampler's probability of the token; None for no importance weights.
    """

    word: ClassVar[str] = "clipped"
    may_be_infinite: ClassVar[frozenset[str]] = frozenset(
        {"clip_high", "dual_clip", "importance_cap"}
    )

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    aggregate: Aggregate = "sequence"
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
        if not 0 <= self.kl < math.inf:
            raise ValueError(f"kl={self.kl}: choose a finite number, 0 or more")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise ValueError(f"importance_cap={self.importance_cap}: choose more than 0, or None")

    @property
    def uses_reference(self) -> bool:
        return self.kl > 0

    @property
    def uses_sampler(self) -> bool:
        return self.importance_cap is not None

    def __call__(
        self,
        log_probs: jax.Array,
        old_log_probs: jax.Array,
        advantages: jax.Array,
        loss_mask: jax.Array,
        *,
        valid: jax.Array,
        max_length: int,
        weight: jax.Array | None = None,
        ref_log_probs: jax.Array | None = None,
        sampling_log_probs: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Compute the clipped loss; arguments are as in `PolicyLoss.__call__`.

        Returns:
            Numerator, denominator, and sums over trained tokens: `tokens` counts the tokens;
            `clipped` counts the tokens whose gradient the clip sets to 0 (not counting
            `dual_clip`); `ratio` sums the probability ratios to `old`; `approx_kl` sums the k3
            estimates of KL(old || policy) and, with a reference, `ref_kl` the k3 estimates of
            KL(policy || reference), in nats.

        Raises:
            ValueError: Log-probabilities that an option needs are missing, the shapes differ, or
                `max_length` is below 1.
        """
        if self.kl and ref_log_probs is None:
            raise ValueError(f"kl={self.kl} needs the reference's log-probabilities")
        if self.importance_cap is not None and sampling_log_probs is None:
            raise ValueError(f"importance_cap={self.importance_cap} needs the sampler's")
        if max_length < 1:
            raise ValueError(f"max_length={max_length}: choose 1 or more")
        loss_mask = loss_mask & valid[:, None]

        def known(values: jax.Array) -> jax.Array:
            """Set entries outside of the loss mask to 0 first, as a NaN times 0 would be NaN."""
            if values.shape != loss_mask.shape:
                raise ValueError(
                    f"log-probabilities {values.shape} are not of tokens {loss_mask.shape}"
                )
            return jnp.where(loss_mask, values, 0)

        def constant(values: jax.Array) -> jax.Array:
            return jax.lax.stop_gradient(known(values))

        log_probs, old = known(log_probs), constant(old_log_probs)
        advantages = constant(advantages)
        exponent = _cut(log_probs - old)
        ratio = jnp.exp(exponent)
        plain = -advantages * ratio
        clipped = -advantages * jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high)
        loss = jnp.maximum(plain, clipped)
        if self.dual_clip is not None:
            bounded = jnp.minimum(loss, -self.dual_clip * advantages)
            loss = jnp.where(advantages < 0, bounded, loss)
        if self.importance_cap is not None and sampling_log_probs is not None:
            drawn = jnp.exp(_cut(old - constant(sampling_log_probs)))
            loss = loss * jnp.minimum(drawn, self.importance_cap)
        sums = {
            "tokens": loss_mask.sum(dtype=loss.dtype),
            "clipped": (clipped > plain).sum(dtype=loss.dtype),
            "ratio": jnp.where(loss_mask, ratio, 0).sum(),
            "approx_kl": (jnp.expm1(exponent) - exponent).sum(),
        }
        if ref_log_probs is not None:
            kl = _k3(log_probs, constant(ref_log_probs))
            sums["ref_kl"] = kl.sum()
            loss = loss + self.kl * kl
        numerator, denominator = self.reduce(
            loss, loss_mask, valid=valid, max_length=max_length, weight=weight
        )
        return numerator, denominator, jax.lax.stop_gradient(sums)

    def reduce(
        self,
        loss: jax.Array,
        loss_mask: jax.Array,
        *,
        valid: jax.Array,
        max_length: int,
        weight: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        return _aggregate(self.aggregate, loss, loss_mask, valid, weight, max_length)


LOSS_OPTIONS = tuple(field.name for field in dataclasses.fields(ClippedLoss))
"""Names of the options of the clipped loss, which are also options of each method."""

LOSSES = Registry[PolicyLoss]("loss", {loss.word: loss for loss in (ClippedLoss,)})


def _cut(difference: jax.Array) -> jax.Array:
    return jnp.clip(difference, -FARTHEST, FARTHEST)


def _k3(log_probs: jax.Array, reference: jax.Array) -> jax.Array:
    """Estimate KL(policy || reference) per token by k3: unbiased on samples of the policy, >= 0."""
    difference = _cut(reference - log_probs)
    return jnp.expm1(difference) - difference


def _aggregate(
    aggregate: Aggregate,
    loss: jax.Array,
    loss_mask: jax.Array,
    valid: jax.Array,
    weight: jax.Array | None,
    max_length: int,
) -> tuple[jax.Array, jax.Array]:
    """Reduce losses `[K, L]`, 0 outside of the loss mask, to numerator and denominator."""
    tokens = loss_mask.sum(axis=1, dtype=loss.dtype)
    of_row = jnp.ones_like(tokens) if weight is None else jax.lax.stop_gradient(weight)
    of_row = jnp.where(valid, of_row, 0).astype(loss.dtype)
    total = loss.sum(axis=1)
    if aggregate == "sequence":
        return (of_row * total / jnp.maximum(tokens, 1)).sum(), of_row.sum()
    if aggregate == "token":
        return (of_row * total).sum(), (of_row * tokens).sum()
    return (of_row * total).sum(), of_row.sum() * max_length

"""Sample the next token by temperature, then top-k, top-p and min-p, as pure functions of logits.

The order is that of Hugging Face's `generate`: each filter applies to the distribution that the
previous filter returns.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from thoughtbubbles.checks import check_number, check_targets, is_whole
from thoughtbubbles.placement import AnyArray

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int, Key

LOWEST_TEMPERATURE = 1e-30
"""Temperature below which logits divided by it may not be finite in float32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling options as arrays, so that other values need no recompilation.

    A filter that is None is not applied and costs nothing.

    Attributes:
        temperature: Temperature, a float32 scalar; None means greedy decoding.
        top_k: Number of most probable tokens to sample from, an int32 scalar.
        top_p: Minimum probability mass of the tokens to sample from, a float32 scalar.
        min_p: Minimum ratio of a token's probability to that of the most probable token, a float32
            scalar.
    """

    temperature: jax.Array | None = None
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None
    min_p: jax.Array | None = None

    @classmethod
    def of(
        cls,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
    ) -> Sampling:
        """Make a `Sampling` from Python numbers, after a check of their ranges.

        Args:
            temperature: Temperature; 0, or less than `LOWEST_TEMPERATURE`, means greedy decoding,
                and filters have no effect.
            top_k: Number of most probable tokens to sample from; None disables the filter.
            top_p: Minimum probability mass of the tokens to sample from; None and 1 disable the
                filter.
            min_p: Minimum ratio of a token's probability to that of the most probable token; None
                disables the filter.

        Raises:
            ValueError: An option is out of its range.
        """
        check_sampling(temperature, top_k, top_p, min_p)
        if (
            top_p is not None and np.float32(top_p) == 1
        ):  # rounding of the cumulative sum would exclude improbable tokens
            top_p = None
        if temperature < LOWEST_TEMPERATURE:
            return cls()
        number = lambda value: None if value is None else jnp.float32(value)  # noqa: E731
        k = None if top_k is None else jnp.int32(min(top_k, 2**31 - 1))
        return cls(jnp.float32(temperature), k, number(top_p), number(min_p))


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling
) -> Int[Array, " B"]:
    """Sample one token id for each row, or -1 for a row whose logits contain NaN.

    Args:
        logits: Float32 logits; -inf excludes a token.
        keys: PRNG key of each row.
        sampling: Sampling options.
    """
    if sampling.temperature is None:
        chosen = logits.argmax(axis=-1)
    else:
        chosen = jax.vmap(jax.random.categorical)(keys, filtered(logits, sampling))
    return jnp.where(jnp.isnan(logits).any(axis=-1), -1, chosen).astype(jnp.int32)


def filtered(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Divide logits by the temperature, and set tokens that a filter excludes to -inf."""
    if sampling.temperature is not None:
        logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def keep_top_k(logits: Float[Array, "B V"], k: Int[Array, ""] | int) -> Float[Array, "B V"]:
    """Set the logits of all but the `k` most probable tokens to -inf (top-k sampling).

    Tokens that tie with the `k`-th token are kept too (Fan et al. 2018, arXiv 1805.04833).
    """
    descending = -jnp.sort(-logits, axis=-1)
    last = jnp.minimum(k, logits.shape[-1]) - 1
    return _at_least(logits, jnp.take(descending, last, axis=-1)[..., None])


def keep_top_p(logits: Float[Array, "B V"], p: Float[Array, ""] | float) -> Float[Array, "B V"]:
    """Set the logits of tokens outside the nucleus to -inf (top-p sampling).

    The nucleus is the smallest set of most probable tokens whose probabilities sum to `p` or more,
    with ties of its least probable token (Holtzman et al. 2020, arXiv 1904.09751).
    """
    descending = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(descending, axis=-1)
    more_probable = jnp.cumsum(probability, axis=-1) - probability
    # The first token is always kept, even if rounding says otherwise.
    inside = (more_probable < p).at[..., 0].set(True)
    return _at_least(logits, jnp.where(inside, descending, jnp.inf).min(axis=-1, keepdims=True))


def keep_min_p(logits: Float[Array, "B V"], p: Float[Array, ""] | float) -> Float[Array, "B V"]:
    """Set the logits of tokens to -inf that are less than `p` times as probable as the top token.

    This is min-p sampling (Nguyen et al. 2024, arXiv 2407.01082).
    """
    return _at_least(logits, logits.max(axis=-1, keepdims=True) + jnp.log(p))


def _at_least(logits: jax.Array, lowest: jax.Array) -> jax.Array:
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def log_prob_of(logits: jax.Array, targets: AnyArray) -> jax.Array:
    """Compute log-probabilities `[...]` of target ids `[...]` under logits `[..., V]`.

    The log-probability of an id outside the vocabulary is NaN, with a gradient of 0.
    """
    check_targets(targets, logits.shape[:-1])
    # A comparison, whose gradient needs no scatter, and which works on a sharded vocabulary.
    token = jnp.expand_dims(jnp.arange(logits.shape[-1]), range(targets.ndim))
    chosen = token == targets[..., None]
    log_prob = jnp.where(chosen, logits, 0).sum(axis=-1) - jax.nn.logsumexp(logits, axis=-1)
    return of_vocabulary(log_prob, targets, logits.shape[-1])


def of_vocabulary(log_prob: jax.Array, targets: AnyArray, vocab_size: int) -> jax.Array:
    """Replace the log-probabilities `[...]` of target ids outside the vocabulary by NaN.

    Args:
        log_prob: Log-probabilities of the targets.
        targets: Target ids `[...]`.
        vocab_size: Size of the vocabulary.
    """
    last = min(vocab_size - 1, jnp.iinfo(targets.dtype).max)  # a larger number would wrap around
    return jnp.where((targets >= 0) & (targets <= last), log_prob, jnp.nan)


def check_sampling(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    """Raise a ValueError if an option of `Sampling.of` is out of its range.

    Args:
        temperature: Temperature; 0 is greedy.
        top_k: Number of most probable tokens, or None.
        top_p: Minimum probability mass, or None.
        min_p: Minimum ratio of a token's probability to that of the most probable token, or None.
    """
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for name, value in options.items():
        if value is not None:
            check_number(name, value)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature={temperature}: choose 0 (greedy) or more")
    if top_k is not None and not is_whole(top_k):
        raise ValueError(f"top_k={top_k!r}: give a whole number")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} leaves no token: choose 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: choose more than 0 and at most 1")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p}: choose from 0 to 1")

"""Losses as (sum, weight): division happens once, after accumulation and reduction."""

import jax
import jax.numpy as jnp

from thoughtbubbles import Output, Thoughtbubbles


def next_token_loss(
    model: Thoughtbubbles,
    tokens: jax.Array,
    *,
    track: bool = False,
    key: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, Output]]:
    """Negative log-likelihood of each token given the row so far.

    Args:
        tokens: `[B, T+1]` int32; a target of -1 has no weight (and stands for padding as an input).
        track: let the model's tracked thresholds follow these tokens (training).
        key: of the noise with which its fork layers choose (training).

    Returns:
        sum in nats, and (number of targets, the forward pass's output).
    """
    nats, output = token_losses(model, tokens, track=track, key=key)
    return nats.sum(), ((tokens[:, 1:] >= 0).sum(dtype=jnp.float32), output)


def token_losses(
    model: Thoughtbubbles,
    tokens: jax.Array,
    *,
    track: bool = False,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Output]:
    """Blockwise negative log-likelihoods `[B, T]` in nats of rows `[B, T+1]`; 0 for target -1."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    length = (inputs >= 0).sum(axis=1, dtype=jnp.int32)
    output = model.run(jnp.maximum(inputs, 0), length, track=track, key=key)
    log_prob = model.log_prob(output.streams, jnp.maximum(targets, 0))
    return -jnp.where(targets >= 0, log_prob, 0), output

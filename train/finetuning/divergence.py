"""Divergence of a tuned model from the model that tuning began with, as a penalty on the loss."""

import jax
import jax.numpy as jnp

from memgen.losses import by_chunk
from train.models.finetunable import FinetunableModel


def reference_kl(
    model: FinetunableModel,
    reference: FinetunableModel,
    rows: dict[str, jax.Array],
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Compute KL(π ‖ π_ref) exactly over the vocabulary, and log π(target), at each target.

    Logits are computed for a few positions at a time. No gradient flows into the reference, and it
    has no dropout.

    Args:
        model: Tuned model π.
        reference: Model that tuning began with, π_ref.
        rows: Arrays `[B, T + 1]` by name (`FinetunableModel.log_probs`).
        key: Key of dropout and of random insertion of `model`; None for neither.

    Returns:
        Divergences in nats and log-probabilities, both `[B, T]` float32; 0 for targets outside of
        the loss mask.
    """
    targets, loss_mask = jnp.maximum(rows["tokens"], 0)[:, 1:], rows["loss_mask"][:, 1:]

    def part(mine, theirs, targets, mask):
        log_p = jax.nn.log_softmax(model.backbone.unembed(mine).astype(jnp.float32))
        log_q = jax.nn.log_softmax(reference.backbone.unembed(theirs).astype(jnp.float32))
        divergence = (jnp.exp(log_p) * (log_p - jax.lax.stop_gradient(log_q))).sum(axis=-1)
        # A sum, since a gather would move hidden states between devices.
        chosen = jnp.arange(log_p.shape[-1]) == targets[..., None]
        picked = jnp.where(chosen, log_p, 0).sum(axis=-1)
        return jnp.where(mask, divergence, 0.0), jnp.where(mask, picked, 0.0)

    hidden = model.predictors(rows, key)
    before = jax.lax.stop_gradient(reference.predictors(rows))
    return by_chunk(part, (hidden, before, targets, loss_mask))

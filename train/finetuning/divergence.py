"""KL divergence of a tuned model from its reference model, as a penalty on the loss."""

import jax
import jax.numpy as jnp

from memgen.by_chunk import by_chunk
from train.models.finetunable import FinetunableModel


def reference_kl(
    model: FinetunableModel,
    reference: FinetunableModel,
    rows: dict[str, jax.Array],
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Compute KL(π ‖ π_ref) exactly over the vocabulary, and log π(target), at each target.

    Logits are computed for a few positions at a time. No gradient flows into the reference model,
    which runs without dropout.

    Args:
        model: Tuned model π.
        reference: Reference model π_ref, with the parameters that tuning began with.
        rows: Mapping from names to arrays `[B, T + 1]`, as in `FinetunableModel.log_probs`.
        key: PRNG key of dropout and of random insertion in `model`; None disables both.

    Returns:
        Divergences in nats and log-probabilities, both `[B, T]` float32; 0 for targets outside of
        the loss mask.
    """
    targets, loss_mask = jnp.maximum(rows["tokens"], 0)[:, 1:], rows["loss_mask"][:, 1:]

    def compare(mine, theirs, targets):
        log_p = jax.nn.log_softmax(model.backbone.unembed(mine).astype(jnp.float32))
        log_q = jax.nn.log_softmax(reference.backbone.unembed(theirs).astype(jnp.float32))
        divergence = (jnp.exp(log_p) * (log_p - jax.lax.stop_gradient(log_q))).sum(axis=-1)
        # A masked sum, since a gather would move hidden states between devices.
        chosen = jnp.arange(log_p.shape[-1]) == targets[..., None]
        picked = jnp.where(chosen, log_p, 0).sum(axis=-1)
        return divergence, picked

    hidden = model.predictors(rows, key)
    before = jax.lax.stop_gradient(reference.predictors(rows))
    return by_chunk(compare, [hidden, before], targets, loss_mask)

"""Log-probabilities and the supervised loss, as (sum, weight)."""

import jax
import jax.numpy as jnp

from memgen.backbone import DecoderBackbone
from memgen.insertion import Plan
from memgen.model import MemGen

CHUNK = 128


def token_log_probs(
    backbone: DecoderBackbone,
    hidden: jax.Array,
    targets: jax.Array,
    wanted: jax.Array,
    temperature: float | jax.Array = 1.0,
    valid_vocab_size: int | jax.Array | None = None,
    chunk: int = CHUNK,
) -> jax.Array:
    """Log-probabilities `[B, L]` float32 of targets, 0 where they are not wanted.

    The vocabulary is met `chunk` places at a time, fewer where there are more than 32 rows, and
    not at all where none of them is wanted.

    Args:
        hidden: `[B, L, D]`, what predicts each target.
        targets: `[B, L]` int32.
        wanted: `[B, L]` bool.
        temperature: logits are divided by it.
        valid_vocab_size: only ids below it can be chosen; all if not given.
    """
    batch, length = targets.shape
    chunk = min(chunk, length, max(1, CHUNK * 32 // batch))
    parts = -(-length // chunk)
    fill = ((0, 0), (0, parts * chunk - length))

    def in_parts(values):
        values = jnp.pad(values, fill + ((0, 0),) * (values.ndim - 2))
        return values.reshape(batch, parts, chunk, *values.shape[2:]).swapaxes(0, 1)

    def score(hidden, targets, wanted):
        logits = backbone.unembed(hidden) / temperature
        ids = jnp.arange(logits.shape[-1])
        if valid_vocab_size is not None:
            logits = jnp.where(ids < valid_vocab_size, logits, -jnp.inf)
        chosen = ids == jnp.maximum(targets, 0)[..., None]
        picked = jnp.where(chosen, logits, 0).sum(axis=-1)
        return jnp.where(wanted, picked - jax.nn.logsumexp(logits, axis=-1), 0.0)

    @jax.checkpoint
    def part(_, values):
        hidden, targets, wanted = values
        nothing = lambda *_: jnp.zeros(targets.shape, jnp.float32)  # noqa: E731
        return None, jax.lax.cond(wanted.any(), score, nothing, hidden, targets, wanted)

    _, found = jax.lax.scan(part, None, tuple(map(in_parts, (hidden, targets, wanted))))
    return found.swapaxes(0, 1).reshape(batch, parts * chunk)[:, :length]


def sft_loss(
    memgen: MemGen,
    tokens: jax.Array,
    loss_mask: jax.Array,
    plan: Plan,
    dropout: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of supervised tokens with memory woven in (eq. 11).

    Args:
        tokens: `[B, L]` int32, padded on the right by any ids.
        supervised: `[B, L]` bool; padding is not, nor is a first token.
        plan: the events.
        dropout: a key for the weaver's adapter.

    Returns:
        sum in nats, and the number of supervised tokens: their mean is over all tokens of the
        batch, not over rows.
    """
    hidden = memgen.predictors(tokens, plan, dropout)
    log_probs = token_log_probs(memgen.reasoner, hidden, tokens, loss_mask)
    return -log_probs.sum(), loss_mask.sum(dtype=jnp.float32)

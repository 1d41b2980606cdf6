"""Log-probabilities, and the training losses of weaver and trigger.

Each loss is returned as a sum and a count, so that losses of several batches can be averaged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from memgen.backbone import DecoderBackbone
from memgen.by_chunk import CHUNK, by_chunk
from memgen.checks import check_by_token, check_decisions, checked_ids, checked_mask
from memgen.insertion import Plan, up_to_response_end
from memgen.model import MemGen, check_memgen
from memgen.placement import AnyArray

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int, Key


def token_log_probs(
    backbone: DecoderBackbone,
    hidden: Float[Array, "B L D"],
    targets: Int[AnyArray, "B L"],
    loss_mask: Bool[AnyArray, "B L"],
    temperature: float | Float[Array, ""] = 1.0,
    valid_vocab_size: int | Int[Array, ""] | None = None,
    chunk: int = CHUNK,
) -> Float[Array, "B L"]:
    """Compute float32 log-probabilities of target tokens; they are 0 where masked out.

    The log-probability of a target outside the vocabulary is NaN, with a gradient of 0.

    Logits are computed for `chunk` positions at a time, so no array `[B, L, V]` is materialized. A
    chunk that is masked out in all rows is skipped. The logits are computed once if their head is
    not differentiated, as in fine-tuning with an adapter, and again in the backward pass otherwise.

    Args:
        backbone: Decoder whose `unembed` gives the logits.
        hidden: Hidden states; hidden state `i` predicts target `i`.
        targets: Ids of the target tokens.
        loss_mask: Mask that is True for the targets to score.
        temperature: Temperature by which logits are divided.
        valid_vocab_size: Number of ids that can be sampled: ids from `valid_vocab_size` on have
            probability 0. By default all ids can be sampled.
        chunk: Maximum number of positions at a time; at most `4096 / B` positions are used.

    Raises:
        ValueError: There is not one hidden state and one entry of the mask for each target.
    """
    loss_mask = checked_mask(loss_mask, targets)
    if not hasattr(backbone, "unembed"):
        raise ValueError(
            f"a {type(backbone).__name__} has no unembed: give a decoder, such as memgen.reasoner"
        )
    if jnp.ndim(hidden) != 3 or jnp.shape(hidden)[:2] != jnp.shape(targets):
        raise ValueError(
            f"hidden states of shape {jnp.shape(hidden)} for targets of shape "
            f"{jnp.shape(targets)}: give one vector for each target"
        )

    def score(hidden, targets):
        logits = backbone.unembed(hidden) / temperature
        ids = jnp.arange(logits.shape[-1])
        if valid_vocab_size is not None:
            logits = jnp.where(ids < valid_vocab_size, logits, -jnp.inf)
        picked = jnp.where(ids == targets[..., None], logits, 0).sum(axis=-1)
        log_probs = picked - jax.nn.logsumexp(logits, axis=-1)
        last = min(logits.shape[-1] - 1, jnp.iinfo(targets.dtype).max)  # more would wrap around
        known = (targets >= 0) & (targets <= last)
        return jnp.where(known, log_probs, jnp.nan)

    return by_chunk(score, [hidden], targets, loss_mask, chunk)


def sft_loss(
    memgen: MemGen,
    tokens: Int[AnyArray, "B L"],
    loss_mask: Bool[AnyArray, "B L"],
    plan: Plan,
    dropout: Key[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute the negative log-likelihood of responses with latents (arXiv 2509.24704, eq. 11).

    Args:
        memgen: Model to train.
        tokens: Token ids, padded on the right by any ids.
        loss_mask: Mask that is True for tokens of the response. It must be False for padding and
            for a row's first token.
        plan: Events of each row, as `plan_insertions` returns them.
        dropout: PRNG key of the dropout of the weaver's adapter; None switches dropout off.

    Returns:
        Sum of the loss over the responses' tokens in nats, and the number of these tokens, float32.
        The sum divided by the number is the mean loss per token. It is NaN if a token of a response
        is outside the vocabulary.

    Raises:
        ValueError: The tokens are not integers `[B, L]`, or the loss mask or the plan does not fit
            the tokens.
    """
    check_memgen(memgen)
    tokens = checked_ids(tokens)
    loss_mask = checked_mask(loss_mask, tokens)
    # Attention would spread the NaN of padding whose ids are outside of the vocabulary.
    read = jnp.where(up_to_response_end(loss_mask), tokens, 0)
    hidden = memgen.predictors(read, plan, dropout)
    log_probs = token_log_probs(memgen.reasoner, hidden, tokens, loss_mask)
    return -log_probs.sum(), loss_mask.sum(dtype=jnp.float32)


def decision_log_probs(
    memgen: MemGen, tokens: Int[AnyArray, "B L"], decisions: Int[AnyArray, "B L"], plan: Plan
) -> Float[Array, "B L"]:
    """Compute float32 log-probabilities of a trigger's recorded decisions, in one forward pass.

    Latents are inserted where the plan has events, whatever the trigger would decide now.

    Args:
        memgen: Model with a trigger.
        tokens: Token ids, padded on the right.
        decisions: Recorded decision before each token: 1 invoked, 0 skipped, -1 none.
        plan: Events of each row, as `plan_from_decisions` returns them.

    Returns:
        Log-probability of each decision; 0 where no decision was made.

    Raises:
        ValueError: The model has no trigger, or the decisions or the plan do not fit the tokens.
    """
    check_memgen(memgen)
    tokens = checked_ids(tokens)
    check_decisions(decisions, tokens)
    scores = jax.nn.log_softmax(memgen.trigger_logits(tokens, plan))
    picked = jnp.where(decisions == 1, scores[..., 1], scores[..., 0])
    return jnp.where(decisions >= 0, picked, 0.0)


def trigger_loss(
    log_probs: Float[Array, "B L"],
    decisions: Int[AnyArray, "B L"],
    advantages: Float[AnyArray, " B"],
    old: Float[AnyArray, "B L"] | None = None,
    reference: Float[AnyArray, "B L"] | None = None,
    *,
    clip: float = 0.2,
    kl: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute the GRPO loss of a trigger's decisions (arXiv 2509.24704).

    The loss of a decision is max(-A r, -A clip(r, 1 - ε, 1 + ε)) + β k3. A is the advantage of the
    row. The ratio r is the probability of the decision under the parameters to train, divided by
    its probability under the parameters with which the row was sampled. The loss of a row is the
    mean over the row's decisions; a row without decisions has loss 0. The rewards from which
    advantages are computed should have `invocation_penalty` subtracted.

    Args:
        log_probs: Log-probabilities of the decisions under the parameters to train
            (`decision_log_probs`).
        decisions: Recorded decision before each token: 1 invoked, 0 skipped, -1 none.
        advantages: Advantage of each row, e.g. its reward minus the mean reward of its group.
        old: Log-probabilities under the parameters with which the rows were sampled, computed by
            the same program as `log_probs`; None if the rows were sampled with the parameters to
            train.
        reference: Log-probabilities under the reference trigger of the KL penalty; None without a
            penalty.
        clip: Clipping range of the ratio r (ε).
        kl: Weight of the KL penalty (β, estimator k3).

    Returns:
        Sum of the rows' losses, and the number of rows, float32. The sum divided by the number is
        the mean loss per row.

    Raises:
        ValueError: The shapes do not fit each other, decisions are bool, or `kl` is not 0 and
            `reference` is None.
    """
    check_decisions(decisions, log_probs)
    for name, other in (("old", old), ("reference", reference)):
        if other is not None:
            check_by_token(f"log-probabilities {name}", other, log_probs)
    advantages = jnp.asarray(advantages)
    if advantages.shape != log_probs.shape[:1]:
        raise ValueError(
            f"advantages of shape {advantages.shape} for {log_probs.shape[0]} rows: give one "
            "number a row"
        )
    if kl and reference is None:
        raise ValueError(f"kl={kl} needs the reference's log-probabilities")
    made = decisions >= 0
    constant = lambda values: jax.lax.stop_gradient(jnp.where(made, values, 0.0))  # noqa: E731
    log_probs = jnp.where(made, log_probs, 0.0)
    ratio = jnp.exp(log_probs - constant(log_probs if old is None else old))
    gain = jax.lax.stop_gradient(advantages)[:, None]
    loss = jnp.maximum(-gain * ratio, -gain * jnp.clip(ratio, 1 - clip, 1 + clip))
    if reference is not None:
        further = constant(reference) - log_probs
        loss += kl * (jnp.expm1(further) - further)
    loss = jnp.where(made, loss, 0.0).sum(axis=1) / jnp.maximum(made.sum(axis=1), 1)
    return loss.sum(), jnp.float32(len(loss))

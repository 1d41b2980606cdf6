"""Log-probabilities of tokens, and the loss of supervised fine-tuning as (sum, weight)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from memgen.backbone import DecoderBackbone
from memgen.checks import check_by_token, check_decisions, checked_ids, checked_mask
from memgen.insertion import Plan
from memgen.model import MemGen, check_memgen
from memgen.placement import AnyArray

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int, Key

CHUNK = 128


def token_log_probs(
    backbone: DecoderBackbone,
    hidden: Float[Array, "B L D"],
    targets: Int[AnyArray, "B L"],
    loss_mask: Bool[AnyArray, "B L"],
    temperature: float | Float[Array, ""] = 1.0,
    valid_vocab_size: int | Int[Array, ""] | None = None,
    chunk: int = CHUNK,
) -> Float[Array, "B L"]:
    """Float32 log-probabilities of targets, 0 where they are masked out.

    Logits are computed for `chunk` positions at a time, so that there is no array `[B, L, V]`, and
    not at all for a chunk that is masked out.

    Args:
        backbone: Decoder whose `unembed` gives the logits.
        hidden: Hidden states that predict the targets.
        targets: Target ids.
        loss_mask: Targets to score.
        temperature: Temperature that divides the logits.
        valid_vocab_size: Number of ids with a probability, from 0 on; all ids by default.
        chunk: Number of positions at a time; it is lowered for more than 32 rows.

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

    def score(hidden, targets, mask):
        logits = backbone.unembed(hidden) / temperature
        ids = jnp.arange(logits.shape[-1])
        if valid_vocab_size is not None:
            logits = jnp.where(ids < valid_vocab_size, logits, -jnp.inf)
        chosen = ids == jnp.maximum(targets, 0)[..., None]
        picked = jnp.where(chosen, logits, 0).sum(axis=-1)
        return jnp.where(mask, picked - jax.nn.logsumexp(logits, axis=-1), 0.0)

    def part(hidden, targets, mask):
        nothing = lambda *_: jnp.zeros_like(targets, jnp.float32)  # noqa: E731
        return jax.lax.cond(mask.any(), score, nothing, hidden, targets, mask)

    return by_chunk(part, (hidden, jnp.asarray(targets), loss_mask), chunk)


def by_chunk(part: Callable[..., Any], values: Sequence[jax.Array], chunk: int = CHUNK) -> Any:
    """Results for positions, some at a time; the backward pass computes them again.

    Args:
        part: Function of arrays `[B, C, ...]` to a tree of arrays `[B, C]`.
        values: Arrays `[B, L, ...]`.
        chunk: Number of positions at a time; it is lowered for more than 32 rows.

    Returns:
        Tree of arrays `[B, L]`.
    """
    batch, length = jnp.shape(values[0])[:2]
    chunk = min(chunk, length, max(1, CHUNK * 32 // batch))
    parts = -(-length // chunk)
    padding = ((0, 0), (0, parts * chunk - length))

    def in_parts(values: jax.Array) -> jax.Array:
        values = jnp.pad(values, padding + ((0, 0),) * (values.ndim - 2))
        return values.reshape(batch, parts, chunk, *values.shape[2:]).swapaxes(0, 1)

    step = jax.checkpoint(lambda _, values: (None, part(*values)))
    _, found = jax.lax.scan(step, None, tuple(map(in_parts, values)))
    joined = lambda found: found.swapaxes(0, 1).reshape(batch, parts * chunk)  # noqa: E731
    return jax.tree.map(lambda found: joined(found)[:, :length], found)


def sft_loss(
    memgen: MemGen,
    tokens: Int[AnyArray, "B L"],
    loss_mask: Bool[AnyArray, "B L"],
    plan: Plan,
    dropout: Key[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Negative log-likelihood of a response with memory woven in (arXiv 2509.24704, eq. 11).

    Args:
        memgen: Model to train.
        tokens: Token ids, padded on the right by any ids.
        loss_mask: Tokens of the response; neither padding nor a row's first token.
        plan: Events of each row (`plan_insertions`).
        dropout: Random key of the weaver's adapter dropout; None switches dropout off.

    Returns:
        The sum over the masked tokens in nats, and their number: the mean loss of the batch weighs
        all tokens equally.

    Raises:
        ValueError: The loss mask or the plan is not of these tokens.
    """
    check_memgen(memgen)
    tokens = checked_ids(tokens)
    loss_mask = checked_mask(loss_mask, tokens)
    hidden = memgen.predictors(tokens, plan, dropout)
    log_probs = token_log_probs(memgen.reasoner, hidden, tokens, loss_mask)
    return -log_probs.sum(), loss_mask.sum(dtype=jnp.float32)


def decision_log_probs(
    memgen: MemGen, tokens: Int[AnyArray, "B L"], decisions: Int[AnyArray, "B L"], plan: Plan
) -> Float[Array, "B L"]:
    """Float32 log-probabilities of a trigger's decisions, in one forward pass.

    Decisions are replayed and not made again: latents stand where they stood.

    Args:
        memgen: Model with a trigger.
        tokens: Token ids, padded on the right.
        decisions: Decision before each token: 1 invoked, 0 skipped, -1 none.
        plan: Events of each row (`plan_from_decisions`).

    Returns:
        Log-probability of each decision; 0 where none was made.

    Raises:
        ValueError: There is no trigger, or the decisions or the plan are not of these tokens.
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
    """GRPO on a trigger's decisions (arXiv 2509.24704), to be minimised.

    Per decision, with probability ratio r to the sampling parameters and advantage A of its row:
    max(-A r, -A clip(r, 1 - ε, 1 + ε)) + β k3; a row is the mean of its decisions, and 0 without
    any. The reward that the advantages are of pays for invocations (`invocation_penalty`).

    Args:
        log_probs: Log-probabilities under the parameters to train (`decision_log_probs`).
        decisions: Decision before each token: 1 invoked, 0 skipped, -1 none.
        advantages: Advantage of each row, e.g. its reward less the mean of its group.
        old: Log-probabilities under the parameters that the rows were sampled with, by the same
            program; None where these are the ones to train.
        reference: Log-probabilities under the trigger that the KL penalty holds on to; None without
            a penalty.
        clip: Clipping range of the ratio (ε).
        kl: Weight of the KL penalty (β, estimator k3).

    Returns:
        The sum over rows and their number: the mean loss weighs all rows equally.

    Raises:
        ValueError: A shape is wrong, or `kl` is above 0 and there is no reference.
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

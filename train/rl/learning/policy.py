"""A policy as it samples and as it is scored: one set of weights, two readings of it.

Anything that samples is a `MemGen`; a plain decoder is one that never invokes and has no weaver.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memgen import (
    MemGen,
    MemGenConfig,
    Plan,
    WeaverConfig,
    token_log_probs,
)
from train.models.finetunable import FinetunableModel

NO_MEMORY = MemGenConfig(
    WeaverConfig(0, 0, context="nothing", match_scale=False), max_inference_events=0
)


def sampler_of(finetunable: FinetunableModel) -> MemGen:
    """What samples: the policy's MemGen, or its decoder as one without memory."""
    if finetunable.memgen is not None:
        return finetunable.memgen
    decoder = finetunable.backbone
    if finetunable.adapter is not None:
        decoder = decoder.apply_lora(finetunable.adapter)
    boundary = np.zeros(decoder.vocab_size, np.uint8)
    return MemGen(decoder, NO_MEMORY, boundary=boundary, rngs=nnx.Rngs(0))


def token_scores(
    finetunable: FinetunableModel,
    rows: dict[str, jax.Array],
    temperature: float,
    valid_vocab_size: int,
) -> jax.Array:
    """Log-probabilities `[K, L]` float32 of the tokens that the policy wrote, 0 elsewhere.

    What was decided is not decided again: memory stands where it stood (`point`, `kind`), and is
    written anew, so that gradients reach the weaver.

    Args:
        rows: of `make_rows`.
        temperature, valid_vocab_size: of the sampler.
    """
    tokens = rows["tokens"]
    if finetunable.memgen is not None:
        plan = Plan.of(rows["point"], rows["kind"], finetunable.memgen.config)
        # A row's plan and stream may reach into its padding, which nothing real sees.
        hidden = finetunable.memgen.predictors(tokens, plan)
    else:
        decoder = finetunable.backbone
        if finetunable.adapter is not None:
            decoder = decoder.apply_lora(finetunable.adapter)
        read = decoder.hidden_states(decoder.embed_tokens(tokens), rows["length"])
        hidden = jnp.pad(read, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    return token_log_probs(
        finetunable.backbone, hidden, tokens, rows["trained"], temperature, valid_vocab_size
    )


def decision_scores(finetunable: FinetunableModel, rows: dict[str, jax.Array]) -> jax.Array:
    """Log-probabilities `[K, L]` float32 of the trigger's decisions, 0 where it was not asked."""
    memgen = finetunable.memgen
    assert memgen is not None
    plan = Plan.of(rows["point"], rows["kind"], memgen.config)
    scores = jax.nn.log_softmax(memgen.trigger_logits(rows["tokens"], plan))
    decisions = rows["decisions"]
    picked = jnp.where(decisions == 1, scores[..., 1], scores[..., 0])
    return jnp.where(decisions >= 0, picked, 0.0)


def scores(finetunable: FinetunableModel, rows: dict[str, jax.Array], how: Any) -> jax.Array:
    """Log-probabilities `[K, L]` of what is trained: decisions of a trigger, else tokens.

    Args:
        how: a `train.rl.rollout.sampler.Sampling`.
    """
    if finetunable.method == "trigger":
        return decision_scores(finetunable, rows)
    return token_scores(finetunable, rows, how.temperature, how.valid_vocab_size)


def action_mask(finetunable: FinetunableModel, rows: dict[str, jax.Array]) -> jax.Array:
    """`[K, L]` bool: where the policy that is trained has acted."""
    if finetunable.method == "trigger":
        return rows["decisions"] >= 0
    return rows["trained"]

"""A policy as it is sampled and as it is scored: two programs of one set of weights.

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
    decision_log_probs,
    token_log_probs,
)
from train.models.finetunable import FinetunableModel

NO_MEMORY = MemGenConfig(
    WeaverConfig(0, 0, context="nothing", match_scale=False), max_inference_events=0
)


def sampler_of(finetunable: FinetunableModel) -> MemGen:
    """The policy as a `MemGen` to sample from; a plain decoder becomes one without memory."""
    if finetunable.memgen is not None:
        return finetunable.memgen
    decoder = finetunable.backbone
    if finetunable.adapter is not None:
        decoder = decoder.apply_lora(finetunable.adapter)
    boundary = np.zeros(decoder.vocab_size, np.uint8)
    return MemGen(decoder, NO_MEMORY, boundary=boundary, rngs=nnx.Rngs(0))


def predictors(finetunable: FinetunableModel, rows: dict[str, jax.Array]) -> jax.Array:
    """Hidden states `[K, L, D]` that predict each token, those that the logits are made of.

    Decisions are replayed, not made again: latents stand where they stood (`point`, `kind`), and
    are woven anew, so that gradients reach the weaver. The state of a first token is arbitrary.

    Args:
        finetunable: The policy.
        rows: Rows of `make_rows`, or of `train.rl.learning.sharing`, for which `L` is the number of
            slots of a branch; these only for a decoder with `branch_states`.
    """
    tokens = rows["tokens"]
    if finetunable.memgen is not None:
        plan = Plan.of(rows["point"], rows["kind"], finetunable.memgen.config)
        # A row's plan and stream may reach into its padding, which nothing real sees.
        return finetunable.memgen.predictors(tokens, plan)
    decoder = finetunable.backbone
    if finetunable.adapter is not None:
        decoder = decoder.apply_lora(finetunable.adapter)
    if "prefix" in rows:
        prefix, x = (decoder.embed_tokens(rows[name]) for name in ("prefix", "inputs"))
        branches = x.reshape(len(prefix), -1, *x.shape[1:])
        return decoder.branch_states(prefix, rows["prefix_length"], branches).reshape(x.shape)
    states = decoder.hidden_states(decoder.embed_tokens(tokens), rows["length"])
    return jnp.pad(states, ((0, 0), (1, 0), (0, 0)))[:, :-1]


def token_scores(
    finetunable: FinetunableModel,
    rows: dict[str, jax.Array],
    temperature: float,
    valid_vocab_size: int,
    hidden: jax.Array | None = None,
) -> jax.Array:
    """Log-probabilities `[K, L]` float32 of the tokens that the policy generated, 0 elsewhere.

    Args:
        finetunable: The policy.
        rows: Rows of `make_rows`.
        temperature: Sampling temperature.
        valid_vocab_size: Number of ids that the sampler chooses from.
        hidden: Hidden states of `predictors`, where the caller has them.
    """
    hidden = predictors(finetunable, rows) if hidden is None else hidden
    return token_log_probs(
        finetunable.backbone, hidden, rows["tokens"], rows["trained"], temperature, valid_vocab_size
    )


def decision_scores(finetunable: FinetunableModel, rows: dict[str, jax.Array]) -> jax.Array:
    """Log-probabilities `[K, L]` float32 of the trigger's decisions, 0 where none was made."""
    memgen = finetunable.memgen
    assert memgen is not None
    plan = Plan.of(rows["point"], rows["kind"], memgen.config)
    return decision_log_probs(memgen, rows["tokens"], rows["decisions"], plan)


def scores(finetunable: FinetunableModel, rows: dict[str, jax.Array], sampling: Any) -> jax.Array:
    """Log-probabilities `[K, L]` of what is trained: decisions of a trigger, else tokens.

    Args:
        finetunable: The policy.
        rows: Rows of `make_rows`.
        sampling: How the rows were sampled (`train.rl.rollout.sampler.Sampling`).
    """
    if finetunable.method == "trigger":
        return decision_scores(finetunable, rows)
    return token_scores(finetunable, rows, sampling.temperature, sampling.valid_vocab_size)


def scores_and_values(
    finetunable: FinetunableModel, rows: dict[str, jax.Array], sampling: Any
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and values `[K, L]` of tokens, by one forward pass.

    The value of a token is that of the state before it: the value head takes the hidden state that
    predicts the token. There the streams of a forking model are merged, as for the logits, and the
    latents of MemGen are attended to. Values are computed at every position, those of prompts and
    padding too, and count where tokens are trained.

    Args:
        finetunable: Policy with a value head.
        rows: Rows of `make_rows`.
        sampling: How the rows were sampled (`train.rl.rollout.sampler.Sampling`).
    """
    assert finetunable.value_head is not None
    hidden = predictors(finetunable, rows)
    log_probs = token_scores(
        finetunable, rows, sampling.temperature, sampling.valid_vocab_size, hidden
    )
    return log_probs, finetunable.value_head(hidden)


def action_mask(finetunable: FinetunableModel, rows: dict[str, jax.Array]) -> jax.Array:
    """Positions where the trained policy has acted, `[K, L]` bool."""
    if finetunable.method == "trigger":
        return rows["decisions"] >= 0
    return rows["trained"]

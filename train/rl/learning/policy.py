"""Sampling and scoring of one policy: the `MemGen` that samples, and the log-probabilities.

Rollouts are always sampled from a `MemGen`. A policy without latent memory becomes a `MemGen` that
never invokes it.
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
    """Return the policy as a `MemGen` for sampling; a plain decoder gets no latent memory.

    Args:
        finetunable: The policy. Its LoRA adapter, if any, is applied.
    """
    if finetunable.memgen is not None:
        return finetunable.memgen
    decoder = finetunable.backbone
    if finetunable.adapter is not None:
        decoder = decoder.apply_lora(finetunable.adapter)
    boundary = np.zeros(decoder.vocab_size, np.uint8)
    return MemGen(decoder, NO_MEMORY, boundary=boundary, rngs=nnx.Rngs(0))


def predictors(finetunable: FinetunableModel, rows: dict[str, jax.Array]) -> jax.Array:
    """Compute the hidden state that predicts each token, from which the token's logits follow.

    With latent memory, the sampler's decisions are replayed: latents are inserted at the same
    positions (`point`, `kind`) and computed again, so that gradients reach the weaver. The state
    that should predict the first token of a row is arbitrary.

    Args:
        finetunable: The policy.
        rows: Rows of `make_rows`; or, for a decoder with `branch_states`, rows with shared prompts
            in the layout of `train.rl.learning.sharing.flat`, where `K` is the number of branches
            and `L` the number of positions of a branch.

    Returns:
        Hidden states, `[K, L, D]` for `K` rows of `L` tokens.
    """
    tokens = rows["tokens"]
    if finetunable.memgen is not None:
        plan = Plan.of(rows["point"], rows["kind"], finetunable.memgen.config)
        # Events and latents of a row may lie in its padding, to which no real token attends.
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
    """Compute log-probabilities of the tokens that the policy generated.

    Args:
        finetunable: The policy.
        rows: Rows of `make_rows`, or of `train.rl.learning.sharing.flat`.
        temperature: Sampling temperature, by which logits are divided.
        valid_vocab_size: Number of ids that the sampler chooses from, counted from id 0.
        hidden: Hidden states of `predictors`, `[K, L, D]`; None to compute them.

    Returns:
        Log-probabilities, `[K, L]` float32 for `K` rows of `L` tokens; 0 for all other tokens.
    """
    hidden = predictors(finetunable, rows) if hidden is None else hidden
    return token_log_probs(
        finetunable.backbone, hidden, rows["tokens"], rows["trained"], temperature, valid_vocab_size
    )


def decision_scores(finetunable: FinetunableModel, rows: dict[str, jax.Array]) -> jax.Array:
    """Compute log-probabilities of the trigger's decisions.

    Args:
        finetunable: Policy with a trigger.
        rows: Rows of `make_rows` with `decisions`, `point` and `kind`.

    Returns:
        Log-probabilities, `[K, L]` float32 for `K` rows of `L` tokens; 0 where no decision was
        made.
    """
    memgen = finetunable.memgen
    assert memgen is not None
    plan = Plan.of(rows["point"], rows["kind"], memgen.config)
    return decision_log_probs(memgen, rows["tokens"], rows["decisions"], plan)


def scores(finetunable: FinetunableModel, rows: dict[str, jax.Array], sampling: Any) -> jax.Array:
    """Compute log-probabilities of tokens, or of decisions where a trigger is trained.

    The result is that of `token_scores` or of `decision_scores`, `[K, L]` float32.

    Args:
        finetunable: The policy.
        rows: Rows of `make_rows`, or of `train.rl.learning.sharing.flat`.
        sampling: Options that the rows were sampled with (`train.rl.rollout.sampler.Sampling`).
    """
    if finetunable.method == "trigger":
        return decision_scores(finetunable, rows)
    return token_scores(finetunable, rows, sampling.temperature, sampling.valid_vocab_size)


def scores_and_values(
    finetunable: FinetunableModel, rows: dict[str, jax.Array], sampling: Any
) -> tuple[jax.Array, jax.Array]:
    """Compute log-probabilities of tokens and values of the states before them in one forward pass.

    The value head reads the hidden state that predicts a token. In this state the streams of a
    forking model are merged, as for the logits, and latents of MemGen have been attended to. Values
    are computed at every position, including prompts and padding, where they have no meaning.

    Args:
        finetunable: Policy with a value head.
        rows: Rows of `make_rows`, or of `train.rl.learning.sharing.flat`.
        sampling: Options that the rows were sampled with (`train.rl.rollout.sampler.Sampling`).

    Returns:
        Log-probabilities and values, `[K, L]` each for `K` rows of `L` tokens.
    """
    assert finetunable.value_head is not None
    hidden = predictors(finetunable, rows)
    log_probs = token_scores(
        finetunable, rows, sampling.temperature, sampling.valid_vocab_size, hidden
    )
    return log_probs, finetunable.value_head(hidden)


def action_mask(finetunable: FinetunableModel, rows: dict[str, jax.Array]) -> jax.Array:
    """Return the loss mask, `[K, L]` bool for `K` rows of `L` tokens.

    The mask is True for generated tokens or, where a trigger is trained, for its decisions.

    Args:
        finetunable: The policy.
        rows: Rows of `make_rows`, or of `train.rl.learning.sharing.flat`.
    """
    if finetunable.method == "trigger":
        return rows["decisions"] >= 0
    return rows["trained"]

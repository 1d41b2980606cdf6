"""Generation by recomputing the whole prefix for every token: right for any policy, cached by none.

A policy that is not causal (`TopK`) may fork the past differently when a token is added, so a cache
would not give what the model computes; its ratio budget follows the length of the prefix.
"""

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from thoughtbubbles.model import Thoughtbubbles


def generate(
    model: Thoughtbubbles,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Sequence[int] = (),
    choices: int | None = None,
) -> list[list[int]]:
    """Continue each prompt; a row's text does not depend on the rest of its batch.

    Args:
        prompts: token ids, at least one each; lengths may differ.
        max_new_tokens: at most this many are added to each.
        temperature: 0 takes the most probable token.
        seed: of the samples. A row's key is made of the seed, its prompt, and how many equal
            prompts stand before it, so that equal prompts get different texts.
        stop: a row ends after any of these ids (which is returned).
        choices: only ids below it are chosen, where the tokenizer has fewer ids than the model.

    Returns:
        the new ids of each prompt.
    """
    if not prompts:
        return []
    if max_new_tokens < 0 or temperature < 0:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}: choose 0 or more"
        )
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(
                f"prompt {index} is empty: give at least one token, e.g. the separator"
            )
        wrong = [token for token in prompt if not 0 <= token < model.config.vocab_size]
        if wrong:
            raise ValueError(
                f"prompt {index} holds token id {wrong[0]}, vocab_size={model.config.vocab_size}: "
                "use the tokenizer that the model was trained with"
            )
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), int(lengths.max()) + max_new_tokens), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    keys = _row_keys(seed, [tuple(prompt) for prompt in prompts])
    tokens, ends = _extend(
        model,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        keys,
        jnp.float32(temperature),
        jnp.asarray(list(stop), jnp.int32),
        jnp.int32(max_new_tokens),
        jnp.int32(model.config.vocab_size if choices is None else choices),
    )
    tokens, ends = np.asarray(tokens), np.asarray(ends)
    return [
        row[length:end].tolist() for row, length, end in zip(tokens, lengths, ends, strict=True)
    ]


def _row_keys(seed: int, prompts: list[tuple[int, ...]]) -> jax.Array:
    repeats = [prompts[:index].count(prompt) for index, prompt in enumerate(prompts)]
    hashes = [zlib.crc32(np.array(prompt, np.int32).tobytes()) for prompt in prompts]
    fold = jax.vmap(jax.random.fold_in)
    base = jnp.broadcast_to(jax.random.key(seed), (len(prompts),))
    return fold(fold(base, jnp.array(hashes, jnp.uint32)), jnp.array(repeats, jnp.uint32))


@jax.jit
def _extend(model, tokens, lengths, keys, temperature, stop, max_new_tokens, choices):
    limit = lengths + max_new_tokens

    def unfinished(carry):
        return ~carry[2].all()

    def step(carry):
        tokens, length, done = carry
        # Places after a row's end are padding to the model, so the buffer's size changes nothing.
        logits = model.logits_at(model.run(tokens, length).streams, length - 1)
        logits = jnp.where(jnp.arange(logits.shape[-1]) < choices, logits, -jnp.inf)
        chosen = sample(logits, jax.vmap(jax.random.fold_in)(keys, length), temperature)
        here = (jnp.arange(tokens.shape[1]) == length[:, None]) & ~done[:, None]
        tokens = jnp.where(here, chosen[:, None], tokens)
        length = jnp.where(done, length, length + 1)
        stopped = (chosen[:, None] == stop).any(axis=1)
        return tokens, length, done | stopped | (length >= limit)

    done = jnp.broadcast_to(max_new_tokens <= 0, lengths.shape)
    tokens, ends, _ = jax.lax.while_loop(unfinished, step, (tokens, lengths, done))
    return tokens, ends


def sample(logits: jax.Array, keys: jax.Array, temperature: jax.Array) -> jax.Array:
    """One id per row, `[B]` int32, from `logits [B, V]` with one key per row; greedy at 0."""
    warm = jnp.where(temperature > 0, temperature, 1.0)
    drawn = jax.vmap(jax.random.categorical)(keys, logits / warm)
    return jnp.where(temperature > 0, drawn, logits.argmax(axis=-1)).astype(jnp.int32)

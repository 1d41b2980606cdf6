"""Text generation in one compiled loop, with a cache or by recomputing the prefix for every token.

A fork policy that is not causal (`TopK`, whose budget is a ratio of the prefix's length) may fork
earlier tokens differently when a token is appended. A cache would then not give the model's
results, so the prefix is recomputed.
"""

import dataclasses
import functools
import weakref
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from thoughtbubbles.architecture import Architecture
from thoughtbubbles.checks import check_stop, is_whole
from thoughtbubbles.fields import LARGEST
from thoughtbubbles.model import Thoughtbubbles
from thoughtbubbles.policy import Policy
from thoughtbubbles.prefill import Progress, in_blocks, long_cache, prefill
from thoughtbubbles.sampling import Sampling, sample
from thoughtbubbles.short_repr import ShortRepr
from thoughtbubbles.transposed import can_transpose, transpose_kernels

SHORTEST_PROMPT = 16
SMALLEST_CACHE = 64


class _DecodingForm(NamedTuple):
    """Result of a model's `for_decoding`, with the model's structure and arrays as cache key.

    Attributes:
        structure: Pytree structure of the model.
        leaves: Arrays of the model.
        form: The result, whose large kernels may be transposed.
        level: 0 for kernels as they are, 1 for the form of one row, 2 for that of several rows.
    """

    structure: Any
    leaves: tuple[weakref.ref, ...]
    form: Architecture
    level: int


_KEPT: list[_DecodingForm] = []
"""Cache of the latest decoding form; cleared when an array of its model is garbage-collected."""


@dataclasses.dataclass(frozen=True, repr=False)
class Generation(ShortRepr):
    """Generated continuation of one prompt, and the bubbles of all its `T` tokens.

    Attributes:
        prompt: Token ids of the prompt.
        tokens: Token ids of the continuation.
        streams: Number of live streams of each token of prompt and continuation, after each of the
            `F` fork layers, `[F, T]` int32.
        score: Mean cumulative score p of the token's live streams, `[F, T]` float32; 0 for a token
            without live streams.
    """

    prompt: list[int]
    tokens: list[int]
    streams: np.ndarray
    score: np.ndarray


def generate(
    model: Architecture,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: Sequence[int] = (),
    valid_vocab_size: int | None = None,
    policy: Policy | None = None,
    cached: bool | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Generate a continuation of each prompt, independently of other prompts in the batch.

    With a cache, the lengths of the longest prompt and the longest text are rounded up, so that
    calls with similar lengths share compiled programs. Prompts whose forward pass would take much
    memory are prefilled in blocks (`thoughtbubbles.prefill`).

    Args:
        model: Any architecture.
        prompts: Token ids of each prompt, at least one; lengths may differ.
        max_new_tokens: Maximum number of tokens added to each prompt.
        temperature: Sampling temperature; 0 decodes greedily.
        top_k: Number of most probable tokens to sample from; None for all tokens.
        top_p: Minimum total probability of the most probable tokens to sample from (nucleus
            sampling); None for all tokens.
        min_p: Minimum probability of tokens to sample from, as a fraction of the probability of the
            most probable token; None for no minimum.
        seed: Sampling seed. The PRNG key of a row depends on the seed, the row's prompt, and the
            number of equal prompts in earlier rows, so that equal prompts get different texts.
        stop: Token ids that end a continuation; the stop id is part of the returned ids.
        valid_vocab_size: Number of token ids, starting from 0, that may be generated if the
            tokenizer has fewer ids than the model; all by default.
        policy: Fork policy in place of the model's own; None for the model's own.
        cached: Whether to decode with a cache instead of recomputing the prefix for every token;
            by default True if the model is `cacheable`.
        progress: Function called as `progress(done, total)` after each prefilled block, if prompts
            are prefilled in blocks, with the number of prefilled tokens of the longest prompt and
            the length of that prompt.

    Returns:
        Token ids of each continuation.

    Raises:
        ValueError: An argument is invalid, `cached` is True and the model is not `cacheable`, or
            the logits are NaN.
    """
    if not isinstance(model, Architecture):
        raise ValueError(
            f"{type(model).__name__} does not generate here: give an architecture, such as "
            "Thoughtbubbles (memgen.generate takes a MemGen)"
        )
    given, model = model, model if policy is None else model.with_policy(policy)
    if cached is None:
        cached = model.cacheable
    elif cached:
        model.check_cacheable()
    sampling = Sampling.of(temperature, top_k, top_p, min_p)
    if not _check(model, prompts, max_new_tokens, valid_vocab_size):
        return []
    request = _Request.of(model, prompts, max_new_tokens, sampling, seed, stop, valid_vocab_size)
    if cached:
        form = decoding_form(given, policy, len(prompts))
        return _decode(form, prompts, request, read_all=False, progress=progress)[0]
    new, count = _recompute(model, *_padded(prompts, max_new_tokens), request)
    return _texts(prompts, new, count)


def generate_with_bubbles(
    model: Thoughtbubbles,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: Sequence[int] = (),
    valid_vocab_size: int | None = None,
    policy: Policy | None = None,
) -> list[Generation]:
    """Generate as `generate` does with a cache, and record the streams of each token.

    The arguments have the same meaning as in `generate`.

    Returns:
        A `Generation` for each prompt.

    Raises:
        ValueError: `generate` raises a ValueError, or the model is not a `cacheable`
            `Thoughtbubbles`.
    """
    if not isinstance(model, Thoughtbubbles):
        raise ValueError(f"{type(model).__name__} has no bubbles: use generate")
    given, model = model, model if policy is None else model.with_policy(policy)
    model.check_cacheable()
    sampling = Sampling.of(temperature, top_k, top_p, min_p)
    if not _check(model, prompts, max_new_tokens, valid_vocab_size):
        return []
    request = _Request.of(model, prompts, max_new_tokens, sampling, seed, stop, valid_vocab_size)
    form = decoding_form(given, policy, len(prompts))
    texts, cache = _decode(form, prompts, request, read_all=True)
    streams, score = np.asarray(cache.trace.streams), np.asarray(cache.trace.score)
    found = []
    for row, (prompt, new) in enumerate(zip(prompts, texts, strict=True)):
        end = len(prompt) + len(new)
        bubbles = streams[row, :, :end], score[row, :, :end]
        found.append(Generation(list(prompt), new, *bubbles))
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Request:
    """Arguments of the compiled loops: PRNG keys `[B]` of rows, stop ids `[N]`, and scalars."""

    sampling: Sampling
    keys: jax.Array
    stop: jax.Array
    max_new_tokens: jax.Array
    valid_vocab_size: jax.Array

    @classmethod
    def of(
        cls, model, prompts, max_new_tokens, sampling, seed, stop, valid_vocab_size
    ) -> "_Request":
        check_stop(stop)
        return cls(
            sampling,
            _row_keys(seed, [tuple(prompt) for prompt in prompts]),
            jnp.asarray(list(stop), jnp.int32),
            jnp.int32(max_new_tokens),
            jnp.int32(model.config.vocab_size if valid_vocab_size is None else valid_vocab_size),
        )

    def choose(self, logits: jax.Array, length: jax.Array) -> jax.Array:
        """Sample the next id of each row after `length [B]` tokens; -1 if the logits are NaN."""
        allowed = jnp.arange(logits.shape[-1]) < self.valid_vocab_size
        keys = jax.vmap(jax.random.fold_in)(self.keys, length)
        return sample(jnp.where(allowed, logits, -jnp.inf), keys, self.sampling)

    def ends(self, chosen: jax.Array, count: jax.Array) -> jax.Array:
        """Whether each row ends with the sampled id `chosen [B]`, its `count`-th new token."""
        stopped = (chosen[:, None] == self.stop).any(axis=1)
        return stopped | (chosen < 0) | (count >= self.max_new_tokens)


def _check(model, prompts, max_new_tokens, valid_vocab_size) -> bool:
    """Raise a ValueError for a wrong argument; return whether there are any prompts."""
    vocab = model.config.vocab_size
    if not is_whole(max_new_tokens):
        raise ValueError(f"max_new_tokens={max_new_tokens!r}: give a whole number")
    if not 0 <= max_new_tokens <= LARGEST:
        raise ValueError(f"max_new_tokens={max_new_tokens}: choose from 0 to {LARGEST}")
    if valid_vocab_size is not None and not is_whole(valid_vocab_size):
        raise ValueError(f"valid_vocab_size={valid_vocab_size!r}: give a whole number")
    if valid_vocab_size is not None and not 1 <= valid_vocab_size <= vocab:
        raise ValueError(
            f"valid_vocab_size={valid_vocab_size}: choose from 1 to vocab_size={vocab}"
        )
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str) or np.ndim(prompt) != 1:
            raise ValueError(
                f"prompt {index} is {prompt!r}: give a list of prompts, each of token ids"
            )
        if len(prompt) == 0:
            raise ValueError(
                f"prompt {index} is empty: give at least one token, e.g. the separator"
            )
        dtype = np.asarray(prompt).dtype
        if not np.issubdtype(dtype, np.integer):
            raise ValueError(f"prompt {index} is of type {dtype}: give integers, the token ids")
        wrong = [token for token in prompt if not 0 <= token < vocab]
        if wrong:
            raise ValueError(
                f"prompt {index} holds token id {wrong[0]}, vocab_size={vocab}: "
                "use the tokenizer that the model was trained with"
            )
    return len(prompts) > 0


def _row_keys(seed: int, prompts: list[tuple[int, ...]]) -> jax.Array:
    if not is_whole(seed):
        raise ValueError(f"seed={seed!r}: give a whole number")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={seed}: choose a number of at most 64 bits")
    rows = [np.array(prompt, np.int32).tobytes() for prompt in prompts]
    seen: Counter[bytes] = Counter()
    repeats = []
    for row in rows:
        repeats.append(seen[row])
        seen[row] += 1
    hashes = [zlib.crc32(row) for row in rows]
    fold = jax.vmap(jax.random.fold_in)
    base = jnp.broadcast_to(jax.random.key(seed), (len(prompts),))
    return fold(fold(base, jnp.array(hashes, jnp.uint32)), jnp.array(repeats, jnp.uint32))


def _padded(prompts, more: int = 0, width: int = 0) -> tuple[jax.Array, jax.Array]:
    """Pad prompts to `width` or to longest + `more` tokens; return ids and lengths `[B]`."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), max(width, int(lengths.max()) + more)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray(lengths)


def _texts(prompts, new: jax.Array, count: jax.Array) -> list[list[int]]:
    texts = [row[:n].tolist() for row, n in zip(np.asarray(new), np.asarray(count), strict=True)]
    for index, text in enumerate(texts):
        if text and text[-1] < 0:
            raise ValueError(
                f"prompt {index}: the logits after {len(prompts[index]) + len(text) - 1} tokens "
                "are NaN: check the parameters, or compute in float32"
            )
    return texts


def _decode(model, prompts, request, read_all, progress=None) -> tuple[list[list[int]], Any]:
    """Generate with a cache; with `read_all`, the cache includes the last token of each text."""
    longest = max(map(len, prompts))
    tokens, lengths = _padded(prompts, width=_bucket(longest, SHORTEST_PROMPT))
    new = int(request.max_new_tokens)
    if in_blocks(model, *tokens.shape):
        max_tokens = long_cache(longest + new)
        rows = np.asarray(tokens), np.asarray(lengths)
        logits, cache = prefill(model, *rows, max_tokens, progress)
        chosen = _choose(request, logits, lengths)
    else:
        max_tokens = _bucket(longest + new, SMALLEST_CACHE)
        chosen, cache = _begin(model, tokens, lengths, request, max_tokens)
    new, count, cache = _continue(
        model, cache, chosen, lengths, request, jnp.bool_(read_all), max_tokens
    )
    return _texts(prompts, new, count), cache


def decoding_form(
    model: Architecture, policy: Policy | None, rows: int | None = None
) -> Architecture:
    """Return `model.for_decoding()` with a fork policy, cached for the latest model.

    A call with a model of the same JAX arrays reuses the cached result. For a model with NumPy
    arrays, which can be modified in place, each call makes a new result.

    Args:
        model: Model to decode with.
        policy: Fork policy in place of the model's own; None for the model's own.
        rows: Number of rows that are decoded at a time, on which it depends which large kernels are
            stored transposed (`transpose_kernels`); None for long blocks of tokens, for which none
            needs to be. Later calls with fewer rows reuse the form of several rows.
    """
    form = model
    leaves, structure = jax.tree.flatten(model)
    if all(isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) for leaf in leaves):
        kept, level = _kept(leaves, structure), 0 if rows is None else min(rows, 2)
        if kept is not None and level <= kept.level:
            form = kept.form
        else:
            kept = None
            _KEPT.clear()  # first, so that there are never two
            form = model.for_decoding()
        if kept is None and form is not model:
            if type(form) is not Thoughtbubbles or not can_transpose(form):
                level = 2
            elif level:
                transpose_kernels(form, batch=level > 1)
            were = tuple(weakref.ref(leaf, _forget) for leaf in leaves)
            _KEPT[:] = [_DecodingForm(structure, were, form, level)]
    return form if policy is None else form.with_policy(policy)


def _kept(leaves: list[Any], structure: Any) -> _DecodingForm | None:
    for kept in _KEPT[:1]:
        if kept.structure == structure and all(
            was() is leaf for was, leaf in zip(kept.leaves, leaves, strict=True)
        ):
            return kept
    return None


def _forget(dead: weakref.ref, cache: list[_DecodingForm] = _KEPT) -> None:
    """Clear the cached form if the dead array belongs to its model, not to an earlier model."""
    # The cache is a default, because at the end of Python there are no globals any more.
    if any(was is dead for kept in cache[:1] for was in kept.leaves):
        cache.clear()


def _bucket(size: int, smallest: int) -> int:
    return max(smallest, 1 << (size - 1).bit_length())


@functools.partial(jax.jit, static_argnames="max_tokens")
def _begin(model, tokens, lengths, request, max_tokens) -> tuple[jax.Array, Any]:
    """Prefill a new cache with the prompts and choose the first new tokens."""
    cache = model.init_cache(tokens.shape[0], max_tokens)
    output, cache = model.advance(cache, tokens, lengths, fresh=True)
    return request.choose(model.logits_at(output, lengths - 1), lengths), cache


@jax.jit
def _choose(request, logits, lengths) -> jax.Array:
    return request.choose(logits, lengths)


@functools.partial(jax.jit, static_argnames="max_tokens", donate_argnames="cache")
def _continue(model, cache, chosen, lengths, request, read_all, max_tokens):
    """Generate all new tokens after the first; return new ids `[B, max_tokens]`, counts, cache."""
    model = model.for_decoding()  # out of the loop, so that no step copies weights
    batch = chosen.shape[0]

    def unfinished(carry):
        return carry["unread"].any()

    def step(carry):
        # A row that is done may get a last forward pass, for its bubbles, not to sample again.
        done, cache = carry["done"], carry["cache"]
        unread = carry["unread"].astype(jnp.int32)
        output, cache = model.advance(cache, carry["chosen"][:, None], unread)
        length = carry["length"] + unread
        chosen = request.choose(model.logits_at(output, jnp.zeros_like(count)), length)
        new = jax.lax.dynamic_update_slice(carry["new"], chosen[:, None], (0, carry["step"]))
        grown = carry["count"] + ~done
        ended = done | request.ends(chosen, grown)
        return {
            "step": carry["step"] + 1,
            "chosen": chosen,
            "new": new,
            "count": grown,
            "length": length,
            "done": ended,
            "unread": ~done & (read_all | ~ended) & (chosen >= 0),
            "cache": cache,
        }

    count = jnp.full((batch,), jnp.minimum(request.max_new_tokens, 1))
    done = request.ends(chosen, count)
    carry = {
        "step": jnp.int32(1),
        "chosen": chosen,
        "new": jnp.zeros((batch, max_tokens), jnp.int32).at[:, 0].set(chosen),
        "count": count,
        "length": lengths,
        "done": done,
        "unread": (count > 0) & (read_all | ~done) & (chosen >= 0),
        "cache": cache,
    }
    carry = jax.lax.while_loop(unfinished, step, carry)
    return carry["new"], carry["count"], carry["cache"]


@jax.jit
def _recompute(model, tokens, lengths, request):
    """Generate tokens, each from a recomputed prefix; return new ids `[B, S]` and counts `[B]`."""

    def unfinished(carry):
        return ~carry[2].all()

    def step(carry):
        tokens, length, done = carry
        # Positions after a row's end are padding, so the buffer's size does not matter.
        logits = model.logits_at(model.run(tokens, length), length - 1)
        chosen = request.choose(logits, length)
        here = (jnp.arange(tokens.shape[1]) == length[:, None]) & ~done[:, None]
        tokens = jnp.where(here, chosen[:, None], tokens)
        length = jnp.where(done, length, length + 1)
        return tokens, length, done | request.ends(chosen, length - lengths)

    done = jnp.broadcast_to(request.max_new_tokens <= 0, lengths.shape)
    tokens, ends, _ = jax.lax.while_loop(unfinished, step, (tokens, lengths, done))
    shifted = jax.vmap(lambda row, start: jnp.roll(row, -start))(tokens, lengths)
    return shifted, ends - lengths

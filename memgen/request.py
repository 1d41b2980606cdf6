"""Check and prepare a request for generation: its options, prompts and PRNG keys."""

import collections
import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from memgen.checks import check_number, check_stop, is_whole, on_host
from memgen.model import MemGen, check_memgen
from memgen.short_repr import ShortRepr
from memgen.trigger import AlwaysInvoke, LearnedInvoke, RandomInvoke, Trigger, TriggerPolicy

SHORTEST = 16
LOWEST_TEMPERATURE = 1e-30
"""Temperature below which logits divided by it may not be finite in float32."""

KeepMemory = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Request(ShortRepr):
    """Options with which a response is generated; `make_request` checks the options.

    Attributes:
        policy: Trigger policy, which decides at each boundary whether to weave.
        temperature: Sampling temperature, a float32 scalar; None takes the most probable token.
        max_new_tokens: Maximum number of new tokens, an int32 scalar or `[B]`; 0 leaves a row
            unchanged.
        stop: `[M]` int32, the `M` token ids that end a row.
        valid_vocab_size: Number of token ids that may be sampled, an int32 scalar: ids from
            `valid_vocab_size` on are excluded.
        keep_memory: Filter of events, a callable that must be a pytree; None keeps all events. The
            filter's arguments are the latents `[R, K, D]` of `R` rows with `K` latent slots each, a
            bool mask `[R, K]` of real latents, and PRNG keys `[R]`. The filter returns `[R]` bool,
            False to drop a row's event, which then counts as skipped. The `R` rows may be any
            subset of the batch, so the result for a row must depend on this row alone.
        retriever: A `memgen.retrieval.Retriever`, queried on the host at each event, or None.
        top_p: Probability mass for nucleus sampling (see `decoding.nucleus`), a float32 scalar;
            None samples from all tokens. A response's log-probabilities do not depend on `top_p`.
        events: `[B]` int32, number of events of a truncated response that a row continues, not
            counting the event before its first token; -1 for rows that begin a response. None if
            all rows begin a response.
        prefill: `[B, P]` int32, up to `P` token ids with which each response begins, padded on the
            right with -1. Prefill tokens replace sampled tokens and never end a row; memory is
            woven among prefill tokens as usual, and `max_new_tokens` includes them. None for
            responses that the model begins itself.
    """

    policy: TriggerPolicy
    temperature: jax.Array | None
    max_new_tokens: jax.Array
    stop: jax.Array
    valid_vocab_size: jax.Array
    keep_memory: KeepMemory | None = None
    retriever: Any = dataclasses.field(default=None, metadata={"static": True})
    top_p: jax.Array | None = None
    events: jax.Array | None = None
    prefill: jax.Array | None = None


def make_request(
    memgen: MemGen,
    max_new_tokens: int,
    policy: TriggerPolicy = AlwaysInvoke(),  # noqa: B008 (frozen)
    temperature: float = 0.0,
    stop: Sequence[int] = (),
    valid_vocab_size: int | None = None,
    keep_memory: KeepMemory | None = None,
    retriever: Any = None,
    top_p: float | None = None,
) -> Request:
    """Make a request, and check its options.

    Args:
        memgen: Model that will respond.
        max_new_tokens: Maximum number of new tokens per row.
        policy: Trigger policy, which decides at each boundary whether to weave.
        temperature: Sampling temperature; 0, or less than `LOWEST_TEMPERATURE`, takes the most
            probable token.
        stop: Token ids that end a row.
        valid_vocab_size: Number of token ids that may be sampled: ids from `valid_vocab_size` on
            are excluded. By default all ids may be sampled.
        keep_memory: Filter of events (see `Request`); None keeps all events.
        retriever: A `memgen.retrieval.Retriever`, queried at each event, or None.
        top_p: Probability mass for nucleus sampling; None or 1 samples from all tokens.

    Raises:
        ValueError: An option is out of range, the policy needs a learned trigger and the model's
            trigger is missing or untrained, a retriever is given with a weaver of
            `context="nothing"`, or `policy` or `keep_memory` is not a registered pytree.
    """
    check_memgen(memgen)
    _check_pytree("policy", policy)
    if not (callable(policy) and hasattr(policy, "learned")):
        raise ValueError(f"policy={policy!r}: choose a TriggerPolicy, such as AlwaysInvoke()")
    _check_policy(policy)
    if policy.learned:
        trigger = memgen.checked_trigger()
        if not getattr(policy, "sample", False):  # training begins with samples of a zero head
            _check_trained(trigger)
    if keep_memory is not None:
        _check_pytree("keep_memory", keep_memory)
    if retriever is not None and memgen.config.weaver.context == "nothing":
        raise ValueError("context='nothing' takes no text from a retriever: drop one of them")
    check_stop(stop)
    if not is_whole(max_new_tokens):
        raise ValueError(f"max_new_tokens={max_new_tokens!r}: give a whole number")
    check_number("temperature", temperature)
    if top_p is not None:
        check_number("top_p", top_p)
    if not 0 <= max_new_tokens < 2**31:
        raise ValueError(f"max_new_tokens={max_new_tokens}: choose from 0 to {2**31 - 1}")
    if not (np.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature={temperature}: choose 0 (greedy) or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: choose more than 0 and at most 1")
    vocab = memgen.reasoner.vocab_size
    if valid_vocab_size is not None and not is_whole(valid_vocab_size):
        raise ValueError(f"valid_vocab_size={valid_vocab_size!r}: give a whole number")
    if valid_vocab_size is not None and not 1 <= valid_vocab_size <= vocab:
        raise ValueError(
            f"valid_vocab_size={valid_vocab_size}: choose from 1 to vocab_size={vocab}"
        )
    return Request(
        policy,
        None if temperature < LOWEST_TEMPERATURE else jnp.float32(temperature),
        jnp.int32(max_new_tokens),
        jnp.asarray(list(stop), jnp.int32),
        jnp.int32(vocab if valid_vocab_size is None else valid_vocab_size),
        keep_memory,
        retriever,
        # At 1 rounding of the cumulative sum would exclude improbable tokens.
        None if top_p is None or jnp.float32(top_p) == 1 else jnp.float32(top_p),
    )


def _check_trained(trigger: Trigger) -> None:
    kernel = trigger.kernel[...]
    if not isinstance(kernel, Tracer) and not on_host(kernel).any():
        raise ValueError(
            "the policy needs a learned trigger and this one is untrained, its head is zero: train "
            "or load it, or use AlwaysInvoke()"
        )


def _check_pytree(name: str, value: Any) -> None:
    if any(callable(leaf) for leaf in jax.tree.leaves(value)):
        raise ValueError(
            f"{name}={value!r} is no pytree: register its class, e.g. with "
            "jax.tree_util.register_static"
        )


def _check_policy(policy: TriggerPolicy) -> None:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(policy)):
        return
    if isinstance(policy, RandomInvoke) and not 0 <= policy.probability <= 1:
        raise ValueError(f"{policy}: choose a probability from 0 to 1")
    if isinstance(policy, LearnedInvoke) and policy.sample and not policy.temperature > 0:
        raise ValueError(f"{policy}: choose a temperature above 0, or sample=False")


def row_keys(seed: int, prompts: Sequence[Sequence[int]]) -> jax.Array:
    """Derive a PRNG key for each row, `[B]`, from the seed and the row's prompt.

    A key also depends on the number of equal prompts before the row, so that equal prompts get
    different keys.
    """
    if not is_whole(seed):
        raise ValueError(f"seed={seed!r}: give a whole number")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={seed}: choose a number of at most 64 bits")
    rows = [np.array(prompt, np.int32).tobytes() for prompt in prompts]
    seen: collections.Counter[bytes] = collections.Counter()
    repeats = []
    for row in rows:
        repeats.append(seen[row])
        seen[row] += 1
    hashes = [zlib.crc32(row) for row in rows]
    fold = jax.vmap(jax.random.fold_in)
    base = jnp.broadcast_to(jax.random.key(seed), (len(rows),))
    return fold(fold(base, jnp.array(hashes, jnp.uint32)), jnp.array(repeats, jnp.uint32))


def pad_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """Pad prompts with 0 on the right to a common length, a power of two of at least 16.

    Returns:
        Token ids `[B, C]` int32 of the padded length `C`, and the number of real tokens of each
        prompt, `[B]` int32.

    Raises:
        ValueError: There is no prompt, or a prompt is empty, is not a list of integers, or has an
            id outside of the vocabulary.
    """
    if len(prompts) == 0:
        raise ValueError("no prompt is given: give at least one")
    for index, prompt in enumerate(prompts):
        _check_ids("prompt", index, prompt, vocab_size)
        if len(prompt) == 0:
            raise ValueError(f"prompt {index} is empty: give at least one token")
    tokens = np.zeros((len(prompts), bucket(max(map(len, prompts)))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.array([len(prompt) for prompt in prompts], jnp.int32)


def with_prefills(
    request: Request, prefills: Sequence[Sequence[int]], rows: int, vocab_size: int
) -> Request:
    """Return a request whose responses begin with given tokens.

    `max_new_tokens` of a row is increased by the number of the row's prefill tokens.

    Args:
        request: Request without a prefill.
        prefills: Token ids with which each response begins; a row's list may be empty.
        rows: Number of rows that respond.
        vocab_size: Number of ids of the vocabulary.

    Raises:
        ValueError: There is not one prefill for each row, or a prefill is not a list of integers or
            has an id outside of the vocabulary.
    """
    if len(prefills) != rows:
        raise ValueError(f"{len(prefills)} prefills for {rows} prompts: give one for each")
    for index, prefill in enumerate(prefills):
        _check_ids("prefill", index, prefill, vocab_size)
    given = np.full((rows, bucket(max(map(len, prefills)))), -1, np.int32)
    for row, prefill in zip(given, prefills, strict=True):
        row[: len(prefill)] = prefill
    length = jnp.array([len(prefill) for prefill in prefills], jnp.int32)
    return dataclasses.replace(
        request, prefill=jnp.asarray(given), max_new_tokens=request.max_new_tokens + length
    )


def _check_ids(name: str, index: int, ids: Sequence[int], vocab_size: int) -> None:
    if isinstance(ids, str) or np.ndim(ids) != 1:
        raise ValueError(f"{name} {index} is {ids!r}: give a list of {name}s, each of token ids")
    dtype = np.asarray(ids).dtype
    if len(ids) and not np.issubdtype(dtype, np.integer):
        raise ValueError(f"{name} {index} is of type {dtype}: give integers, the token ids")
    wrong = [token for token in ids if not 0 <= token < vocab_size]
    if wrong:
        raise ValueError(
            f"{name} {index} holds token id {wrong[0]}, vocab_size={vocab_size}: "
            "use the tokenizer that the reasoner was trained with"
        )


def bucket(size: int) -> int:
    """Round a size up to a power of two of at least 16."""
    return max(SHORTEST, 1 << (max(size, 1) - 1).bit_length())

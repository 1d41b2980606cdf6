"""What is asked of generation, checked: numbers, prompts and keys."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from memgen.model import MemGen
from memgen.trigger import AlwaysInvoke, LearnedInvoke, RandomInvoke, Trigger, TriggerPolicy

SHORTEST = 16

KeepMemory = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """How to respond.

    Attributes:
        policy: decides at boundaries.
        temperature: scalar, or None for the most probable token.
        max_new_tokens: int32 scalar, or `[B]`: rows of 0 rest.
        stop: `[M]` int32, ids after which a row is done.
        valid_vocab_size: int32 scalar; only ids below it are chosen.
        keep_memory: a pytree; told latents `[R, K, D]`, which of them are real `[R, K]`, and keys
            `[R]` of any rows of the batch, so it must judge each by itself; the events that it does
            not keep are skipped. None keeps all.
        retriever: `memgen.retrieval.Retriever`, asked on the host at each event, or None.
    """

    policy: TriggerPolicy
    temperature: jax.Array | None
    max_new_tokens: jax.Array
    stop: jax.Array
    valid_vocab_size: jax.Array
    keep_memory: KeepMemory | None = None
    retriever: Any = dataclasses.field(default=None, metadata={"static": True})


def make_request(
    memgen: MemGen,
    max_new_tokens: int,
    policy: TriggerPolicy = AlwaysInvoke(),  # noqa: B008 (frozen)
    temperature: float = 0.0,
    stop: Sequence[int] = (),
    valid_vocab_size: int | None = None,
    keep_memory: KeepMemory | None = None,
    retriever: Any = None,
) -> Request:
    """Checked numbers of a `Request`.

    Raises:
        ValueError: a number is out of its range; a learned trigger is asked for and there is none,
            or it was never trained; a callable is no pytree.
    """
    _check_pytree("policy", policy)
    _check_policy(policy)
    if policy.learned:
        trigger = memgen.checked_trigger()
        if not getattr(policy, "sample", False):  # training begins with samples of a zero head
            _check_trained(trigger)
    if keep_memory is not None:
        _check_pytree("keep_memory", keep_memory)
    if retriever is not None and memgen.config.weaver.context == "nothing":
        raise ValueError("a retriever, and context='nothing' reads no text: leave one of them out")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: choose 0 or more")
    if not (np.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature={temperature}: choose 0 (greedy) or more")
    vocab = memgen.reasoner.vocab_size
    if valid_vocab_size is not None and not 1 <= valid_vocab_size <= vocab:
        raise ValueError(
            f"valid_vocab_size={valid_vocab_size}: choose from 1 to vocab_size={vocab}"
        )
    return Request(
        policy,
        jnp.float32(temperature) if temperature else None,
        jnp.int32(max_new_tokens),
        jnp.asarray(list(stop), jnp.int32),
        jnp.int32(vocab if valid_vocab_size is None else valid_vocab_size),
        keep_memory,
        retriever,
    )


def _check_trained(trigger: Trigger) -> None:
    kernel = trigger.kernel[...]
    if not isinstance(kernel, Tracer) and not kernel.any():
        raise ValueError(
            "a learned trigger is asked for and its head is zero, it was never trained: train or "
            "load it, or use AlwaysInvoke()"
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
    """One key for each prompt, `[B]`: of the seed, the prompt, and how many equal ones precede."""
    rows = [tuple(prompt) for prompt in prompts]
    repeats = [rows[:index].count(row) for index, row in enumerate(rows)]
    hashes = [zlib.crc32(np.array(row, np.int32).tobytes()) for row in rows]
    fold = jax.vmap(jax.random.fold_in)
    base = jnp.broadcast_to(jax.random.key(seed), (len(rows),))
    return fold(fold(base, jnp.array(hashes, jnp.uint32)), jnp.array(repeats, jnp.uint32))


def pad_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """Rows `[B, C]` padded on the right to a power of two, and their lengths `[B]`.

    Raises:
        ValueError: no prompt, an empty one, or an id outside the vocabulary.
    """
    if len(prompts) == 0:
        raise ValueError("no prompt is given: give at least one")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {index} is empty: give at least one token")
        wrong = [token for token in prompt if not 0 <= token < vocab_size]
        if wrong:
            raise ValueError(
                f"prompt {index} holds token id {wrong[0]}, vocab_size={vocab_size}: "
                "use the tokenizer that the reasoner was trained with"
            )
    tokens = np.zeros((len(prompts), bucket(max(map(len, prompts)))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.array([len(prompt) for prompt in prompts], jnp.int32)


def bucket(size: int) -> int:
    """The power of two, from 16 on, that a size is rounded up to."""
    return max(SHORTEST, 1 << (max(size, 1) - 1).bit_length())

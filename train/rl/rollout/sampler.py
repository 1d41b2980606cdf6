"""Sampling: prompts are prefilled once and shared, each row has a key, programs are few."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import memgen
from memgen import MemGen
from train.devices.mesh import BATCH_AXES, place
from train.rl.buckets import SHORTEST, bucket


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a policy is sampled, and therefore how it is scored.

    Attributes:
        temperature: Sampling temperature of tokens; 0 takes the most probable one.
        valid_vocab_size: Number of ids that are chosen from, from 0.
        stop: Ids that end a response.
        memory: Trigger policy of latent memory, for a policy with a weaver.
        top_p: Probability mass of the fewest most probable tokens that are sampled from; None for
            all, as in training, which scores tokens without it.
    """

    temperature: float
    valid_vocab_size: int
    stop: tuple[int, ...]
    memory: memgen.TriggerPolicy = memgen.NeverInvoke()  # noqa: RUF009 (frozen)
    top_p: float | None = None


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One sampled response.

    Attributes:
        tokens: Ids of the response, `[T]`, with the stop id.
        log_probs: Log-probability of each token at the sampling temperature, `[T]` float32.
        decisions: Decision before each token (`memgen.Response`), `[T]` int8.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    decisions: np.ndarray


class Sampler:
    """Sampler of one set of weights.

    Programs depend on buckets of rows, of prompts and of lengths, which are powers of two: one is
    compiled for each combination and reused.

    Args:
        policy: Policy as a `MemGen` (`train.rl.learning.policy.sampler_of`).
        sampling: Temperature, stop ids and so on.
        max_rows: Greatest number of rows that are generated at a time.
        mesh: Mesh whose devices share the rows.

    Raises:
        ValueError: The policy can't be cached.
    """

    def __init__(self, policy: MemGen, sampling: Sampling, max_rows: int, mesh: Mesh):
        self.policy, self.sampling, self.max_rows, self._mesh = policy, sampling, max_rows, mesh
        self._shards = math.prod(mesh.shape[name] for name in BATCH_AXES)
        self._kept: _Prefilled | None = None
        self.prefills = 0  # number of prompts that were prefilled so far
        self.request = memgen.make_request(
            policy,
            0,
            sampling.memory,
            sampling.temperature,
            sampling.stop,
            sampling.valid_vocab_size,
            top_p=sampling.top_p,
        )

    def open(
        self,
        prompts: Sequence[Sequence[int]],
        source: Sequence[int],
        keys: jax.Array,
        more_tokens: int,
        responses: int = 1,
    ) -> "Conversation":
        """Prefill each prompt once, and share it among the rows that begin with it.

        A call of `max_rows` rows, most of which share a prompt, keeps its prefilled prompts for the
        next call, where the rows of a problem may go on.

        Args:
            prompts: Ids of the different prompts.
            source: Index of the prompt of each row, `R` of them.
            keys: Random key of each row, `[R]` (`row_keys`).
            more_tokens: Capacity of a row for tokens after the prompt.
            responses: Number of responses of a row whose latents the cache has capacity for.
        """
        rows, many = len(source), self._rows(len(source))
        texts = [tuple(prompt) for prompt in prompts]
        capacity = (bucket(more_tokens, SHORTEST), responses)
        kept = self._kept
        if kept and kept.capacity == capacity and kept.index.keys() >= set(texts):
            prefilled = kept
        else:
            self._kept = kept = None  # its memory is needed
            prefilled = self._prefill(texts, keys, capacity)
        shared = rows == self.max_rows and 2 * len(prefilled.index) <= rows
        self._kept = prefilled if shared else None
        index = np.zeros(many, np.int32)
        index[:rows] = [prefilled.index[texts[prompt]] for prompt in source]
        keys = keys[jnp.minimum(jnp.arange(many), rows - 1)]
        session = _take(self.policy, prefilled.session, self._place(index), keys)
        return Conversation(self, session, rows)

    def _prefill(
        self, texts: Sequence[tuple[int, ...]], keys: jax.Array, capacity: tuple[int, int]
    ) -> "_Prefilled":
        tokens, length = _padded(texts, self._rows(len(texts)), 1)
        more_tokens, responses = capacity
        unused = jnp.broadcast_to(keys[0], tokens.shape[:1])  # rows get keys when they are taken
        session = memgen.begin(
            self.policy, self._place(tokens), self._place(length), unused,
            tokens.shape[1] + more_tokens, responses,
        )  # fmt: skip
        self.prefills += len(texts)
        return _Prefilled(session, {text: row for row, text in enumerate(texts)}, capacity)

    def _rows(self, count: int) -> int:
        return bucket(count, self._shards)

    def _place(self, rows: np.ndarray) -> jax.Array:
        return place(rows, self._mesh)


class Conversation:
    """`R` rows in the middle of generation; compiled programs see a bucket of rows."""

    def __init__(self, sampler: Sampler, session: Any, rows: int):
        self._sampler, self._session, self._rows = sampler, session, rows

    def respond(self, max_new_tokens: int, active: np.ndarray | None = None) -> list[Sampled]:
        """Responses of up to `max_new_tokens` tokens in active rows, empty ones in the others.

        Args:
            max_new_tokens: Longest response.
            active: Rows that respond, `[R]` bool; all if not given.

        Raises:
            FloatingPointError: The logits are NaN.
        """
        sampler, many = self._sampler, self._session.keys.shape[0]
        limit = np.zeros(many, np.int32)
        limit[: self._rows] = max_new_tokens
        if active is not None:
            limit[: self._rows] *= active
        request = dataclasses.replace(sampler.request, max_new_tokens=sampler._place(limit))
        response, self._session = memgen.respond(
            sampler.policy, self._session, request, bucket(max_new_tokens, SHORTEST)
        )
        arrays = jax.device_get(
            (response.count, response.tokens, response.log_probs, response.decisions)
        )
        count, tokens, log_probs, decisions = (array[: self._rows] for array in arrays)
        if not np.isfinite(log_probs).all():
            raise FloatingPointError("the policy's logits are NaN: it has diverged")
        if isinstance(sampler.sampling.memory, memgen.NeverInvoke):
            decisions = np.full_like(decisions, -1)  # none was made
        rows = zip(count, tokens, log_probs, decisions, strict=True)
        return [Sampled(*(part[:written] for part in parts)) for written, *parts in rows]

    def observe(self, observations: Sequence[Sequence[int]]) -> None:
        """Prefill observations, one for each row; an empty one changes nothing."""
        tokens, length = _padded(observations, self._session.keys.shape[0], 0)
        if length.any():
            place = self._sampler._place
            self._session = memgen.observe(
                self._sampler.policy, self._session, place(tokens), place(length)
            )


def row_keys(seed: Sequence[int], uids: Sequence[str], samples: Sequence[int]) -> jax.Array:
    """Random key of each row, `[R]`, derived from the seed, its problem and its index.

    So a row's text depends neither on the rows beside it nor on their order.

    Args:
        seed: Numbers such as those of a run and a step.
        uids: Name of the problem of each row.
        samples: Index of each row among the rollouts of its problem.
    """
    fold = jax.vmap(jax.random.fold_in)
    base = functools.reduce(jax.random.fold_in, seed[1:], jax.random.key(seed[0]))
    hashes = np.array([zlib.crc32(uid.encode()) for uid in uids], np.uint32)
    rows = jnp.broadcast_to(base, hashes.shape)
    return fold(fold(rows, jnp.asarray(hashes)), jnp.asarray(samples, jnp.uint32))


@dataclasses.dataclass(frozen=True)
class _Prefilled:
    """Prefilled prompts.

    Attributes:
        session: Session of which each row holds a prompt.
        index: Row of each prompt in the session, by its ids.
        capacity: Capacity of a row for tokens after the prompt, and number of responses.
    """

    session: Any
    index: Mapping[tuple[int, ...], int]
    capacity: tuple[int, int]


@jax.jit
def _take(policy, session, source, keys):
    return session.take_rows(policy, source, keys)


def _padded(
    texts: Sequence[Sequence[int]], rows: int, shortest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Texts as `[rows, C]` int32 padded on the right and their lengths; padding rows last."""
    length = np.full(rows, shortest, np.int32)
    length[: len(texts)] = [len(text) for text in texts]
    tokens = np.zeros((rows, bucket(int(length.max()), SHORTEST)), np.int32)
    for row, text in zip(tokens, texts, strict=False):
        row[: len(text)] = text
    return tokens, length

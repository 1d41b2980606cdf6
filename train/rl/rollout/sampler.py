"""Sampling of responses, with shared prefills of prompts and a PRNG key for each row."""

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
from memgen.checks import on_host
from train.devices.mesh import batch_axes, place
from train.rl.buckets import SHORTEST, bucket


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings with which responses are sampled and the learner scores their tokens.

    Attributes:
        temperature: Sampling temperature of tokens; 0 takes the most probable token.
        valid_vocab_size: Number of ids to sample from, counted from id 0.
        stop: Ids that end a response.
        trigger_policy: Rule that decides when latents are woven, for a policy with a weaver.
        top_p: Probability mass of nucleus sampling: the fewest most probable tokens with at least
            this mass are sampled from. None samples from all tokens, as in training.
    """

    temperature: float
    valid_vocab_size: int
    stop: tuple[int, ...]
    trigger_policy: memgen.TriggerPolicy = memgen.NeverInvoke()  # noqa: RUF009 (frozen)
    top_p: float | None = None


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One sampled response.

    Attributes:
        tokens: Ids of the response, `[T]` int32, including the stop id.
        log_probs: Log-probability of each token at the sampling temperature, `[T]` float32.
        decisions: Decision of the trigger before each token, `[T]` int8: -1 for no decision, 0 for
            skip, 1 for invoke.
        latents: Latents that were woven into the response, `[E, K, D]`: K latents of width D for
            each of the E decisions to invoke; None unless `Conversation.respond` gets `events`.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    decisions: np.ndarray
    latents: np.ndarray | None = None


class Sampler:
    """Sampler of responses of a policy with fixed parameters.

    The numbers of rows, prompts and tokens are rounded up to buckets, which are powers of two (for
    rows, times the number of shards). One program is compiled for each combination and reused.

    Args:
        policy: Policy as a `MemGen` (`train.rl.learning.policy.sampler_of`).
        sampling: Temperature, stop ids and other settings.
        max_rows: Maximum number of rows to generate at the same time.
        mesh: Mesh over whose devices the rows are sharded.

    Raises:
        ValueError: The policy does not support cached decoding, or a setting is invalid.
    """

    def __init__(self, policy: MemGen, sampling: Sampling, max_rows: int, mesh: Mesh):
        # For many calls of few tokens, none of which copies blocks out of their stack.
        self.policy, self.sampling = policy.for_decoding(), sampling
        self.max_rows, self._mesh = max_rows, mesh
        self._shards = math.prod(mesh.shape[name] for name in batch_axes(mesh))
        self._kept: _Prefilled | None = None
        self.prefills = 0  # number of prompts that were prefilled so far
        self.generated = 0  # number of tokens that were sampled so far
        self.request = memgen.make_request(
            self.policy,
            0,
            sampling.trigger_policy,
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
        """Prefill each prompt once, and begin a conversation whose rows share these prefills.

        After a call with `max_rows` rows and at most half as many prompts, the prefilled prompts
        are kept for the next call, which may sample more rows of the same problems.

        Args:
            prompts: Ids of the different prompts.
            source: Index of the prompt of each row, `R` of them.
            keys: PRNG key of each row, `[R]` (`row_keys`).
            more_tokens: Capacity of a row for tokens after the prompt.
            responses: Number of responses for whose latents a row has capacity.
        """
        rows, many = len(source), self.padded_rows(len(source))
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
        session = take_rows(self.policy, prefilled.session, self.place(index), keys)
        return Conversation(self, session, rows)

    def _prefill(
        self, texts: Sequence[tuple[int, ...]], keys: jax.Array, capacity: tuple[int, int]
    ) -> "_Prefilled":
        tokens, length = padded(texts, self.padded_rows(len(texts)), 1)
        more_tokens, responses = capacity
        unused = jnp.broadcast_to(keys[0], tokens.shape[:1])  # `take_rows` sets the keys
        session = memgen.begin(
            self.policy, self.place(tokens), self.place(length), unused,
            tokens.shape[1] + more_tokens, responses,
        )  # fmt: skip
        self.prefills += len(texts)
        return _Prefilled(session, {text: row for row, text in enumerate(texts)}, capacity)

    @property
    def weaves(self) -> bool:
        """Whether the trigger policy can weave latents into responses."""
        return not isinstance(self.sampling.trigger_policy, memgen.NeverInvoke)

    def padded_rows(self, count: int) -> int:
        """Round a number of rows up to the bucket that programs are compiled for."""
        return bucket(count, self._shards)

    def place(self, rows: np.ndarray) -> jax.Array:
        """Put an array `[R, ...]` on the mesh, sharded over its rows."""
        return place(rows, self._mesh)


class Conversation:
    """`R` rows in the middle of generation, padded with unused rows for the compiled programs.

    Args:
        sampler: Sampler of the rows.
        session: Session of at least `rows` rows, of which the first `rows` are used.
        rows: Number of rows in use (`R`).
    """

    def __init__(self, sampler: Sampler, session: Any, rows: int):
        self._sampler, self.session, self._rows = sampler, session, rows

    def respond(
        self,
        max_new_tokens: int,
        active: np.ndarray | None = None,
        *,
        limits: np.ndarray | None = None,
        events: np.ndarray | None = None,
    ) -> list[Sampled]:
        """Sample a response in each active row.

        Args:
            max_new_tokens: Maximum number of tokens per response.
            active: Whether each row responds, `[R]` bool; all rows by default.
            limits: Maximum number of tokens in each row's response, `[R]` int, each at most
                `max_new_tokens`; the same for all rows by default.
            events: Number of latent-memory events so far of the response that each row continues,
                not counting an event before its first token, `[R]` int; -1 for rows that begin a
                response. If given, the latents are returned too.

        Returns:
            The response of each of the `R` rows; responses of inactive rows are empty.

        Raises:
            FloatingPointError: A log-probability is not finite, since the logits are NaN.
        """
        sampler, many = self._sampler, self.session.keys.shape[0]
        limit = np.zeros(many, np.int32)
        limit[: self._rows] = max_new_tokens if limits is None else limits
        if active is not None:
            limit[: self._rows] *= active
        request = dataclasses.replace(sampler.request, max_new_tokens=sampler.place(limit))
        if events is not None:
            before = np.full(many, -1, np.int32)
            before[: self._rows] = events
            request = dataclasses.replace(request, events=sampler.place(before))
        response, self.session = memgen.respond(
            sampler.policy, self.session, request, bucket(max_new_tokens, SHORTEST)
        )
        arrays = _fetch((response.count, response.tokens, response.log_probs, response.decisions))
        count, tokens, log_probs, decisions = (array[: self._rows] for array in arrays)
        if not np.isfinite(log_probs).all():
            raise FloatingPointError("the policy's logits are NaN: it has diverged")
        sampler.generated += int(count.sum())
        if not sampler.weaves:
            decisions = np.full_like(decisions, -1)  # no decision was made
        rows = zip(count, tokens, log_probs, decisions, strict=True)
        found = [Sampled(*(part[:written] for part in parts)) for written, *parts in rows]
        if events is None:
            return found
        points, latents = _fetch((response.points, response.latents))
        rows = zip(found, points, latents, strict=False)
        return [dataclasses.replace(one, latents=new[at >= 0]) for one, at, new in rows]

    def observe(self, observations: Sequence[Sequence[int]]) -> None:
        """Append an observation's ids to each row by a prefill; a row without ids is unchanged."""
        tokens, length = padded(observations, self.session.keys.shape[0], 0)
        if length.any():
            place = self._sampler.place
            self.session = memgen.observe(
                self._sampler.policy, self.session, place(tokens), place(length)
            )


def row_keys(seed: Sequence[int], uids: Sequence[str], samples: Sequence[int]) -> jax.Array:
    """Derive the PRNG key of each row from the seed, the row's problem and the row's number.

    A row's text therefore depends neither on the other rows of the batch nor on their order.

    Args:
        seed: Numbers such as the seed of the run and the step, at least one.
        uids: Name of the problem of each row, `R` of them.
        samples: Index of each row among the rollouts of its problem, `R` of them.

    Returns:
        Array of PRNG keys, `[R]`.
    """
    hashes = np.array([zlib.crc32(uid.encode()) for uid in uids], np.uint32)
    return _fold_rows(_base_key(tuple(seed)), hashes, np.array(samples, np.uint32))


@functools.lru_cache(maxsize=64)
def _base_key(seed: tuple[int, ...]) -> jax.Array:
    return functools.reduce(jax.random.fold_in, seed[1:], jax.random.key(seed[0]))


@jax.jit
def _fold_rows(base: jax.Array, hashes: jax.Array, samples: jax.Array) -> jax.Array:
    fold = jax.vmap(jax.random.fold_in)
    return fold(fold(jnp.broadcast_to(base, hashes.shape), hashes), samples)


@dataclasses.dataclass(frozen=True)
class _Prefilled:
    """Prefilled prompts, which rows of several conversations may share.

    Attributes:
        session: Session whose rows hold the prefilled prompts.
        index: Dict from the ids of a prompt to its row in the session.
        capacity: Capacity of a row for tokens after the prompt, and for responses with latents.
    """

    session: Any
    index: Mapping[tuple[int, ...], int]
    capacity: tuple[int, int]


def _fetch(arrays: tuple[jax.Array, ...]) -> tuple[np.ndarray, ...]:
    """Copy arrays to the host, from all processes if there are several."""
    if jax.process_count() == 1:
        return jax.device_get(arrays)
    return tuple(map(on_host, arrays))


@jax.jit
def take_rows(policy, session, source, keys):
    """Copy rows of a session into a new session; `Session.take_rows` as a compiled program.

    Args:
        policy: Policy as a `MemGen`.
        session: Session to copy from.
        source: Index of the row that each new row copies, `[R]` int32.
        keys: PRNG key of each of the `R` new rows, `[R]`.
    """
    return session.take_rows(policy, source, keys)


def padded(
    texts: Sequence[Sequence[int]], rows: int, shortest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pad texts on the right with 0 to a common length `C`, rounded up to a bucket.

    Args:
        texts: Ids of each text.
        rows: Number of rows of the result; rows after those of the texts are padding.
        shortest: Length of padding rows.

    Returns:
        Ids `[rows, C]` int32, and lengths `[rows]` int32.
    """
    length = np.full(rows, shortest, np.int32)
    length[: len(texts)] = [len(text) for text in texts]
    tokens = np.zeros((rows, bucket(int(length.max()), SHORTEST)), np.int32)
    for row, text in zip(tokens, texts, strict=False):
        row[: len(text)] = text
    return tokens, length

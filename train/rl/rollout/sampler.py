"""Sampling: prompts are read once and shared, rows are random by themselves, programs are few."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Sequence
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
        temperature: of tokens; 0 takes the most probable one.
        valid_vocab_size: only ids below it are chosen.
        stop: ids that end a text.
        memory: when a policy with a weaver weaves.
    """

    temperature: float
    valid_vocab_size: int
    stop: tuple[int, ...]
    memory: memgen.TriggerPolicy = memgen.NeverInvoke()  # noqa: RUF009 (frozen)


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One response.

    Attributes:
        tokens: ids, the one that ended it among them.
        log_probs: float32 of each, at the temperature of sampling.
        decisions: int8 before each (`memgen.Response`).
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    decisions: np.ndarray


class Sampler:
    """Samples from one set of weights.

    Programs depend on buckets of rows, of prompts and of lengths, which are powers of two: one is
    compiled for each combination and found again.

    Args:
        policy: a `MemGen` (`train.rl.learning.policy.sampler_of`).
        how: temperature and so on.
        max_rows: rows that are generated at a time.
        mesh: what rows are spread over.

    Raises:
        ValueError: the policy can't be cached.
    """

    def __init__(self, policy: MemGen, how: Sampling, max_rows: int, mesh: Mesh):
        self.policy, self.how, self.max_rows, self._mesh = policy, how, max_rows, mesh
        self._shards = math.prod(mesh.shape[name] for name in BATCH_AXES)
        self.request = memgen.make_request(
            policy, 0, how.memory, how.temperature, how.stop, how.valid_vocab_size
        )

    def open(
        self,
        prompts: Sequence[Sequence[int]],
        source: Sequence[int],
        keys: jax.Array,
        more_tokens: int,
        responses: int = 1,
    ) -> "Conversation":
        """Read each prompt once, and go on from it in as many rows as ask for it.

        Args:
            prompts: ids.
            source: for each row the prompt that it begins with.
            keys: `[R]`, one for each row (`row_keys`).
            more_tokens: room for tokens after the prompts, and
            responses: for the latents of so many responses.
        """
        rows, many = len(source), self._rows(len(source))
        tokens, length = _padded(prompts, self._rows(len(prompts)), 1)
        index = np.zeros(many, np.int32)
        index[:rows] = source
        keys = keys[jnp.minimum(jnp.arange(many), rows - 1)]
        room = tokens.shape[1] + bucket(more_tokens, SHORTEST)
        session = _open(
            self.policy, self._place(tokens), self._place(length), self._place(index), keys,
            room, responses,
        )  # fmt: skip
        return Conversation(self, session, rows)

    def _rows(self, count: int) -> int:
        return bucket(count, self._shards)

    def _place(self, rows: np.ndarray) -> jax.Array:
        return place(rows, self._mesh)


class Conversation:
    """Rows that are being written, `R` of them; what is compiled sees a bucket of rows."""

    def __init__(self, sampler: Sampler, session: Any, rows: int):
        self._sampler, self._session, self._rows = sampler, session, rows

    def respond(self, max_new_tokens: int, active: np.ndarray | None = None) -> list[Sampled]:
        """Up to so many new tokens in each active row; an empty response in the others.

        Args:
            active: `[R]` bool; all if not given.

        Raises:
            FloatingPointError: logits are NaN.
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
        if isinstance(sampler.how.memory, memgen.NeverInvoke):
            decisions = np.full_like(decisions, -1)  # nobody is asked
        rows = zip(count, tokens, log_probs, decisions, strict=True)
        return [Sampled(*(part[:written] for part in parts)) for written, *parts in rows]

    def observe(self, observations: Sequence[Sequence[int]]) -> None:
        """Read more in each row; nothing where there is nothing."""
        tokens, length = _padded(observations, self._session.keys.shape[0], 0)
        if length.any():
            place = self._sampler._place
            self._session = memgen.observe(
                self._sampler.policy, self._session, place(tokens), place(length)
            )


def row_keys(seed: Sequence[int], uids: Sequence[str], samples: Sequence[int]) -> jax.Array:
    """One key for each row, `[R]`: of the seed, its problem, and its number among its rollouts.

    So a row's text depends neither on the rows beside it nor on their order.

    Args:
        seed: numbers, e.g. of a run and a step.
    """
    fold = jax.vmap(jax.random.fold_in)
    base = functools.reduce(jax.random.fold_in, seed[1:], jax.random.key(seed[0]))
    hashes = np.array([zlib.crc32(uid.encode()) for uid in uids], np.uint32)
    rows = jnp.broadcast_to(base, hashes.shape)
    return fold(fold(rows, jnp.asarray(hashes)), jnp.asarray(samples, jnp.uint32))


@functools.partial(jax.jit, static_argnames=("room", "responses"))
def _open(policy, tokens, length, source, keys, room, responses):
    nobody = jnp.broadcast_to(keys[0], tokens.shape[:1])  # rows get their keys when they are taken
    session = memgen.begin(policy, tokens, length, nobody, room, responses)
    return session.take_rows(policy, source, keys)


def _padded(
    texts: Sequence[Sequence[int]], rows: int, shortest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Texts as `[rows, C]` int32 padded on the right and their lengths; filler rows last."""
    length = np.full(rows, shortest, np.int32)
    length[: len(texts)] = [len(text) for text in texts]
    tokens = np.zeros((rows, bucket(int(length.max()), SHORTEST)), np.int32)
    for row, text in zip(tokens, texts, strict=False):
        row[: len(text)] = text
    return tokens, length

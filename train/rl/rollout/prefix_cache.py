"""LRU cache of the decoding states of prefixes that a search may continue, limited in bytes."""

import collections
import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import memgen
from memgen.insertion import INFERENCE
from memgen.session import Session
from train.rl.rollout.sampler import Conversation, Sampler, padded, row_keys, take_rows

_PARTS = 4


@dataclasses.dataclass(frozen=True)
class Prefix:
    """A text (prompt, responses, observations) that new responses continue.

    Attributes:
        key: Name of the prefix in the cache.
        tokens: Ids of the text.
        points: Index of the token after each event of latent memory in the text.
        kinds: Kind of each event, `PROMPT` or `INFERENCE` (`memgen.insertion`).
        latents: Latents of each event, `[K, D]` each: K latents of width D.
    """

    key: Hashable
    tokens: Sequence[int]
    points: Sequence[int] = ()
    kinds: Sequence[int] = ()
    latents: Sequence[np.ndarray] = ()


class PrefixCache:
    """LRU cache whose slots hold the decoding state (caches and latents) of one prefix each.

    All slots are rows of one session of fixed size. Two compiled programs copy rows out of this
    session and into it; their cost depends only on the number of copied rows. A prefix that is not
    in the cache is prefilled again, with the latents that were woven into it.

    Args:
        sampler: Sampler whose conversations are branched.
        batch: Maximum number of rows in a call. Programs are compiled for at least a quarter of
            this number, so that few programs are compiled.
        useful: Maximum number of prefixes that can be needed; further slots would stay unused.
        max_bytes: Maximum number of bytes of all slots.
        max_tokens: Capacity of a row in tokens.
        responses: Number of responses for whose latents a row has capacity.

    Raises:
        ValueError: `max_bytes` is too small for one row on each shard of the mesh.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch: int,
        useful: int,
        max_bytes: float,
        max_tokens: int,
        responses: int,
    ):
        self._sampler, self._max_tokens, self._responses = sampler, max_tokens, responses
        self._least = sampler.padded_rows(batch) // _PARTS
        least = sampler.padded_rows(1)
        of_row = row_bytes(sampler.policy, max_tokens, responses)
        fitting = int(max_bytes // of_row) // least * least
        if not fitting:
            raise ValueError(
                f"cache_mib={max_bytes / 2**20:g} holds no prefix: {least} of {max_tokens} tokens "
                f"take {least * of_row / 2**20:.3g} MiB: raise it"
            )
        self.capacity = min(sampler.padded_rows(useful), fitting)
        """Number of slots."""
        self._session: Any = None
        self._slots: collections.OrderedDict[Hashable, int] = collections.OrderedDict()
        self._free = list(range(self.capacity))[::-1]
        self._evicted: set[Hashable] = set()
        self.prefills = 0
        """Number of prefixes that were prefilled."""
        self.prefilled_tokens = 0
        """Number of tokens of the prefilled prefixes."""
        self.reprefills = 0
        """Number of prefixes that were prefilled again after an eviction."""
        self.reused_tokens = 0
        """Number of tokens of branched prefixes that did not have to be prefilled."""

    def branch(
        self, prefixes: Sequence[Prefix], seed: Sequence[int], names: Sequence[str],
        numbers: Sequence[int],
    ) -> Conversation:  # fmt: skip
        """Return a conversation whose rows continue the given prefixes.

        Args:
            prefixes: Prefix of each row, at most `capacity` different ones.
            seed: Numbers that all randomness is derived from.
            names: Name of the problem of each row.
            numbers: Number of each row among the rows of its problem. Seed, name and number decide
                the row's sampling noise (`row_keys`).
        """
        different = {prefix.key: prefix for prefix in prefixes}
        for key in different:
            if key in self._slots:
                self._slots.move_to_end(key)
        missing = [prefix for key, prefix in different.items() if key not in self._slots]
        rows, many = len(prefixes), self._rows(len(prefixes))
        padded_to = [*range(rows), *[0] * (many - rows)]  # the first row again
        keys = row_keys(
            seed, [names[row] for row in padded_to], [numbers[row] for row in padded_to]
        )
        if missing:
            self._prefill(missing, keys)
        self.reused_tokens += sum(len(prefix.tokens) for prefix in prefixes)
        self.reused_tokens -= sum(len(prefix.tokens) for prefix in missing)
        index = np.zeros(many, np.int32)
        index[:rows] = [self._slots[prefix.key] for prefix in prefixes]
        sampler = self._sampler
        session = _branch_rows(sampler.policy, self._session, sampler.place(index), keys)
        return Conversation(sampler, session, rows)

    def hold(self, conversation: Conversation, rows: Sequence[int], keys: Sequence[Hashable]):
        """Copy some rows of a conversation into slots; only the last `capacity` of them are kept.

        Args:
            conversation: Conversation, which must not be continued afterwards.
            rows: Indices of the rows.
            keys: Key in the cache of the prefix that each of these rows has become.
        """
        for key in keys[: -self.capacity]:
            self._evicted.add(key)
        rows, keys = rows[-self.capacity :], keys[-self.capacity :]
        if keys:
            self._put(conversation.session, rows, keys)

    def release(self, keys: Sequence[Hashable]) -> None:
        """Free the slots of the prefixes with these keys, which will not be continued any more."""
        for key in keys:
            self._evicted.discard(key)
            if key in self._slots:
                self._free.append(self._slots.pop(key))

    def _rows(self, count: int) -> int:
        return max(self._sampler.padded_rows(count), self._least)

    def _prefill(self, prefixes: Sequence[Prefix], keys: jax.Array) -> None:
        sampler = self._sampler
        texts = [prefix.tokens for prefix in prefixes]
        tokens, length = padded(texts, self._rows(len(texts)), 1)
        tokens = tokens[:, : self._max_tokens]
        unused = jnp.broadcast_to(keys[0], tokens.shape[:1])  # `take_rows` sets the keys
        given = sampler.policy, sampler.place(tokens), sampler.place(length)
        if any(len(prefix.points) for prefix in prefixes):
            plan, latents = self._events(prefixes, len(tokens))
            session = memgen.replay(
                *given, plan, latents, unused, self._max_tokens, self._responses
            )
        else:
            session = memgen.begin(*given, unused, self._max_tokens, self._responses)
        sampler.prefills += len(texts)
        self.prefills += len(texts)
        self.prefilled_tokens += sum(map(len, texts))
        self.reprefills += sum(prefix.key in self._evicted for prefix in prefixes)
        if self._session is None:
            index = sampler.place(np.zeros(self.capacity, np.int32))
            same = jnp.broadcast_to(keys[0], (self.capacity,))
            self._session = take_rows(sampler.policy, session, index, same)
        self._put(session, range(len(prefixes)), [prefix.key for prefix in prefixes])

    def _events(self, prefixes: Sequence[Prefix], rows: int) -> tuple[memgen.Plan, jax.Array]:
        """Make the plan and the latents, `[B, E, K, D]`, of `E` events of each of `B` prefixes."""
        config = self._sampler.policy.config
        events = self._responses * config.events
        point, kind = np.full((rows, events), -1, np.int32), np.full((rows, events), INFERENCE)
        one = next(new for prefix in prefixes for new in prefix.latents)
        latents = np.zeros((rows, events, *one.shape), one.dtype)
        for row, prefix in enumerate(prefixes):
            point[row, : len(prefix.points)] = prefix.points
            kind[row, : len(prefix.points)] = prefix.kinds
            for event, new in enumerate(prefix.latents):
                latents[row, event] = new
        place = self._sampler.place
        plan = memgen.Plan.of(place(point), place(kind.astype(np.int32)), config)
        return plan, place(latents)

    def _put(self, session: Any, rows: Sequence[int], keys: Sequence[Hashable]) -> None:
        """Copy rows of a session into slots; there are at most as many rows as slots."""
        many = session.keys.shape[0]
        source = np.zeros(many, np.int32)
        target = np.full(many, self.capacity, np.int32)  # beyond the slots: nothing is written
        source[: len(rows)] = rows
        for index, key in enumerate(keys):
            target[index] = self._slots[key] = self._slot()
            self._evicted.discard(key)
        place = self._sampler.place
        self._session = _put_rows(
            self._sampler.policy, self._session, session, place(source), place(target)
        )

    def _slot(self) -> int:
        """Take a free slot, or evict the least recently used prefix and take its slot."""
        if self._free:
            return self._free.pop()
        key, slot = self._slots.popitem(last=False)
        self._evicted.add(key)
        return slot


def _axes(policy: Any, session: Any) -> Any:
    """Return the axis of the rows in each array of a session; None if all rows share the array."""
    weaver = None if session.weaver is None else policy.weaving()
    trigger = None if session.trigger is None else policy.triggering()
    return session.batch_axes(policy.reasoner, weaver, trigger)


@jax.jit
def _branch_rows(policy, slots, source, keys):
    session = slots.take_rows(policy, source, keys)
    # Noise depends on the keys alone, not on whether the prefix was cached or prefilled again.
    return session.replace(responses=jnp.zeros_like(session.responses))


@functools.partial(jax.jit, donate_argnames="slots")
def _put_rows(policy, slots, session, source, target):
    def put(old, new, axis):
        if axis is None:
            return new
        at = (slice(None),) * axis + (target,)
        return old.at[at].set(jnp.take(new, source, axis=axis), mode="drop")

    return jax.tree.map(put, slots, session, _axes(policy, session))


def row_bytes(policy: Any, max_tokens: int, responses: int) -> int:
    """Compute the number of bytes of the cached state of one row.

    Args:
        policy: Policy as a `MemGen`.
        max_tokens: Capacity of the row in tokens.
        responses: Number of responses for whose latents the row has capacity.
    """

    def start(policy: Any) -> Session:
        return Session.start(policy, jax.random.split(jax.random.key(0), 1), max_tokens, responses)

    session = jax.eval_shape(start, policy)
    sizes = jax.tree.map(
        lambda leaf, axis: 0 if axis is None else leaf.size * getattr(leaf.dtype, "itemsize", 8),
        session,
        _axes(policy, session),
    )
    return sum(jax.tree.leaves(sizes))

"""Cached state of the prefixes that a search may go on from, within a limit of bytes."""

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
    """A text that responses go on from.

    Attributes:
        key: Name of the prefix.
        tokens: Ids of the text, prompt, responses and observations.
        points: Index of the token after each event of latent memory in the text.
        kinds: Kind of each event, `PROMPT` or `INFERENCE` (`memgen.insertion`).
        latents: Latents of each event, `[K, D]` each.
    """

    key: Hashable
    tokens: Sequence[int]
    points: Sequence[int] = ()
    kinds: Sequence[int] = ()
    latents: Sequence[np.ndarray] = ()


class PrefixCache:
    """Slots for the cached rows of prefixes; the least recently used one is evicted.

    All slots are one session of fixed size, so that taking rows out and putting rows in are two
    programs whose work goes with the rows that are moved. A prefix that is not held is prefilled
    again, with the latents that were woven in it.

    Args:
        sampler: Sampler whose conversations are branched.
        batch: Greatest number of rows of a call, of which programs take a quarter at least, so that
            few are compiled.
        useful: Number of prefixes for which slots are useful.
        max_bytes: Greatest number of bytes of all slots.
        max_tokens: Number of tokens that fit into a row.
        responses: Number of responses of a row whose latents it has capacity for.

    Raises:
        ValueError: Not even one prefix fits into the bytes.
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
        self._least = sampler.rows(batch) // _PARTS
        least = sampler.rows(1)
        of_row = row_bytes(sampler.policy, max_tokens, responses)
        fitting = int(max_bytes // of_row) // least * least
        if not fitting:
            raise ValueError(
                f"cache_mib={max_bytes / 2**20:g} holds no prefix: {least} of {max_tokens} tokens "
                f"take {least * of_row / 2**20:.3g} MiB: raise it"
            )
        self.capacity = min(sampler.rows(useful), fitting)
        """Number of slots."""
        self._session: Any = None
        self._slots: collections.OrderedDict[Hashable, int] = collections.OrderedDict()
        self._free = list(range(self.capacity))[::-1]
        self._evicted: set[Hashable] = set()
        self.prefills = 0
        """Number of prefixes that were prefilled."""
        self.prefilled_tokens = 0
        """Number of tokens of them."""
        self.reprefills = 0
        """Number of prefixes that were prefilled again, as they had been evicted."""
        self.reused_tokens = 0
        """Number of tokens of branched prefixes that were not processed again."""

    def branch(
        self, prefixes: Sequence[Prefix], seed: Sequence[int], names: Sequence[str],
        numbers: Sequence[int],
    ) -> Conversation:  # fmt: skip
        """Rows that go on from prefixes, which may be equal.

        Args:
            prefixes: Prefix of each row, at most `capacity` different ones.
            seed: Numbers that all randomness is derived from.
            names: Name of the problem of each row.
            numbers: Number of each row among those of its problem; with the name and the seed it
                decides the row's noise (`row_keys`).
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
        """Hold the state of some rows of a conversation; the last ones where all are too many.

        Args:
            conversation: Conversation, which can't go on itself afterwards.
            rows: Rows of it.
            keys: Name of the prefix that each of the rows now is.
        """
        for key in keys[: -self.capacity]:
            self._evicted.add(key)
        rows, keys = rows[-self.capacity :], keys[-self.capacity :]
        if keys:
            self._put(conversation.session, rows, keys)

    def release(self, keys: Sequence[Hashable]) -> None:
        """Give up prefixes that nothing goes on from any more."""
        for key in keys:
            self._evicted.discard(key)
            if key in self._slots:
                self._free.append(self._slots.pop(key))

    def _rows(self, count: int) -> int:
        return max(self._sampler.rows(count), self._least)

    def _prefill(self, prefixes: Sequence[Prefix], keys: jax.Array) -> None:
        sampler = self._sampler
        texts = [prefix.tokens for prefix in prefixes]
        tokens, length = padded(texts, self._rows(len(texts)), 1)
        tokens = tokens[:, : self._max_tokens]
        unused = jnp.broadcast_to(keys[0], tokens.shape[:1])  # rows get keys when they are taken
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
        """Plan and latents `[B, E, K, D]` of all events of some prefixes."""
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
        """Copy rows of a session into slots, at most as many as there are."""
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
        """A free slot, for which the least recently used prefix may have to go."""
        if self._free:
            return self._free.pop()
        key, slot = self._slots.popitem(last=False)
        self._evicted.add(key)
        return slot


def _axes(policy: Any, session: Any) -> Any:
    """The axis of the rows in each array of a session, None for an array that all rows share."""
    weaver = None if session.weaver is None else policy.weaving()
    trigger = None if session.trigger is None else policy.triggering()
    return session.batch_axes(policy.reasoner, weaver, trigger)


@jax.jit
def _branch_rows(policy, slots, source, keys):
    session = slots.take_rows(policy, source, keys)
    # Noise goes by the keys alone, whether the prefix was held or prefilled again.
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
    """Number of bytes of the cached state of a row.

    Args:
        policy: Policy as a `MemGen`.
        max_tokens: Number of tokens that fit into the row.
        responses: Number of responses of the row whose latents it has capacity for.
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

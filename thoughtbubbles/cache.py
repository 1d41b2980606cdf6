"""Cached decoding: what is kept of the tokens so far, and how the next ones are read.

What a causal policy decides about a token is final, so keys and values are only ever appended and
any split of a row into chunks gives what the blockwise forward pass gives, to float noise.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from thoughtbubbles.attention import attend_cached
from thoughtbubbles.bubbles import bubbles_of
from thoughtbubbles.config import ModelConfig
from thoughtbubbles.layers import Block, Geometry
from thoughtbubbles.policies import append
from thoughtbubbles.policy import CausalPolicy
from thoughtbubbles.streams import Streams

if TYPE_CHECKING:
    from thoughtbubbles.model import Thoughtbubbles

EXECUTION_FIELDS = {"scan_layers", "remat"}  # of ModelConfig: they change no number


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVSegment:
    """Cached streams of the blocks between two fork layers, live ones first.

    `N` is the capacity of a row in slots; what stands behind `count` is never seen.

    Attributes:
        count: `[B]` int32 live streams so far.
        key: `[B, G, N, K]` rotated keys, one array for each block.
        value: `[B, G, N, K]` values, already scaled by the scores, one array for each block.
        bias: `[B, N]` float32 of each key, or None where the config has none.
    """

    count: jax.Array
    key: tuple[jax.Array, ...]
    value: tuple[jax.Array, ...]
    bias: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """What each of the `F` fork layers did to the tokens so far.

    Attributes:
        streams: `[B, F, max_tokens]` int32, live streams of each token after each fork layer.
        score: `[B, F, max_tokens]` float32, mean cumulative score p of these streams (0 where none
            is left).
    """

    streams: jax.Array
    score: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a causal model keeps of the tokens that it has read.

    Attributes:
        length: `[B]` int32 tokens so far.
        groups: one for each run of blocks between fork layers (`ModelConfig.groups`).
        memories: of the policy, one for each fork layer.
        record: the bubbles so far.
        max_tokens: that fit into a row.
        config: of the model that the cache was made for.
    """

    length: jax.Array
    groups: tuple[KVSegment, ...]
    memories: tuple[Any, ...]
    trace: Trace
    max_tokens: int = dataclasses.field(metadata={"static": True})
    config: ModelConfig = dataclasses.field(metadata={"static": True})


def init_cache(model: Thoughtbubbles, batch: int, max_tokens: int) -> Cache:
    """An empty cache for `batch` rows of up to `max_tokens` tokens.

    Raises:
        ValueError: the model's policy is not causal, or a size is below 1.
    """
    config = model.config
    check_cacheable(config)
    if batch < 1 or max_tokens < 1:
        raise ValueError(f"batch={batch}, max_tokens={max_tokens}: choose 1 or more of both")
    slots, groups, memories = max_tokens * config.copies, [], []
    for index, (start, end) in enumerate(config.groups()):
        if index:
            policy = cast(CausalPolicy, config.policy)
            memories.append(policy.memory(batch, 2 * slots))
            slots = min(2 * slots, policy.capacity(max_tokens))
        shape = (batch, config.kv_heads, slots, config.head_width)
        # A buffer for each block: one array in several places could not be donated.
        blank = lambda: tuple(jnp.zeros(shape, config.dtype) for _ in range(start, end))  # noqa: B023, E731
        bias = jnp.zeros((batch, slots)) if index and config.key_bias else None
        groups.append(KVSegment(jnp.zeros((batch,), jnp.int32), blank(), blank(), bias))
    marks = (batch, len(config.fork_layers), max_tokens)
    trace = Trace(jnp.zeros(marks, jnp.int32), jnp.zeros(marks))
    length = jnp.zeros((batch,), jnp.int32)
    return Cache(length, tuple(groups), tuple(memories), trace, max_tokens, config)


def cacheable(config: ModelConfig) -> bool:
    """Whether a cache gives what the model computes."""
    return config.causal and (not config.fork_layers or isinstance(config.policy, CausalPolicy))


def check_cacheable(config: ModelConfig) -> None:
    """Raise where a cache could not give what the model computes."""
    if not config.causal:
        raise ValueError(
            f"{config.policy} can't be cached, its choice looks at the whole row: use "
            "model.with_policy(PrefixRank(...)) or Threshold, or generate(..., cached=False)"
        )
    if not cacheable(config):
        raise ValueError(
            f"{config.policy} says it is causal and has no memory() and keep_next(): "
            "add both, or use generate(..., cached=False)"
        )


def extend(
    model: Thoughtbubbles, cache: Cache, tokens: jax.Array, length: jax.Array | None = None
) -> tuple[Streams, Cache]:
    """Read the next tokens of each row.

    Any split of a row into calls gives the same. A row that would outgrow the cache is an error
    where lengths are known; under a trace (your own `jit`) its streams become NaN for good.

    Args:
        tokens: `[B, C]` int32, padded on the right.
        length: `[B]` int32 of them real; all `C` if not given. Rows of length 0 stay as they are.

    Returns:
        the streams of these tokens after the last block (token 0 is the first of `tokens`), and
        the cache after them.

    Raises:
        ValueError: the cache was made for another config or policy, or is too small.
    """
    return _checked(model, cache, tokens, length, fresh=False)


def prefill(
    model: Thoughtbubbles, cache: Cache, tokens: jax.Array, length: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """`extend` of an empty cache, faster: the tokens attend among themselves, by `Block.attend`.

    Args:
        tokens: `[B, C]` int32, padded on the right.
        length: `[B]` int32 of them real; all `C` if not given.

    Returns:
        logits `[B, V]` float32 of each row's last token (zeros for a row of length 0), and the
        cache after it. Under a trace they are NaN for a row that was not empty.
    """
    streams, cache = _checked(model, cache, tokens, length, fresh=True)
    return _last_logits(model, streams), cache


def decode_step(
    model: Thoughtbubbles, cache: Cache, token: jax.Array, active: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """Read one more token of each row.

    A call copies the weights out of their stack; in a loop under one `jit` that is done once.

    Args:
        token: `[B]` int32.
        active: `[B]` bool, rows that take part; the others stay as they are.

    Returns:
        logits `[B, V]` float32 after the token (zeros for rows that don't take part), and the
        cache after it.
    """
    length = None if active is None else active.astype(jnp.int32)
    streams, cache = _checked(model, cache, token[:, None], length, fresh=False)
    return _last_logits(model, streams), cache


def _checked(model, cache, tokens, length, fresh) -> tuple[Streams, Cache]:
    """`_extend` after every check that can be made here: shapes always, lengths if concrete."""
    _check_config(model.config, cache.config)
    if tokens.ndim != 2 or tokens.shape[0] != cache.length.shape[0]:
        raise ValueError(
            f"tokens {tokens.shape} for a cache of {cache.length.shape[0]} rows: give one row each"
        )
    if length is None:
        length = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    if not isinstance(length, Tracer) and not isinstance(cache.length, Tracer):
        before, new = np.asarray(cache.length), np.asarray(length)
        if new.max(initial=0) > tokens.shape[1] or new.min(initial=0) < 0:
            raise ValueError(
                f"lengths {new.tolist()} of {tokens.shape[1]} tokens: choose 0 to {tokens.shape[1]}"
            )
        longest = int((before + new).max())
        if longest > cache.max_tokens:
            raise ValueError(
                f"a row would grow to {longest} tokens, the cache has max_tokens="
                f"{cache.max_tokens}: make a larger one (init_cache)"
            )
        if fresh and before.any():
            raise ValueError(
                f"prefill of a row that has {before.max()} tokens: use extend, or a new cache"
            )
    return _extend(model, cache, tokens, length, fresh)


def _check_config(ours: ModelConfig, theirs: ModelConfig) -> None:
    for field in dataclasses.fields(ModelConfig):
        here, there = getattr(ours, field.name), getattr(theirs, field.name)
        if here != there and field.name not in EXECUTION_FIELDS:
            raise ValueError(
                f"this cache was made for {field.name}={there}, the model has {field.name}={here}: "
                "read the tokens again into a new cache (init_cache)"
            )


@functools.partial(jax.jit, static_argnames="fresh")
def _extend(model, cache, tokens, length, fresh):
    return advance(model, model.layers(), cache, model.embed_tokens(tokens), length, fresh)


@jax.jit
def _last_logits(model: Thoughtbubbles, streams: Streams) -> jax.Array:
    logits = model.logits_at(streams, streams.length - 1)
    nothing = jnp.where(streams.length < 0, jnp.nan, 0.0)  # a mistake, or a row that rests
    return jnp.where(streams.length[:, None] > 0, logits, nothing[:, None])


def advance(
    model: Thoughtbubbles,
    layers: Sequence[Block],
    cache: Cache,
    x: jax.Array,
    length: jax.Array,
    fresh: bool = False,
) -> tuple[Streams, Cache]:
    """`extend` without checks, from residuals.

    Args:
        layers: the model's blocks one by one (`model.layers()`), taken out of the stack once.
        x: `[B, C, D]`.
        length: `[B]` int32 of them real.
        fresh: static; whether the cache is known to be empty, so that it need not be looked into.
    """
    config, chunk = model.config, x.shape[1]
    after = cache.length + length
    wrong = (after > cache.max_tokens) | (length > chunk) | (length < 0)
    if fresh:
        wrong |= cache.length > 0
    x = jnp.where(wrong[:, None, None], jnp.nan, x)
    # Poisoned for good: the cache's memories are not to be trusted either from here on.
    after = jnp.where(wrong, cache.max_tokens + 1, after)
    streams = Streams.start(x, length, config.copies, cache.length)
    # Rows with nothing before them can't have saved up more budget than these tokens' own.
    bound = min(chunk, cache.max_tokens) if fresh else cache.max_tokens
    groups, memories, trace = [], [], cache.trace
    for index, (start, end) in enumerate(config.groups()):
        if index:
            fork, memory = model.forks[index - 1], cache.memories[index - 1]
            if fresh:
                # Only as large as these tokens need: ranking looks at all that there is room for.
                policy = cast(CausalPolicy, config.policy)
                small = policy.memory(x.shape[0], 2 * streams.token.shape[1])
                streams, small = fork.extend(streams, small, bound)
                memory = jax.tree.map(_at_start, memory, small)
            else:
                streams, memory = fork.extend(streams, memory, bound)
            memories.append(memory)
            trace = _note(trace, index - 1, streams)
        run = list(zip(layers[start:end], config.rotary_layers[start:end], strict=True))
        streams, group = _through(streams, run, cache.groups[index], config, fresh)
        groups.append(group)
    cache = dataclasses.replace(
        cache, length=after, groups=tuple(groups), memories=tuple(memories), trace=trace
    )
    return streams, cache


def _through(
    streams: Streams,
    layers: Sequence[tuple[Block, bool | None]],
    group: KVSegment,
    config: ModelConfig,
    fresh: bool,
) -> tuple[Streams, KVSegment]:
    """Streams through the blocks of a group, which sees the slots of earlier ones before them.

    Each block comes with what `ModelConfig.rotary_layers` says of it.
    """
    if not layers:
        return streams, group
    geometry, alive, before = Geometry.of(streams, config), streams.alive, group.count
    bias, keys, values = group.bias, [], []
    if bias is not None and geometry.key_bias is not None:
        new_bias = geometry.key_bias
        bias = _into(bias, new_bias, 1) if fresh else append(bias, new_bias, before, alive)

    for (layer, rotary), key, value in zip(layers, group.key, group.value, strict=True):
        here = geometry.where(rotary)

        def over_the_cache(query, new_key, new_value, key=key, value=value):
            key = _append_heads_first(key, new_key, before, alive)
            value = _append_heads_first(value, new_value, before, alive)
            return attend_cached(query, key, value, bias, before), (key, value)

        def among_themselves(query, key, value, attend=layer.attend):
            mixed = attend(query, key, value, geometry.key_bias)
            return mixed, (key.swapaxes(1, 2), value.swapaxes(1, 2))

        if fresh:
            streams, (new_key, new_value) = layer.mixing(streams, here, among_themselves)
            key, value = _into(key, new_key, 2), _into(value, new_value, 2)
        else:
            streams, (key, value) = layer.mixing(streams, here, over_the_cache)
        keys.append(key)
        values.append(value)
    count = before + alive.sum(axis=1, dtype=jnp.int32)
    return streams, KVSegment(count, tuple(keys), tuple(values), bias)


def _at_start(stored: jax.Array, new: jax.Array) -> jax.Array:
    """`stored` with its first places, along all axes, from `new`."""
    new = jax.lax.slice(new, (0,) * new.ndim, tuple(map(min, new.shape, stored.shape)))
    return jax.lax.dynamic_update_slice(stored, new.astype(stored.dtype), (0,) * new.ndim)


def _into(stored: jax.Array, new: jax.Array, axis: int) -> jax.Array:
    """`stored` with its first places along the axis from `new`; dead slots may stick out."""
    new = jax.lax.slice_in_dim(new, 0, min(new.shape[axis], stored.shape[axis]), axis=axis)
    return jax.lax.dynamic_update_slice_in_dim(stored, new.astype(stored.dtype), 0, axis)


def _append_heads_first(stored, new, used, valid):
    """`append` for `stored [B, G, N, K]` and `new [B, S, G, K]`."""

    def write(row, entries, start, mask):
        place = jnp.where(mask, start + jnp.arange(mask.shape[0]), row.shape[1])
        return row.at[:, place].set(entries.swapaxes(0, 1), mode="drop")

    return jax.vmap(write)(stored, new.astype(stored.dtype), used, valid)


def _note(trace: Trace, fork: int, streams: Streams) -> Trace:
    """Write the bubbles of new tokens as a fork layer left them."""
    streams_of, score_of = bubbles_of(streams)
    real = jnp.arange(streams.num_tokens) < streams.length[:, None]
    counts = append(trace.streams[:, fork], streams_of, streams.first, real)
    scores = append(trace.score[:, fork], score_of, streams.first, real)
    return Trace(trace.streams.at[:, fork].set(counts), trace.score.at[:, fork].set(scores))

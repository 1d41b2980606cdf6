"""Cached decoding: keys, values and policy states of the tokens so far, and functions to extend it.

A causal policy's decision about a token is final. So keys and values are only appended, and
processing a sequence in chunks, however it is split, gives the logits of one teacher-forced forward
pass, up to rounding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from thoughtbubbles.attention import attend_cached
from thoughtbubbles.bubbles import bubbles_of
from thoughtbubbles.checks import check_lengths, check_sizes
from thoughtbubbles.config import ModelConfig
from thoughtbubbles.fork_cache import ForkCache, KVSlots, init_fork_cache, token_slots
from thoughtbubbles.fork_models import check_cacheable
from thoughtbubbles.forward import ForkingDecoder
from thoughtbubbles.layers import Block, Geometry
from thoughtbubbles.placement import AnyArray, broadcast_beside, placed_beside
from thoughtbubbles.policies import append
from thoughtbubbles.rows import real_ids
from thoughtbubbles.short_repr import ShortRepr
from thoughtbubbles.streams import Streams

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class KVSegment(ShortRepr):
    """KV cache of the blocks between two fork layers; all these blocks use the same slots.

    A row has `N` slots. Live streams fill the first slots; the unused slots after them are never
    attended to. `G` is the number of key heads.

    Attributes:
        key: Keys with RoPE applied, one array `[B, G, N, K]` for each block.
        value: Values, multiplied by scores if the config scales values, one array `[B, G, N, K]`
            for each block.
        bias: `[B, N]` float32 bias of each key in the attention logits; None before the first fork
            layer or without `ModelConfig.key_bias`.
    """

    key: tuple[jax.Array, ...]
    value: tuple[jax.Array, ...]
    bias: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Trace(ShortRepr):
    """Number and mean score of each token's streams after each of the `F` fork layers.

    Attributes:
        streams: `[B, F, max_tokens]` int32, number of live streams of each token.
        score: `[B, F, max_tokens]` float32, mean cumulative score p of the token's live streams; 0
            for a token without live streams.
    """

    streams: jax.Array
    score: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Cache(ShortRepr):
    """State of a causal model after the tokens so far; axis 0 of every array is the batch.

    Attributes:
        length: `[B]` int32, number of tokens in each row.
        groups: KV cache of each group of blocks between fork layers (`ModelConfig.groups`).
        forks: State of each fork layer.
        trace: Number and mean score of the streams of each token so far.
        max_tokens: Maximum number of tokens in a row.
        config: Config of the model that the cache was made for.
    """

    length: jax.Array
    groups: tuple[KVSegment, ...]
    forks: tuple[ForkCache, ...]
    trace: Trace
    max_tokens: int = dataclasses.field(metadata={"static": True})
    config: ModelConfig = dataclasses.field(metadata={"static": True})

    @property
    def streams(self) -> Int[Array, " B"]:
        """Number of live streams in each row in the last block, int32."""
        return self.forks[-1].used if self.forks else self.length * self.config.copies


def init_cache(model: ForkingDecoder, batch: int, max_tokens: int) -> Cache:
    """Return an empty cache.

    Args:
        model: Model whose fork policy is causal.
        batch: Number of rows (batch elements).
        max_tokens: Maximum number of tokens in a row.

    Raises:
        ValueError: The model's policy is not causal or lacks the cache methods of `CausalPolicy`,
            or a size is below 1.
    """
    config = model.config
    check_cacheable(config)
    check_sizes(batch=batch, max_tokens=max_tokens)
    slots, groups, forks = max_tokens * config.copies, [], []
    for index, (start, end) in enumerate(config.groups()):
        if index:
            before = forks[-1] if forks else None
            forks.append(init_fork_cache(config.policy, batch, max_tokens, before))
            slots = forks[-1].slots
        has_bias = index > 0 and config.key_bias
        groups.append(_empty_segment(config, batch, slots, end - start, has_bias))
    shape = (batch, len(config.fork_layers), max_tokens)
    trace = Trace(jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    length = jnp.zeros((batch,), jnp.int32)
    return Cache(length, tuple(groups), tuple(forks), trace, max_tokens, config)


def _empty_segment(
    config: ModelConfig, batch: int, slots: int, blocks: int, has_bias: bool
) -> KVSegment:
    shape = (batch, config.kv_heads, slots, config.head_width)
    # One buffer for each block, because an array that occurs twice could not be donated.
    key, value = (tuple(jnp.zeros(shape, config.dtype) for _ in range(blocks)) for _ in range(2))
    bias = jnp.zeros((batch, slots)) if has_bias else None
    return KVSegment(key, value, bias)


def extend(
    model: ForkingDecoder,
    cache: Cache,
    tokens: Int[AnyArray, "B C"],
    length: Int[AnyArray, " B"] | None = None,
) -> tuple[Streams, Cache]:
    """Run the model over the next `C` tokens of each row, and append these tokens to the cache.

    Processing a sequence in chunks, however it is split, gives the same streams, up to rounding.
    Under `jit`, where lengths are unknown, a row that outgrows the cache raises no error, but its
    streams become NaN in this and in all later calls.

    Args:
        model: Model that the cache was made for.
        cache: Cache of the tokens so far.
        tokens: Token ids, padded on the right.
        length: Number of real tokens in each row; all `C` by default; 0 leaves a row unchanged.

    Returns:
        The streams of the new tokens after the last block, in which token 0 is the first of
        `tokens`, and the new cache.

    Raises:
        ValueError: The cache was made for another config or policy or is too small, or tokens or
            lengths have a wrong shape or range.
    """
    return _checked(model, cache, tokens, length, fresh=False)


def prefill(
    model: ForkingDecoder,
    cache: Cache,
    tokens: Int[AnyArray, "B C"],
    length: Int[AnyArray, " B"] | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Run the model over prompts of up to `C` tokens and fill an empty cache.

    The new cache is the same as from `extend`, but is computed faster, because the streams of a
    prompt attend to each other (`Block.attend`) instead of to the cache.

    Args:
        model: Model that the cache was made for.
        cache: Empty cache.
        tokens: Token ids, padded on the right.
        length: Number of real tokens in each row; all `C` by default.

    Returns:
        Float32 logits after each row's last token (zeros for a row of length 0), and the
        new cache.

    Raises:
        ValueError: A row of the cache is not empty (under `jit` its logits are NaN instead), or
            `extend` raises a ValueError.
    """
    streams, cache = _checked(model, cache, tokens, length, fresh=True)
    return _last_logits(model, streams), cache


def decode_step(
    model: ForkingDecoder,
    cache: Cache,
    token: Int[AnyArray, " B"],
    active: Bool[AnyArray, " B"] | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Run the model over one more token of each row.

    Each call copies the parameters of all blocks out of their stack (unless `for_decoding` has
    unstacked the model); a loop under one `jit` copies the parameters only once.

    Args:
        model: Model that the cache was made for.
        cache: Cache of the tokens so far.
        token: Token id of each row.
        active: Whether each row is extended by its token; inactive rows stay unchanged. All rows
            are active by default.

    Returns:
        Float32 logits after the token (zeros for inactive rows), and the new cache.

    Raises:
        ValueError: `extend` raises a ValueError.
    """
    length = None if active is None else active.astype(jnp.int32)
    streams, cache = _checked(model, cache, token[:, None], length, fresh=False)
    return _last_logits(model, streams), cache


def _checked(model, cache, tokens, length, fresh) -> tuple[Streams, Cache]:
    """Check shapes, and lengths that are not traced by `jit`, and then call `_extend`."""
    _check_cache(model, cache)
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


def _check_cache(model: ForkingDecoder, cache: Cache) -> None:
    if not isinstance(cache, Cache):
        raise ValueError(
            f"a {type(cache).__name__} in place of a cache: give that of init_cache(batch, "
            "max_tokens), or of the last call"
        )
    ours, theirs = model.config, cache.config
    for field in dataclasses.fields(ModelConfig):
        here, there = getattr(ours, field.name), getattr(theirs, field.name)
        if here != there and field.name not in ours.execution_fields:
            raise ValueError(
                f"this cache was made for {field.name}={there}, the model has {field.name}={here}: "
                "prefill a new one with the tokens (init_cache)"
            )


@functools.partial(jax.jit, static_argnames="fresh")
def _extend(model, cache, tokens, length, fresh):
    x = model.embed_tokens(real_ids(tokens, length))
    return advance(model, model.layers(), cache, x, length, fresh)


@jax.jit
def _last_logits(model: ForkingDecoder, streams: Streams) -> jax.Array:
    logits = model.logits_at(streams, streams.length - 1)
    empty = jnp.where(streams.length < 0, jnp.nan, 0.0)  # below 0: an invalid length
    return jnp.where(streams.length[:, None] > 0, logits, empty[:, None])


def advance(
    model: ForkingDecoder,
    layers: Sequence[Block],
    cache: Cache,
    x: Float[Array, "B C D"],
    length: Int[AnyArray, " B"],
    fresh: bool = False,
) -> tuple[Streams, Cache]:
    """Run the model over the next `C` vectors of each row, as `extend` does over token ids.

    A row whose length is invalid or that outgrows the cache raises no error, under `jit` or not,
    but its streams become NaN.

    Args:
        model: Model that the cache was made for.
        layers: Blocks of the model, unstacked (`model.layers()`).
        cache: Cache of the tokens so far.
        x: Input residuals, such as embedded tokens, padded on the right.
        length: Number of real vectors in each row.
        fresh: Whether the cache is known to be empty (static), which allows a faster pass.

    Returns:
        The streams of the new vectors after the last block, and the new cache.

    Raises:
        ValueError: The cache was made for another config or number of rows, or `length` is not one
            integer per row.
    """
    _check_cache(model, cache)
    if x.shape[0] != cache.length.shape[0]:
        raise ValueError(
            f"vectors {x.shape} for a cache of {cache.length.shape[0]} rows: give one row each"
        )
    check_lengths(length, x.shape[0])
    config, chunk = model.config, x.shape[1]
    cache, length = placed_beside(cache, x), broadcast_beside(length, x, 1)
    after = cache.length + length
    wrong = (after > cache.max_tokens) | (length > chunk) | (length < 0)
    if fresh:
        wrong |= cache.length > 0
    x = jnp.where(wrong[:, None, None], jnp.nan, x)
    # A wrong row stays wrong, because the policy states of the row are no longer valid.
    after = jnp.where(wrong, cache.max_tokens + 1, after)
    streams = Streams.start(x, length, config.copies, cache.length)
    slots = token_slots(streams, cache.max_tokens)
    groups, forks, trace = [], [], cache.trace
    for index, (start, end) in enumerate(config.groups()):
        if index:
            fork, state = model.forks[index - 1], cache.forks[index - 1]
            streams, slots, state = fork.advance(streams, state, fresh=fresh)
            forks.append(state)
            trace = _record_bubbles(trace, index - 1, streams)
        blocks = list(zip(layers[start:end], config.rotary_layers[start:end], strict=True))
        streams, group = _run_group(
            streams, slots, blocks, cache.groups[index], config, cache.max_tokens, fresh
        )
        groups.append(group)
    cache = dataclasses.replace(
        cache, length=after, groups=tuple(groups), forks=tuple(forks), trace=trace
    )
    return streams, cache


def keep_first(before: Cache, after: Cache, kept: Int[Array, " B"]) -> Cache:
    """Roll a cache back to the first `kept` new tokens of each row, freeing all later slots.

    Only models without fork layers support this, because a policy state can't drop a token.

    Args:
        before: Cache before the new tokens.
        after: Cache after the new tokens.
        kept: Number of new tokens that each row keeps.
    """
    assert not after.forks  # `Backbone.can_forget`
    wrong = after.length > after.max_tokens
    length = jnp.where(wrong, after.length, before.length + kept)
    return dataclasses.replace(after, length=length)


def _run_group(
    streams: Streams,
    slots: KVSlots,
    blocks: Sequence[tuple[Block, bool | None]],
    group: KVSegment,
    config: ModelConfig,
    max_tokens: int,
    fresh: bool,
) -> tuple[Streams, KVSegment]:
    """Run the blocks of a group on new streams, which attend to new and to cached streams.

    Args:
        streams: New streams.
        slots: Cache slots of the new streams.
        blocks: Each block with its entry of `ModelConfig.rotary_layers`.
        group: Keys and values of the earlier streams.
        config: Config of the model.
        max_tokens: Maximum number of tokens in a row.
        fresh: Whether there are known to be no earlier streams (static).

    Returns:
        The streams after the blocks, and the keys and values of all streams.
    """
    if not blocks:
        return streams, group
    geometry = Geometry.of(streams, config, max_tokens)
    alive, before = slots.alive, slots.used
    bias, keys, values = group.bias, [], []
    if bias is not None and geometry.key_bias is not None:
        new_bias = geometry.key_bias
        bias = _into(bias, new_bias, 1) if fresh else slots.write(bias, new_bias)
    for (block, rotary), key, value in zip(blocks, group.key, group.value, strict=True):
        if fresh:
            mix = functools.partial(_attend_and_store, block.attend, geometry.key_bias, key, value)
        else:
            mix = functools.partial(_attend_over_cache, bias, before, alive, key, value)
        streams, (key, value) = block.mixing(streams, geometry.where(rotary), mix)
        keys.append(key)
        values.append(value)
    return streams, KVSegment(tuple(keys), tuple(values), bias)


def _attend_over_cache(
    bias, before, alive, key_cache, value_cache, query, key, value
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Append keys and values to a block's KV cache; return attention over it, and the cache."""
    key_cache = _append_heads_first(key_cache, key, before, alive)
    value_cache = _append_heads_first(value_cache, value, before, alive)
    count = alive.sum(axis=1, dtype=jnp.int32)
    mixed = attend_cached(query, key_cache, value_cache, bias, before, count)
    return mixed, (key_cache, value_cache)


def _attend_and_store(
    attend, bias, key_cache, value_cache, query, key, value
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Return attention among new streams only, and a KV cache of their keys and values."""
    mixed = attend(query, key, value, bias)
    key_cache = _into(key_cache, key.swapaxes(1, 2), 2)
    return mixed, (key_cache, _into(value_cache, value.swapaxes(1, 2), 2))


def _into(stored: jax.Array, new: jax.Array, axis: int) -> jax.Array:
    """Overwrite the first entries of `stored` along an axis with the entries of `new` that fit."""
    new = jax.lax.slice_in_dim(new, 0, min(new.shape[axis], stored.shape[axis]), axis=axis)
    return jax.lax.dynamic_update_slice_in_dim(stored, new.astype(stored.dtype), 0, axis)


def _append_heads_first(stored, new, used, valid):
    """Append valid entries of `new [B, S, G, K]` to the `used` slots of `stored [B, G, N, K]`."""

    def write(row, entries, start, mask):
        index = jnp.where(mask, start + jnp.arange(mask.shape[0]), row.shape[1])
        return row.at[:, index].set(entries.swapaxes(0, 1), mode="drop")

    return jax.vmap(write)(stored, new.astype(stored.dtype), used, valid)


def _record_bubbles(trace: Trace, fork: int, streams: Streams) -> Trace:
    """Write number and mean score of new tokens' streams after fork layer `fork` to the trace."""
    streams_of, score_of = bubbles_of(streams)
    real = jnp.arange(streams.num_tokens)[None] < streams.length[:, None]
    counts = append(trace.streams[:, fork], streams_of, streams.first, real)
    scores = append(trace.score[:, fork], score_of, streams.first, real)
    return Trace(trace.streams.at[:, fork].set(counts), trace.score.at[:, fork].set(scores))

"""Score-attenuated causal attention: a reference, a fast path, and attention over a KV cache."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from thoughtbubbles.recompute import ATTENTION, once_known

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int

# The signature of `attend`, which kernels implement too.
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]
MIN_BLOCK = 64
MAX_BLOCKS = 8
SHORTEST_SPAN = 256
LARGEST_PROBABILITIES = 2**25
"""Bytes of float32 attention probabilities of one call, over all devices, above which `attend`
recomputes the probabilities in the backward pass and `attend_cached` computes them in tiles."""
LARGEST_TILE = 2**26
"""Bytes of float32 attention probabilities of one block of `attend`, over all devices, above which
the block is computed in tiles of about `SMALLEST_TILE` queries or more."""
SMALLEST_TILE = 64
FEWEST_TILED = 16
QUERY_TILE, KEY_TILE = 256, 512


def attend(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    bias: Float[Array, "B S"] | None = None,
) -> Float[Array, "B S H K"]:
    """Compute causal attention over `S` slots with a bias per key (arXiv 2510.00219, eq. 8).

    Queries are processed in blocks (`block_size`), each against the keys up to the block's end
    only. So the logits of later keys are not computed, and a row of several blocks needs no array
    `[B, H, S, S]`. If the attention probabilities of a call have more than `LARGEST_PROBABILITIES`
    bytes, the backward pass recomputes them; such a call does not support forward-mode
    differentiation (`jax.jvp`). If the probabilities of a block have more than `LARGEST_TILE`
    bytes, forward and backward pass compute them for one tile of the block's queries at a time.

    Args:
        query: Queries of `H` heads with RoPE applied.
        key: Keys of `G` heads with RoPE applied, where `G` divides `H` (grouped-query attention).
        value: Values of `G` heads, already multiplied by scores if the config scales values.
        bias: Float32 bias of each key, added to the logits after their division by sqrt(K); None
            for no bias.
    """
    batch, slots, heads, _ = query.shape
    large = 4 * batch * heads * visited_pairs(slots) > LARGEST_PROBABILITIES
    arrays = *heads_first(query, key, value), bias
    return _attend_again(*arrays) if large else slots_first(_attend_blocks(*arrays))


def attend_reference(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    bias: Float[Array, "B S"] | None = None,
) -> Float[Array, "B S H K"]:
    """Compute the same as `attend`, with all queries against all keys at once (no blocks)."""
    last = jnp.arange(query.shape[1])
    return slots_first(_attend(*heads_first(query, key, value), bias, last))


def attend_where(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    visible: Bool[Array, "B S S"],
) -> Float[Array, "B S H K"]:
    """Compute attention under an arbitrary mask, such as a sequence-packing mask.

    Args:
        query: Queries of `H` heads with RoPE applied.
        key: Keys of `G` heads with RoPE applied, where `G` divides `H` (grouped-query attention).
        value: Values of `G` heads.
        visible: Mask of queries (axis 1) and keys (axis 2), true where a query attends to a key;
            the result of a query that attends to no key is arbitrary but finite.
    """
    return jax.nn.dot_product_attention(query, key, value, mask=visible[:, None])


def attend_cached(
    query: Float[Array, "B Q H K"],
    key: Float[Array, "B G N K"],
    value: Float[Array, "B G N K"],
    bias: Float[Array, "B N"] | None,
    first: Int[Array, " B"],
    count: Int[Array, " B"] | None = None,
) -> Float[Array, "B Q H K"]:
    """Compute attention of `Q` new queries over a KV cache that includes the new keys and values.

    By default attention covers only a prefix of the cache: the shortest of a few static lengths
    (`cache_spans`) that includes the used slots of every row. But with `FEWEST_TILED` queries or
    more and attention probabilities of more than `LARGEST_PROBABILITIES` bytes, the forward pass
    computes attention in tiles over the whole cache, like flash attention. In that case the
    backward pass materializes all attention probabilities, and `jax.jvp` fails.

    Args:
        query: Queries of `H` heads for the new slots, with RoPE applied.
        key: Keys of `G` heads, where `G` divides `H`, in the `N` slots of the cache, with RoPE
            applied; heads come before slots, so that no step has to transpose the cache.
        value: Values of `G` heads in the `N` slots of the cache.
        bias: Float32 bias of each key, added to the logits; None for no bias.
        first: Cache slot of query 0 in each row; query `q` attends to slots up to `first + q`.
        count: Number of leading queries in each row whose results are used; the results of later
            queries are arbitrary but finite. All queries by default.
    """
    (batch, queries, heads, _), slots = query.shape, key.shape[2]
    query = _grouped(query, key.shape[1])
    last = first[:, None] + jnp.arange(queries)[None]
    if queries >= FEWEST_TILED and 4 * batch * heads * queries * slots > LARGEST_PROBABILITIES:
        end = first + (queries if count is None else count)
        return slots_first(_attend_tiled(query, key, value, bias, last, end))

    def over(span: int):
        seen = None if bias is None else bias[:, :span]
        return lambda: _attend(query, key[:, :, :span], value[:, :, :span], seen, last, few=True)

    spans = cache_spans(slots)
    if len(spans) == 1:
        return slots_first(over(slots)())
    branch = jnp.searchsorted(jnp.array(spans[:-1]), first.max() + queries)
    return slots_first(jax.lax.switch(branch, [over(span) for span in spans]))


def cache_spans(slots: int) -> list[int]:
    """Return, in increasing order, the cache prefix lengths that `attend_cached` selects from.

    The lengths in slots are `SHORTEST_SPAN`, doubled up to half of the cache, and the whole cache.
    XLA would copy a longer prefix out of the cache, which takes longer than attending to all slots.
    """
    spans = [SHORTEST_SPAN]
    while 2 * spans[-1] <= slots:
        spans.append(2 * spans[-1])
    return [*spans[:-1], slots]


def block_size(slots: int) -> int:
    """Number of queries per block of `attend`: >= `MIN_BLOCK`, in up to `MAX_BLOCKS` blocks."""
    return max(MIN_BLOCK, math.ceil(slots / MAX_BLOCKS))


def visited_pairs(slots: int) -> int:
    """Number of query-key pairs that `attend` computes for a row of `slots` slots (for FLOPs)."""
    block = block_size(slots)
    ends = [min(start + block, slots) for start in range(0, slots, block)]
    return sum((end - start) * end for start, end in zip(range(0, slots, block), ends, strict=True))


def heads_first(query, key, value):
    """Move heads before slots, group query heads by key head, and scale queries by 1 / sqrt(K).

    Args:
        query: Queries `[B, S, H, K]`.
        key: Keys `[B, S, G, K]` of `G` key heads.
        value: Values `[B, S, G, K]`.

    Returns:
        Scaled queries `[B, G, H/G, S, K]`, keys `[B, G, S, K]` and values `[B, G, S, K]`.
    """
    return _grouped(query, key.shape[2]), key.swapaxes(1, 2), value.swapaxes(1, 2)


def _grouped(query, groups):
    return _in_groups(query * query.shape[-1] ** -0.5, groups)


def _in_groups(values, groups):
    """Reshape and transpose values `[B, S, H, K]` to `[B, G, H/G, S, K]`."""
    batch, slots, heads, width = values.shape
    values = values.reshape(batch, slots, groups, heads // groups, width)
    return values.transpose(0, 2, 3, 1, 4)


def slots_first(mixed):
    """Transpose attention outputs `[B, G, H/G, S, K]` (as in `heads_first`) to `[B, S, H, K]`."""
    batch, groups, repeats, slots, width = mixed.shape
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, slots, groups * repeats, width)


def _attend(query, key, value, bias, last, few=False):
    """Compute attention with heads first, over keys up to slot `last` (`[Q]` or `[B, Q]`).

    `few` chooses a layout that is fast if there are few queries; it does not change the result.
    """
    return _attend_normalised(query, key, value, bias, last, few)[0]


def _attend_normalised(query, key, value, bias, last, few=False):
    """Return the result of `_attend` and the log of the softmax normaliser of each query."""
    logits = _logits(query, key, bias, last, few)
    # No gradient flows through the peak, and the product with the values is divided by the sum:
    # two passes over [q, s] fewer than jax.nn.softmax.
    peak = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - peak)
    mixed = jnp.einsum(
        "bgrqs,bgsk->bgrqk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    total = weights.sum(axis=-1)
    return (mixed / total[..., None]).astype(value.dtype), peak[..., 0] + jnp.log(total)


@jax.custom_vjp
def _attend_tiled(query, key, value, bias, last, end):
    """Compute `_attend` in tiles, with a running normaliser (arXiv 2205.14135); `last` is `[B, Q]`.

    A tile of keys is skipped if no query of the current tile attends to it, or if its first slot is
    at `end [B]` or later in every row.
    """
    queries, slots = query.shape[3], key.shape[2]
    rows, columns = min(QUERY_TILE, queries), min(KEY_TILE, slots)
    padding = -queries % rows
    query = jnp.pad(query, [(0, 0)] * 3 + [(0, padding), (0, 0)])
    last = jnp.pad(last, [(0, 0), (0, padding)], mode="edge")

    def tile(start):
        here = jax.lax.dynamic_slice_in_dim(query, start, rows, axis=3)
        reach = jax.lax.dynamic_slice_in_dim(last, start, rows, axis=1)
        needed = jnp.minimum(reach[:, -1] + 1, end)
        # One tile at least, so that no result is 0 / 0.
        tiles = jnp.where(reach[:, 0] < end, -(-needed // columns), 1).max()
        zeros = jnp.zeros_like(here, jnp.float32)
        carry = zeros[..., 0] - jnp.inf, zeros[..., 0], zeros
        step = functools.partial(_add_tile, here, key, value, bias, reach, columns)
        _, total, mixed = jax.lax.fori_loop(0, jnp.maximum(tiles, 1), step, carry)
        return (mixed / total[..., None]).astype(value.dtype)

    mixed = jax.lax.map(tile, jnp.arange(0, queries + padding, rows))
    mixed = jnp.moveaxis(mixed, 0, 3)
    return mixed.reshape(*mixed.shape[:3], -1, mixed.shape[-1])[:, :, :, :queries]


def _tiled_backward(arrays, gradient):
    query, key, value, bias, last, _ = arrays
    over = lambda query, key, value, bias: _attend(query, key, value, bias, last)  # noqa: E731
    return *jax.vjp(over, query, key, value, bias)[1](gradient), None, None


_attend_tiled.defvjp(lambda *arrays: (_attend_tiled(*arrays), arrays), _tiled_backward)


def _add_tile(query, key, value, bias, last, columns, index, carry):
    """Update the running maximum, sum and output of a tile of queries with another tile of keys."""
    peak, total, mixed = carry
    begin = index * columns
    start = jnp.minimum(begin, key.shape[2] - columns)  # the last tile overlaps the one before
    key, value = (jax.lax.dynamic_slice_in_dim(x, start, columns, axis=2) for x in (key, value))
    logits = jnp.einsum("bgrqk,bgsk->bgrqs", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        bias = jax.lax.dynamic_slice_in_dim(bias, start, columns, axis=1)
        logits = logits + bias[:, None, None, None, :]
    slot = start + jnp.arange(columns)
    sees = (slot <= last[..., None]) & (slot >= begin)
    logits = jnp.where(sees[:, None, None], logits, -jnp.inf)
    higher = jnp.maximum(peak, logits.max(axis=-1))
    fixed = jnp.where(higher == -jnp.inf, 0.0, higher)  # a query that has seen no weight so far
    weights, left = jnp.exp(logits - fixed[..., None]), jnp.exp(peak - fixed)
    new = jnp.einsum(
        "bgrqs,bgsk->bgrqk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    total = total * left + weights.sum(axis=-1)
    return higher, total, mixed * left[..., None] + new


def _logits(query, key, bias, last, few=False):
    if few:
        # Keys first: with the query first, XLA transposes all of a cache's keys on a CPU.
        logits = jnp.einsum("bgsk,bgrqk->bgsrq", key, query, preferred_element_type=jnp.float32)
        logits = jnp.moveaxis(logits, 2, -1)
    else:
        logits = jnp.einsum("bgrqk,bgsk->bgrqs", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias[:, None, None, None, :]
    sees = jnp.arange(key.shape[2])[None, None, None, None] <= last.reshape(
        -1, 1, 1, last.shape[-1], 1
    )
    return jnp.where(sees, logits, -jnp.inf)


def _blocks(slots):
    """Return the query range `(start, end)` of each block; its keys are the slots before `end`."""
    block = block_size(slots)
    return [(start, min(start + block, slots)) for start in range(0, slots, block)]


def _block(arrays, start, end):
    """Slice the queries of one block, their keys, values and bias, and each query's last slot."""
    query, key, value, bias = arrays
    seen = None if bias is None else bias[:, :end]
    last = jnp.arange(start, end)
    return query[:, :, :, start:end], key[:, :, :end], value[:, :, :end], seen, last


def _attend_blocks(*arrays):
    parts = [_in_tiles(*_block(arrays, *ends))[0] for ends in _blocks(arrays[0].shape[3])]
    return jnp.concatenate(parts, axis=3)


def _in_tiles(query, key, value, bias, last):
    """Compute `_attend_normalised` of a block, in tiles of queries if the block is large."""
    tiles, queries = _tiles(query, key), query.shape[3]
    if tiles == 1:
        return _attend_normalised(query, key, value, bias, last)
    over = lambda part: _attend_normalised(part[0], key, value, bias, part[1])  # noqa: E731
    parts = jax.lax.map(over, (_cut(query, tiles), _cut(last, tiles, axis=0)))
    return tuple(_joined(part, queries) for part in parts)


def _tiles(query, key):
    """Number of tiles into which the queries of a block are split."""
    of_query = 4 * math.prod(query.shape[:3]) * key.shape[2]
    return math.ceil(query.shape[3] / max(SMALLEST_TILE, LARGEST_TILE // max(of_query, 1)))


def _cut(values, tiles, axis=3, fill=0):
    """Split values along an axis into tiles on a new leading axis; the last tile is padded."""
    size = math.ceil(values.shape[axis] / tiles)
    padding = tiles * size - values.shape[axis]
    widths = [(0, padding if i == axis else 0) for i in range(values.ndim)]
    values = jnp.pad(values, widths, constant_values=fill)
    shape = (*values.shape[:axis], tiles, size, *values.shape[axis + 1 :])
    return jnp.moveaxis(values.reshape(shape), axis, 0)


def _joined(tiles, queries):
    """Undo `_cut` along axis 3: join the tiles and remove the padding."""
    values = jnp.moveaxis(tiles, 0, 3)
    return values.reshape(*values.shape[:3], -1, *values.shape[5:])[:, :, :, :queries]


@jax.custom_vjp
def _attend_again(*arrays):
    """Compute `_attend_blocks` and return its result with slots first.

    The backward pass recomputes the attention probabilities, as in arXiv 2205.14135.
    """
    return slots_first(_attend_blocks(*arrays))


def _forward(*arrays):
    blocks = [_block(arrays, *ends) for ends in _blocks(arrays[0].shape[3])]
    parts, normalisers = zip(*(_in_tiles(*block) for block in blocks), strict=True)
    mixed = checkpoint_name(slots_first(jnp.concatenate(parts, axis=3)), ATTENTION)
    normaliser = checkpoint_name(jnp.concatenate(normalisers, axis=3), ATTENTION)
    return mixed, (arrays, mixed, normaliser)


def _backward(residuals, gradient):
    arrays, mixed, normaliser = residuals
    query, key, value, bias = arrays
    means = []
    if mixed.dtype == jnp.float32:
        # Mean of a query's gradients under its attention probabilities, computed from the output
        # alone. A rounded output would bring in the values' common part, which should cancel.
        mean = (gradient * mixed).sum(axis=-1, keepdims=True)
        means = [_in_groups(mean, key.shape[1])[..., 0]]
    gradient = _in_groups(gradient, key.shape[1])
    of_rows = normaliser, gradient, *means
    # Whole arrays, because blocks of them in the forward pass would be stored as well.
    query = once_known(query, gradient)
    key, value = (once_known(values, gradient[:, :, 0]) for values in (key, value))
    slots, of_query, sums = query.shape[3], [], None
    for ends in _blocks(slots):
        own_normaliser, own, *own_mean = (values[:, :, :, slice(*ends)] for values in of_rows)
        if of_query:  # one block after another, so that only one block's probabilities exist
            own = once_known(own, of_query[-1][:, :, :, : own.shape[3]])
        block = _block((query, key, value, bias), *ends)
        grads = _backward_in_tiles(block, own_normaliser, own, *own_mean)
        of_query.append(grads[0])
        sums = _added(sums, grads[1:], slots)
    grads = jnp.concatenate(of_query, axis=3), *(sums or ())
    return jax.tree.map(lambda grad, of: grad.astype(of.dtype), grads, arrays)


def _added(sums, grads, slots):
    """Add the gradients of another block, which cover the first slots, to the sums over blocks."""

    def add(grad, total=None):
        axis = 2 if grad.ndim == 4 else 1
        if total is None:
            padding = slots - grad.shape[axis]
            return jnp.pad(grad, [(0, padding if i == axis else 0) for i in range(grad.ndim)])
        seen = jax.lax.slice_in_dim(total, 0, grad.shape[axis], axis=axis)
        return jax.lax.dynamic_update_slice_in_dim(total, seen + grad, 0, axis=axis)

    return jax.tree.map(add, grads) if sums is None else jax.tree.map(add, grads, sums)


def _backward_in_tiles(arrays, *of_rows):
    """Compute `_backward_block`, materializing probabilities for one tile of queries at a time."""
    query, key, value, bias, last = arrays
    tiles = _tiles(query, key)
    if tiles == 1:
        return _backward_block(arrays, *of_rows)

    def tile(sums, part):
        query, last, *of_rows = part
        of_query, *others = _backward_block((query, key, value, bias, last), *of_rows)
        return jax.tree.map(jnp.add, sums, others), of_query

    sums = jax.tree.map(lambda of: jnp.zeros_like(of, jnp.float32), [key, value, bias])
    # Padding queries attend to no key, so their gradients are 0.
    rows = [_cut(values, tiles) for values in of_rows]
    sums, of_query = jax.lax.scan(
        tile, sums, (_cut(query, tiles), _cut(last, tiles, axis=0, fill=-1), *rows)
    )
    return _joined(of_query, query.shape[3]), *sums


def _backward_block(arrays, normaliser, gradient, mean=None):
    """Compute float32 gradients of queries, keys, values and bias.

    `mean` is each query's sum over keys of probability times gradient; None computes it here.
    """
    query, key, value, bias, last = arrays
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    weights = jnp.exp(_logits(query, key, bias, last) - normaliser[..., None])
    of_weights = product("bgrqk,bgsk->bgrqs", gradient, value)
    if mean is None:
        mean = (weights * of_weights).sum(axis=-1)
    slope = weights * (of_weights - mean[..., None])
    of_query = product("bgrqs,bgsk->bgrqk", slope, key)
    # Probabilities second: on a CPU, a first factor that is contracted over rows is transposed.
    of_value = product("bgrqk,bgrqs->bgks", gradient, weights).swapaxes(-1, -2)
    of_key = product("bgrqk,bgrqs->bgks", query, slope).swapaxes(-1, -2)
    return of_query, of_key, of_value, None if bias is None else slope.sum(axis=(1, 2, 3))


_attend_again.defvjp(_forward, _backward)

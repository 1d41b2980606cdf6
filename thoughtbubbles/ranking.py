"""Rank candidates by their keys: the best of each row, and ranks within prefixes of a row."""

import math

import jax
import jax.numpy as jnp

from thoughtbubbles.placement import broadcast_beside

LARGEST_PAIRS = 2**24  # pairs compared at a time in each row, because a CPU holds all in RAM
NO_TOKEN = 2**30  # token index of an entry without a candidate: after every token


def best(keys: jax.Array, count: jax.Array) -> jax.Array:
    """Return the mask `[B, N]` of the `count [B]` largest `keys [B, N]` of each row.

    Ties go to the lower index. The function sorts, because `lax.top_k` all-gathers an operand that
    is sharded over rows.
    """
    count = count[:, None]
    descending = -jnp.sort(-keys, axis=-1)
    last = jnp.take_along_axis(descending, jnp.maximum(count - 1, 0), axis=-1)
    above = keys > last
    tied = (keys == last) & (count > 0)
    left = count - above.sum(axis=-1, keepdims=True)
    return above | (tied & (jnp.cumsum(tied, axis=-1) <= left))


def prefix_ranks(keys: jax.Array, token: jax.Array, window: int | None = None) -> jax.Array:
    """Rank each entry of a row among the entries of its own token and of earlier tokens.

    The rank of an entry is the number of competing entries with a larger key. Because token indices
    never decrease along a row, competing entries form a range from an index `start` to an index
    `end`. The algorithm takes O(N sqrt(N)) steps instead of N^2 for all pairs. Entries are sorted
    by key and split into buckets of about sqrt(N) entries. Competing entries in better buckets are
    counted by prefix sums along the row, one for each bucket; entries of the same bucket are
    compared in pairs.

    Args:
        keys: `[B, N]` float32 without NaN; a larger key ranks higher, ties go to the lower index.
        token: `[B, N]` int32, token index of each entry, non-decreasing along a row.
        window: Number of latest tokens whose entries compete, the entry's own token included; None
            for all tokens up to the entry's own.

    Returns:
        `[B, N]` int32 ranks, 0 for the best.
    """
    batch, count = keys.shape
    width = 2 ** math.ceil(math.log2(count) / 2)
    padded = -(-count // width) * width
    padding = ((0, 0), (0, padded - count))
    keys = jnp.pad(keys, padding, constant_values=-jnp.inf)
    token = jnp.pad(token, padding, constant_values=NO_TOKEN)
    index = broadcast_beside(jnp.arange(padded), token, 2)
    # `order` lists the entries by key; `overall` is each entry's position in that list.
    _, order = jax.lax.sort((-keys, index), dimension=1, num_keys=2)
    _, overall = jax.lax.sort((order, index), dimension=1, num_keys=1)
    end = _after_run(token, index)
    start = jnp.zeros_like(end) if window is None else _first_after(token, token - window)
    same_bucket = _better_in_bucket(order, start, end, width)
    same_bucket = jnp.take_along_axis(same_bucket.reshape(batch, -1), overall, axis=1)
    bucket, buckets = overall // width, padded // width
    # before[b, i, c]: number of the first i entries that lie in a bucket better than bucket c.
    better = (bucket[:, :, None] < jnp.arange(buckets)[None, None]).astype(jnp.int32)
    before = jnp.pad(jnp.cumsum(better, axis=1), ((0, 0), (1, 0), (0, 0))).reshape(batch, -1)
    up_to_end = jnp.take_along_axis(before, end * buckets + bucket, axis=1)
    up_to_start = jnp.take_along_axis(before, start * buckets + bucket, axis=1)
    return (same_bucket + up_to_end - up_to_start)[:, :count]


def _better_in_bucket(order: jax.Array, start: jax.Array, end: jax.Array, width: int) -> jax.Array:
    """Count, for each entry in `order`, the better entries of its bucket within its range.

    Args:
        order: `[B, N]` int32, indices of the entries, the best first.
        start: `[B, N]` int32, index of the first entry in each entry's range.
        end: `[B, N]` int32, index after the last entry in each entry's range.
        width: Number of entries of a bucket.

    Returns:
        `[B, N / width, width]` int32.
    """
    batch = order.shape[0]
    start, end = (jnp.take_along_axis(x, order, axis=1) for x in (start, end))
    start, end = (x.reshape(batch, -1, width, 1) for x in (start, end))
    rivals = order.reshape(batch, -1, 1, width)
    better = jnp.tri(width, k=-1, dtype=bool)[None, None]
    return ((rivals >= start) & (rivals < end) & better).sum(axis=3, dtype=jnp.int32)


def ranks_among(
    keys: jax.Array,
    token: jax.Array,
    new_keys: jax.Array,
    new_token: jax.Array,
    new_index: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Compute the `prefix_ranks` of `M` new entries of a row by comparison with all entries.

    To bound the memory, the new entries are processed in groups if there would be more than
    `LARGEST_PAIRS` comparisons in a row.

    Args:
        keys: `[B, N]` float32, keys of all entries of the row, the new entries included.
        token: `[B, N]` int32, token index of each entry of the row.
        new_keys: `[B, M]` float32, keys of the new entries.
        new_token: `[B, M]` int32, token indices of the new entries.
        new_index: `[B, M]` int32, indices of the new entries in the row.
        window: Number of latest tokens whose entries compete, the entry's own token included; None
            for all tokens up to the entry's own.

    Returns:
        `[B, M]` int32 ranks.
    """
    count, total = new_keys.shape[1], keys.shape[1]
    few = max(LARGEST_PAIRS // total, 1)
    if count > few:
        padding = ((0, 0), (0, -count % few))
        parts = [
            jnp.moveaxis(jnp.pad(x, padding).reshape(x.shape[0], -1, few), 1, 0)
            for x in (new_keys, new_token, new_index)
        ]
        ranks = jax.lax.map(
            lambda new: ranks_among(keys, token, new[0], new[1], new[2], window), parts
        )
        return jnp.moveaxis(ranks, 0, 1).reshape(keys.shape[0], -1)[:, :count]
    key, index = new_keys[:, :, None], new_index[:, :, None]
    others = keys[:, None, :]
    higher = (others > key) | ((others == key) & (jnp.arange(keys.shape[1])[None, None] < index))
    among = token[:, None, :] <= new_token[:, :, None]
    if window is not None:
        among &= token[:, None, :] > new_token[:, :, None] - window
    return (higher & among).sum(axis=2, dtype=jnp.int32)


def at_least(keys: jax.Array, used: jax.Array, new_keys: jax.Array) -> jax.Array:
    """Count the keys of a row that are at least as large as each new key, in O(N + M) memory.

    Args:
        keys: `[B, N]` float32; the first `used` keys of a row are used, all later keys are -inf.
        used: `[B]` int32, number of used keys.
        new_keys: `[B, M]` float32, keys to compare with.

    Returns:
        `[B, M]` int32 counts.
    """
    found = _first_after(jnp.sort(-keys, axis=1), -new_keys)
    return jnp.minimum(found, used[:, None])


def _after_run(token: jax.Array, index: jax.Array) -> jax.Array:
    """For each entry of a row sorted by token, the index after its token's last entry, `[B, N]`."""
    changes = token[:, :-1] != token[:, 1:]
    is_last = jnp.concatenate([changes, jnp.ones_like(token[:, :1], bool)], axis=1)
    return jax.lax.cummin(jnp.where(is_last, index + 1, token.shape[1]), axis=1, reverse=True)


def _first_after(token: jax.Array, value: jax.Array) -> jax.Array:
    """`[B, M]`: number of entries of the sorted `token [B, N]` that are at most `value [B, M]`.

    A binary search: `jnp.searchsorted` under `vmap` fails under explicit axes (jax 0.10).
    """
    low = jnp.zeros_like(value, jnp.int32)
    for step in reversed(range(token.shape[1].bit_length())):
        middle = low + 2**step
        last = jnp.minimum(middle, token.shape[1]) - 1
        fits = jnp.take_along_axis(token, last, axis=1) <= value
        low = jnp.where(fits & (middle <= token.shape[1]), middle, low)
    return low

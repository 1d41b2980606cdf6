"""Ranks among candidates: the best of a row, and ranks within every prefix of it."""

import math

import jax
import jax.numpy as jnp

NO_TOKEN = 2**30  # stands in places without a candidate: after every token


def best(keys: jax.Array, count: jax.Array) -> jax.Array:
    """Mask of the `count [B]` largest `keys [B, N]` of each row; ties go to the lower index.

    By sorting rather than `lax.top_k`, which all-gathers a batch-sharded operand.
    """
    count = count[:, None]
    descending = -jnp.sort(-keys, axis=-1)
    last = jnp.take_along_axis(descending, jnp.maximum(count - 1, 0), axis=-1)
    above = keys > last
    tied = (keys == last) & (count > 0)
    room = count - above.sum(axis=-1, keepdims=True)
    return above | (tied & (jnp.cumsum(tied, axis=-1) <= room))


def prefix_ranks(keys: jax.Array, token: jax.Array, window: int | None = None) -> jax.Array:
    """How many entries rank above each one, among those of tokens up to its own.

    In O(N sqrt(N)) instead of N^2 comparisons: entries are sorted by rank and cut into buckets of
    about sqrt(N). A table of how many entries of each bucket stand before each place of the row
    answers for whole buckets, and the entries of a bucket are compared with each other.

    Args:
        keys: `[B, N]` float32 without NaN; a larger key ranks higher, ties go to the lower index.
        token: `[B, N]` int32, never falling along a row.
        window: only entries of the last `window` tokens count.

    Returns:
        `[B, N]` int32.
    """
    batch, count = keys.shape
    width = 2 ** math.ceil(math.log2(count) / 2)
    padded = -(-count // width) * width
    beyond = ((0, 0), (0, padded - count))
    keys = jnp.pad(keys, beyond, constant_values=-jnp.inf)
    token = jnp.pad(token, beyond, constant_values=NO_TOKEN)
    place = jnp.broadcast_to(jnp.arange(padded, dtype=jnp.int32), keys.shape)
    _, order = jax.lax.sort((-keys, place), dimension=1, num_keys=2)
    _, rank = jax.lax.sort((order, place), dimension=1, num_keys=1)
    # An entry competes with the places from start to end.
    end = _first_after(token, token)
    start = jnp.zeros_like(end) if window is None else _first_after(token, token - window)

    start_of, end_of = (jnp.take_along_axis(x, order, axis=1) for x in (start, end))
    rivals = order.reshape(batch, -1, 1, width)
    start_of, end_of = (x.reshape(batch, -1, width, 1) for x in (start_of, end_of))
    above = jnp.tri(width, k=-1, dtype=bool)
    within = ((rivals >= start_of) & (rivals < end_of) & above).sum(axis=3, dtype=jnp.int32)

    bucket = rank // width
    is_in = bucket[:, :, None] < jnp.arange(padded // width)  # an entry is above later buckets
    before = jnp.cumsum(is_in.astype(jnp.int32), axis=1)
    before = jnp.pad(before, ((0, 0), (1, 0), (0, 0))).reshape(batch, -1)

    def up_to(place):
        return jnp.take_along_axis(before, place * (padded // width) + bucket, axis=1)

    within = jnp.take_along_axis(within.reshape(batch, -1), rank, axis=1)
    return (within + up_to(end) - up_to(start))[:, :count]


def ranks_among(
    keys: jax.Array,
    token: jax.Array,
    new_keys: jax.Array,
    new_token: jax.Array,
    new_place: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """`prefix_ranks` of a few entries only, `[B, M]`, each compared with all `N` of the row.

    Args:
        keys, token: `[B, N]`, as for `prefix_ranks`; the new entries stand among them.
        new_keys, new_token, new_place: `[B, M]`, key, token and place in the row of each new one.
    """
    key, place = new_keys[:, :, None], new_place[:, :, None]
    others = keys[:, None, :]
    higher = (others > key) | ((others == key) & (jnp.arange(keys.shape[1]) < place))
    among = token[:, None, :] <= new_token[:, :, None]
    if window is not None:
        among &= token[:, None, :] > new_token[:, :, None] - window
    return (higher & among).sum(axis=2, dtype=jnp.int32)


def _first_after(token: jax.Array, value: jax.Array) -> jax.Array:
    """Number of entries of `token [B, N]`, never falling, that are at most `value [B, N]`."""
    search = jax.vmap(lambda row, values: jnp.searchsorted(row, values, side="right"))
    return search(token, value).astype(jnp.int32)

"""LM head, and target log-probabilities that do not materialize the logits of a large vocabulary.

`head_log_prob` processes the vocabulary in chunks, forward and backward. The forward pass stores
only the log of the softmax normaliser of each position, and the backward pass recomputes the logits
of each chunk. Each chunk has its own rows of the kernel and of the kernel's gradient. So the
kernel's gradient is not summed over chunks, which on a mesh would take one collective for each.

`head_loss` sums the losses, so that their gradient is known in the forward pass, up to a factor. It
processes the positions in parts, and computes the logits of each part once.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from thoughtbubbles.placement import is_sharded
from thoughtbubbles.sampling import log_prob_of, of_vocabulary

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int

LARGEST_LOGITS = 2**26
"""Bytes of float32 logits, over all devices, above which the vocabulary is split into chunks."""
SMALLEST_CHUNK = 1024
"""Approximate minimum number of ids in a chunk; products with fewer columns would be slow."""


def head_logits(
    hidden: Float[Array, "... D"], table: Float[Array, "V D"], *, vocab_axis: int = 0
) -> Float[Array, "... V"]:
    """Apply the LM head: compute the logits `hidden · table` in float32.

    Without `AxisType.Explicit` mesh axes, the leading axes of `hidden` are flattened, as in
    `placement.product`, so XLA gathers `hidden` if a leading axis but the first is sharded.

    Args:
        hidden: Hidden states that predict the next tokens.
        table: Kernel of the LM head (or tied embedding), `[V, D]`, or `[D, V]` with `vocab_axis=1`,
            in the dtype of the hidden states.
        vocab_axis: Index of the vocabulary axis in `table`.
    """
    # No transpose: a transposed table would be copied for every decoded token.
    subscripts = "...d,dv->...v" if vocab_axis else "...d,vd->...v"
    over = functools.partial(jnp.einsum, subscripts, preferred_element_type=jnp.float32)
    if is_sharded(hidden) or is_sharded(table):
        return over(hidden, table)
    rows = hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])  # as in `product`
    return over(rows, table).reshape(*hidden.shape[:-1], table.shape[vocab_axis])


def head_log_prob(
    hidden: Float[Array, "... D"],
    table: Float[Array, "V D"],
    targets: Int[Array, ...],
    *,
    vocab_axis: int = 0,
    chunks: int | None = None,
) -> Float[Array, ...]:
    """Apply the LM head and log-softmax, and return the log-probability of each target.

    Args:
        hidden: Hidden states `[..., D]`, one for each position.
        table: Kernel of the LM head (or tied embedding), `[V, D]`, or `[D, V]` with `vocab_axis=1`,
            in the dtype of the hidden states.
        targets: Token ids `[...]`, one target for each position.
        vocab_axis: Index of the vocabulary axis in `table`.
        chunks: Number of chunks in which the vocabulary is processed; None for `num_chunks`. With
            one chunk, all logits are computed at once and stored for the backward pass.

    Returns:
        Log-probabilities `[...]` float32, NaN for a target outside the vocabulary; `chunks` changes
        only their rounding.
    """
    if chunks is None:
        chunks = num_chunks(targets.size, table.shape[vocab_axis])
    if chunks == 1:
        return log_prob_of(head_logits(hidden, table, vocab_axis=vocab_axis), targets)
    log_prob: Any = _in_chunks(hidden, table, targets, vocab_axis, chunks)
    return of_vocabulary(log_prob, targets, table.shape[vocab_axis])


def head_loss(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    *,
    vocab_axis: int = 0,
    parts: int,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Apply the LM head and log-softmax, and sum the negative log-probabilities of the targets.

    If the sum is differentiated, the forward pass computes its gradient too, one part of the
    positions after the other. This takes three matrix products, `head_log_prob` in chunks four. If
    rows are split over the devices of `AxisType.Auto` axes, XLA sums the gradient of the kernel
    over devices once for each part.

    Args:
        hidden: Hidden states, one for each position.
        table: Kernel of the LM head (or tied embedding), `[V, D]`, or `[D, V]` with `vocab_axis=1`,
            in the dtype of the hidden states.
        targets: Token ids, one target for each position, or -1 for no target.
        vocab_axis: Index of the vocabulary axis in `table`.
        parts: Number of parts into which the `T` positions of each row are split, such as
            `num_parts`.

    Returns:
        Sum in nats; and the negative log-probability of each target, 0 where there is none. The
        latter have no gradient. A target outside the vocabulary gives NaN, with a gradient of 0.
    """
    # In `shard_map` the kernel varies as the positions do, so its gradient is summed once.
    table = table + jnp.zeros_like(hidden, table.dtype, shape=())
    batch, length = targets.shape
    padding = ((0, 0), (0, -length % parts))
    rows = jnp.pad(hidden, (*padding, (0, 0))).reshape(batch, parts, -1, hidden.shape[-1])
    ids = jnp.pad(targets, padding, constant_values=-1).reshape(batch, parts, -1)
    found: Any = _summed(rows.swapaxes(0, 1), table, ids.swapaxes(0, 1), vocab_axis)
    return found[0], jax.lax.stop_gradient(found[1].swapaxes(0, 1).reshape(batch, -1)[:, :length])


def num_chunks(positions: int, vocab_size: int) -> int:
    """Return the number of chunks into which `head_log_prob` splits a vocabulary by default.

    The logits of a chunk take about `LARGEST_LOGITS` bytes or less, but a chunk has at least about
    `SMALLEST_CHUNK` token ids.

    Args:
        positions: Total number of positions in all rows, over all devices.
        vocab_size: Size of the vocabulary.
    """
    needed = math.ceil(4 * positions * vocab_size / LARGEST_LOGITS)
    chunks = max(min(needed, vocab_size // SMALLEST_CHUNK), 1)
    # A slightly larger number that divides `vocab_size` saves padding the table.
    return next((n for n in range(chunks, 2 * chunks) if vocab_size % n == 0), chunks)


def num_parts(batch: int, length: int, vocab_size: int, embed_dim: int) -> int:
    """Return the number of parts in which `head_loss` processes the positions of rows by default.

    The logits of a part take about `LARGEST_LOGITS` bytes or less. But a part has at least about
    half as many positions as the embedding has dimensions, because each part reads and writes the
    whole gradient of the kernel. The number is 0, for other ways to compute the loss, if all logits
    take at most `LARGEST_LOGITS` bytes, or if there are more rows than a part may have positions.

    Args:
        batch: Number of rows.
        length: Number of positions of each row.
        vocab_size: Size of the vocabulary.
        embed_dim: Size of the hidden states.
    """
    if 4 * batch * length * vocab_size <= LARGEST_LOGITS:
        return 0
    positions = max(LARGEST_LOGITS // (4 * vocab_size), embed_dim // 2) // batch
    return -(-length // positions) if positions else 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _in_chunks(hidden, table, targets, vocab_axis, chunks):
    return _forward(hidden, table, targets, vocab_axis, chunks)[0]


def _forward(hidden, table, targets, vocab_axis, chunks):
    vocab_size = table.shape[vocab_axis]

    def add(carry, part):
        peak, total, picked = carry
        rows, ids = part
        logits = _known(head_logits(hidden, rows, vocab_axis=vocab_axis), ids, vocab_size)
        higher = jnp.maximum(peak, logits.max(axis=-1))
        total = total * jnp.exp(peak - higher) + jnp.exp(logits - higher[..., None]).sum(axis=-1)
        picked += jnp.where(_chosen(ids, targets), logits, 0).sum(axis=-1)
        return (higher, total, picked), None

    # Sum of both, because either may vary over `AxisType.Manual` mesh axes.
    zeros = jnp.zeros_like(targets, jnp.float32) + jnp.zeros_like(hidden[..., 0], jnp.float32)
    parts = _parts(table, vocab_axis, chunks), _ids(vocab_size, chunks)
    (peak, total, picked), _ = jax.lax.scan(add, (zeros - jnp.inf, zeros, zeros), parts)
    normaliser = peak + jnp.log(total)
    return picked - normaliser, (hidden, table, targets, normaliser)


def _backward(vocab_axis, chunks, residuals, gradient):
    hidden, table, targets, normaliser = residuals
    vocab_size = table.shape[vocab_axis]

    def add(total, part):
        rows, ids = part
        logits, pull = jax.vjp(functools.partial(head_logits, vocab_axis=vocab_axis), hidden, rows)
        probability = jnp.exp(_known(logits, ids, vocab_size) - normaliser[..., None])
        of_hidden, of_rows = pull(gradient[..., None] * (_chosen(ids, targets) - probability))
        return total + of_hidden.astype(jnp.float32), of_rows

    parts, join = jax.vjp(lambda table: _parts(table, vocab_axis, chunks), table)
    zeros = jnp.zeros_like(hidden, jnp.float32)
    of_hidden, of_parts = jax.lax.scan(add, zeros, (parts, _ids(vocab_size, chunks)))
    return of_hidden.astype(hidden.dtype), join(of_parts)[0], None


_in_chunks.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _summed(rows, table, ids, vocab_axis):
    def part(part):
        return _nats(head_logits(part[0], table, vocab_axis=vocab_axis), part[1])[1]

    nats = jax.lax.map(part, (rows, ids))
    return nats.sum(), nats


def _nats(logits, ids):
    nats = jnp.where(ids < 0, 0, -log_prob_of(logits, jnp.maximum(ids, 0)))
    return nats.sum(), nats


def _summed_forward(rows, table, ids, vocab_axis):
    subscripts = "nd,nv->dv" if vocab_axis else "nv,nd->vd"
    of_kernel = functools.partial(jnp.einsum, subscripts, preferred_element_type=jnp.float32)

    def add(total, part):
        hidden, ids = part
        over = functools.partial(head_logits, table=table, vocab_axis=vocab_axis)
        logits, pull = jax.vjp(over, hidden)
        slope, nats = jax.grad(_nats, has_aux=True)(logits, ids)
        both = slope.reshape(-1, slope.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
        return total + of_kernel(*both[::-1] if vocab_axis else both), (nats, *pull(slope))

    zeros = jnp.zeros_like(table, jnp.float32)
    of_table, (nats, of_rows) = jax.lax.scan(add, zeros, (rows, ids))
    return (nats.sum(), nats), (of_rows, of_table.astype(table.dtype))


def _summed_backward(_, slopes, gradients):
    return *jax.tree.map(lambda slope: (gradients[0] * slope).astype(slope.dtype), slopes), None


_summed.defvjp(_summed_forward, _summed_backward)


def _parts(table, vocab_axis, chunks):
    """Split the table into chunks along a new leading axis.

    Chunk `c` has the ids `c`, `c + chunks`, `c + 2 * chunks` and so on, so that each device of a
    sharded vocabulary has an equal part of every chunk.
    """
    vocab_size = table.shape[vocab_axis]
    size = -(-vocab_size // chunks)
    padding = [(0, size * chunks - vocab_size if axis == vocab_axis else 0) for axis in range(2)]
    shape = [*table.shape[:vocab_axis], size, chunks, *table.shape[vocab_axis + 1 :]]
    return jnp.moveaxis(jnp.pad(table, padding).reshape(shape), vocab_axis + 1, 0)


def _ids(vocab_size, chunks):
    """Return the token ids of each chunk, `[chunks, C]`; ids from `vocab_size` on are padding."""
    return jnp.arange(-(-vocab_size // chunks) * chunks).reshape(-1, chunks).T


def _known(logits, ids, vocab_size):
    return jnp.where(ids < vocab_size, logits, -jnp.inf)


def _chosen(ids, targets):
    return jnp.expand_dims(ids, range(targets.ndim)) == targets[..., None]

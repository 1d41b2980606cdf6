"""Linear attention over neurons: rotary phases, attention within a chunk, and the state.

Neurons have the shape `[H, B, C, N]` here, with heads first: H heads, B rows, C vectors of a chunk,
N neurons of a head. In any other order, XLA's CPU compiler transposes neurons for each product. The
vectors between neurons have the shape `[B, C, d]`: d is the width, `embed_dim`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from thoughtbubbles.hatchling.config import HatchlingConfig
from thoughtbubbles.positions import NEAR, fixed_point, turns_at
from thoughtbubbles.short_repr import ShortRepr

NORM_EPS = 1e-5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Reach(ShortRepr):
    """Positions of the `C` vectors of a chunk, and mask and decay of attention, for all layers.

    Attributes:
        position: Position of each vector, `[B, C]` int32, or `[1, C]` if all rows have the same
            positions.
        real: Whether each slot holds a vector and not padding, `[B, C]` bool.
        decay_mask: Factor on the attention score of query vector t (axis 2) and key vector s (axis
            3) of the chunk, `[H, B, C, C]` float32 or an array that broadcasts to this shape. It is
            the decay from s to t, or 0 if t does not attend to s.
        query_decay: Factor on what each vector reads from the state before the chunk, `[H, B, C]`
            float32 or an array that broadcasts to this shape; None for factor 1.
        key_decay: Factor on what each vector adds to the state after the chunk, of the same shape
            as `query_decay`; None for factor 1.
        state_decay: Decay of the state from before to after the chunk, `[B, H]`; None for factor 1.
        end: Position of the next vector of each row, `[B]` int32.
        offset: Fraction of a token added to each position, `[B, C]` float32; None for 0.
        bound: Static upper bound on the positions, or None if unknown. Up to `positions.NEAR`,
            float32 phases are exact enough.
    """

    position: jax.Array
    real: jax.Array
    decay_mask: jax.Array
    query_decay: jax.Array | None
    key_decay: jax.Array | None
    state_decay: jax.Array | None
    end: jax.Array
    offset: jax.Array | None = None
    bound: int | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def of(
        cls,
        config: HatchlingConfig,
        first: jax.Array,
        length: jax.Array,
        size: int,
        starts: jax.Array | None = None,
    ) -> "Reach":
        """Compute the reach of chunks whose vectors have consecutive positions.

        Args:
            config: Config of the model.
            first: Position of the first vector of each row, `[B]` int32.
            length: Number of real vectors in each row, `[B]` int32.
            size: Number of slots of the chunk (C).
            starts: Whether a document begins at each vector, `[B, C]` bool. Vectors of a document
                don't attend to earlier documents, and its positions begin at 0. None means that no
                document begins in the chunk.
        """
        offset = jnp.arange(size)
        real = offset < length[:, None]
        position, end = first[:, None] + offset, first + length
        # Strictly earlier vectors: a vector does not attend to itself.
        decay_mask = (offset[:, None] > offset).astype(jnp.float32)
        query_decay, key_decay, state_decay = None, None, None
        decay = damping(config)
        if decay is not None:
            decay_at = decay[:, None, None]
            decay_mask = decay_mask * decay_at[..., None] ** jnp.maximum(
                offset[:, None] - offset, 0
            )
            query_decay = decay_at**offset
            key_decay = decay_at ** jnp.maximum(length[:, None] - offset, 0)
            state_decay = decay ** length[:, None]
        if starts is not None:
            starts = starts & real
            document = jnp.cumsum(starts, axis=1)
            began = jax.lax.cummax(jnp.where(starts, offset, 0), axis=1)
            position = jnp.where(document > 0, offset - began, position)
            any_start = document[:, -1] > 0
            end = jnp.where(any_start, length - began[:, -1], end)
            decay_mask = decay_mask * (document[:, :, None] == document[:, None, :])
            query_decay = (document == 0) * (jnp.float32(1) if query_decay is None else query_decay)
            last = document == document[:, -1:]
            key_decay = last * (jnp.float32(1) if key_decay is None else key_decay)
            state_decay = ~any_start[:, None] * (
                jnp.float32(1) if state_decay is None else state_decay
            )
        return cls(position, real, decay_mask, query_decay, key_decay, state_decay, end)

    @classmethod
    def from_mask(cls, config: HatchlingConfig, position: jax.Array, visible: jax.Array) -> "Reach":
        """Compute the reach of whole rows from given positions and an attention mask.

        Args:
            config: Config of the model.
            position: Position of each vector, `[B, T]` int32.
            visible: Attention mask `[B, T, T]` bool: whether a vector (axis 1) attends to another
                (axis 2). The diagonal is ignored, since no vector attends to itself.
        """
        size = position.shape[1]
        decay_mask = (visible & ~jnp.eye(size, dtype=bool)).astype(jnp.float32)
        decay = damping(config)
        if decay is not None:
            distance = jnp.maximum(position[:, :, None] - position[:, None, :], 0)
            decay_mask = decay_mask * decay[:, None, None, None] ** distance
        real = jnp.ones(position.shape, bool)
        return cls(position, real, decay_mask, None, None, None, position[:, -1])


def attend(
    rotated: jax.Array,
    value: jax.Array,
    reach: Reach,
    synapses: jax.Array | None,
    fresh: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Apply linear attention to a chunk, and update the state.

    Args:
        rotated: Rotated neurons `[H, B, C, N]`, both queries and keys; 0 in padding.
        value: Values `[B, C, d]` of width d.
        reach: Positions, mask and decay of the chunk's vectors.
        synapses: State before the chunk, `[B, H, N, d]` float32; None for rows that begin with the
            chunk and need no state after it.
        fresh: Static promise that `synapses` are 0.

    Returns:
        Attention output `[H, B, C, d]`, and the state after the chunk, of the shape of `synapses`
        (None if `synapses` is None).
    """
    scores = (overlap(rotated) * reach.decay_mask).astype(value.dtype)
    # A copy of the values for each head: without it, all scores are transposed for one product.
    values = jnp.broadcast_to(value, (len(rotated), *value.shape))
    read = jnp.einsum("hbts,hbsd->hbtd", scores, values)
    if synapses is None:
        return read, None
    query = rotated.astype(jnp.float32)
    if not fresh:
        before = jnp.einsum("hbtn,bhnd->hbtd", query, synapses)
        if reach.query_decay is not None:
            before = before * reach.query_decay[..., None]
        read = read + before.astype(value.dtype)
    key = query if reach.key_decay is None else query * reach.key_decay[..., None]
    if reach.state_decay is not None:
        synapses = synapses * reach.state_decay[..., None, None]
    # Values are the first factor, so that XLA's CPU compiler transposes them and not the neurons.
    written = jnp.einsum("hbtd,hbtn->hbdn", values.astype(jnp.float32), key)
    return read, synapses + written.transpose(1, 0, 3, 2)


def by_head(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Multiply `x [H, B, C, d]` by a matrix per head, `weights [d, H, N]`, to `[H, B, C, N]`."""
    flat = x.reshape(len(x), -1, x.shape[-1])  # one axis for gradients to contract
    # Without the barrier, XLA transposes the factors of the gradient instead of their product,
    # which takes a CPU almost twice as long.
    matrices = jax.lax.optimization_barrier(weights.swapaxes(0, 1))
    return jnp.einsum("htd,hdn->htn", flat, matrices).reshape(*x.shape[:-1], -1)


@jax.custom_jvp
def overlap(rotated: jax.Array) -> jax.Array:
    """Inner products of all pairs of vectors in `rotated [H, B, C, N]`: `[H, B, C, C]` float32."""
    return jnp.einsum("hbtn,hbsn->hbts", rotated, rotated, preferred_element_type=jnp.float32)


@overlap.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # Both factors are the same array, so one product gives the derivatives by both.
    (rotated,), (change,) = primals, tangents
    first = jnp.einsum("hbtn,hbsn->hbts", change, rotated, preferred_element_type=jnp.float32)
    return overlap(rotated), first + first.swapaxes(-1, -2)


def frequencies(neurons: int, base: float) -> jax.Array:
    """Rotary frequencies of a head's N neurons in turns per token, `[N]`, equal within a pair."""
    pair = np.arange(neurons) // 2
    return jnp.asarray(base ** (-2 * pair / neurons) / (2 * np.pi), jnp.float32)


def damping(config: HatchlingConfig) -> jax.Array | None:
    """Decay factor per token of each head, `[H]`, from ALiBi's slopes; None without damping."""
    if not config.damping:
        return None
    slope = 2.0 ** (-8 * np.arange(1, config.num_heads + 1) / config.num_heads)
    return jnp.asarray(np.exp(-slope), jnp.float32)


def turns_of(reach: Reach, frequency: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute cosine and sine `[H, B, C, N]` float32 of each neuron's rotary phase.

    Args:
        reach: Reach with the positions of the vectors.
        frequency: Frequencies of the neurons, `[H, N]`, in turns per token.
    """
    frequency = frequency[:, None, None, :]
    offset = None if reach.offset is None else reach.offset[..., None]
    position = reach.position[..., None].astype(jnp.float32)
    phase = ((position if offset is None else position + offset) * frequency) % 1.0
    if reach.bound is None or reach.bound > NEAR:
        whole = reach.position[..., None].astype(jnp.int32)
        far = turns_at(whole, *fixed_point(frequency))
        far = (far if offset is None else far + offset * frequency) % 1.0
        phase = jnp.where(whole < NEAR, phase, far)
    return jnp.cos(2 * jnp.pi * phase), jnp.sin(2 * jnp.pi * phase)


def rotate(x: jax.Array, turns: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate each pair of neighbouring neurons in `x [H, B, C, N]` by its phase (RoPE).

    Args:
        x: Neurons.
        turns: Cosines and sines of the phases, from `turns_of`.
    """
    cos, sin = turns
    # Shifted, not sliced with a stride: XLA's TPU compiler takes minutes and gigabytes for an axis
    # of pairs beside an axis of thousands of neurons. The padding of a shift is never used.
    even = jnp.arange(x.shape[-1]) % 2 == 0
    wider = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 1)])
    turned = jnp.where(even, -wider[..., 2:], wider[..., :-2])
    return (x * cos + turned * sin).astype(x.dtype)


def normalized(x: jax.Array) -> jax.Array:
    """LayerNorm over the last axis, without scale and bias."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + NORM_EPS)).astype(x.dtype)

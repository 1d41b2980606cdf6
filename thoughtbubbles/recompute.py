"""Forward results computed again in the backward pass, in place of being kept for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from thoughtbubbles.streams import Streams


def once_known(values: jax.Array, gradient: jax.Array) -> jax.Array:
    """Values to compute forward results from again, once the gradient of a result is known.

    Without it XLA finds that the results are those of the forward pass, and keeps these. The
    barrier of `jax.checkpoint` does the same, but XLA removes it on a CPU before it looks for equal
    computations; there the values depend on 0 times the gradient, which is never simplified away.

    Args:
        values: Values `[...]`.
        gradient: Gradient of any result that has the shape of the values.
    """
    return jax.lax.platform_dependent(
        values,
        gradient,
        cpu=lambda values, gradient: values + _zeros_of(gradient).astype(values.dtype),
        default=lambda *both: jax.lax.optimization_barrier(both)[0],
    )


def _zeros_of(values: jax.Array) -> jax.Array:
    # XLA knows no zero here, as 0 times a value may be NaN; that of an infinite one is replaced.
    return jnp.where(jnp.isfinite(values), 0 * values, 0)


def recomputed(run: Callable[..., Streams]) -> Callable[..., Streams]:
    """A block of which the backward pass keeps the input alone, on every backend.

    Args:
        run: Function of streams and of arrays that it uses, to streams of the same shape. It closes
            over no array that has a gradient.
    """

    def forward(streams: Streams, *arrays: Any) -> tuple[Streams, Any]:
        return run(streams, *arrays), (streams, *arrays)

    def backward(inputs: Any, gradient: Streams) -> Any:
        streams, *arrays = inputs
        streams = streams.replace(x=once_known(streams.x, gradient.x))
        return jax.vjp(run, streams, *arrays)[1](gradient)

    block = jax.custom_vjp(run)
    block.defvjp(forward, backward)
    return block

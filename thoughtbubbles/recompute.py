"""Rematerialization: recompute activations in the backward pass instead of storing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from thoughtbubbles.streams import Streams


def once_known(values: jax.Array, gradient: jax.Array) -> jax.Array:
    """Make values depend on a gradient, so that XLA must recompute results from these values.

    Without this dependence, XLA finds that recomputed results equal those of the forward pass, and
    stores the latter. An optimization barrier, as in `jax.checkpoint`, prevents this, except on a
    CPU, where XLA removes barriers before it eliminates common subexpressions. On a CPU, 0 times
    the gradient is added to the values instead, which XLA never simplifies away.

    Args:
        values: Values `[...]` from which the backward pass recomputes results.
        gradient: Gradient of any result with the same shape as the values.

    Returns:
        The same values.
    """
    return jax.lax.platform_dependent(
        values,
        gradient,
        cpu=lambda values, gradient: values + _zeros_of(gradient).astype(values.dtype),
        default=lambda *both: jax.lax.optimization_barrier(both)[0],
    )


def _zeros_of(values: jax.Array) -> jax.Array:
    # XLA can't simplify this to 0, as 0 times a value may be NaN; non-finite values become 0.
    return jnp.where(jnp.isfinite(values), 0 * values, 0)


def recomputed(run: Callable[..., Streams]) -> Callable[..., Streams]:
    """Wrap a block so that only its input is stored for the backward pass, on every backend.

    Args:
        run: Function of streams and further arrays that returns streams of the same shape. Arrays
            that need a gradient must be arguments, not closure variables.

    Returns:
        Function with the arguments, the result and the gradients of `run`.
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

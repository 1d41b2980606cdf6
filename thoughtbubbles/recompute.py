"""Rematerialization: recompute activations in the backward pass instead of storing them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from thoughtbubbles.streams import Streams

ATTENTION = "attention"
"""Name of the arrays of attention that `remat="dots"` stores (`jax.ad_checkpoint`)."""
CUDNN_ATTENTION = "dot_product_attention_fwd"
"""Prefix of the name of JAX's primitive of cuDNN's attention, whose results have no name."""
_policies = jax.checkpoint_policies


def _is_of_cudnn(primitive: Any, *_: Any, **_options: Any) -> bool:
    """Policy that stores the output and the softmax statistics of cuDNN's attention."""
    return primitive.name.startswith(CUDNN_ATTENTION)


POLICIES = {
    "full": _policies.nothing_saveable,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_from_both_policies(_policies.save_only_these_names(ATTENTION), _is_of_cudnn),
    ),
}


def once_known(values: jax.Array, gradient: jax.Array) -> jax.Array:
    """Make values depend on a gradient, so that XLA must recompute results from these values.

    Without this dependence, XLA finds that recomputed results equal those of the forward pass, and
    stores the latter. An optimization barrier, as in `jax.checkpoint`, prevents this, except on a
    CPU, where XLA removes barriers before it eliminates common subexpressions. On a CPU, 0 times
    the gradient is added to the values instead, which XLA never simplifies away.

    Args:
        values: Values `[...]` from which the backward pass recomputes results.
        gradient: Gradient of any result, of a shape that broadcasts to that of the values.

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


def recomputed(run: Callable[..., Streams], policy: Callable[..., Any]) -> Callable[..., Streams]:
    """Wrap a block so that the backward pass recomputes activations, on every backend.

    Args:
        run: Function of streams and further arrays that returns streams of the same shape. Arrays
            that need a gradient must be arguments, not closure variables.
        policy: Policy of `jax.checkpoint`: which activations are stored.

    Returns:
        Function with the arguments, the result and the gradients of `run`.
    """
    checkpointed = jax.checkpoint(run, policy=policy, prevent_cse=False)  # `once_known` does

    def backward(pull: Any, gradient: Streams) -> Any:
        batch, slots, _ = gradient.x.shape
        some = gradient.x[..., 0]
        split = jax.typeof(some).sharding.spec[:1]

        def known(stored: jax.Array) -> jax.Array:
            kind = jax.typeof(stored)
            if not jnp.issubdtype(kind.dtype, jnp.floating) or kind.sharding.spec[:1] != split:
                return stored
            # Products are of two axes, but not of split rows (`placement.product`).
            for of_slots in ((batch, slots), *([] if any(split) else [(batch * slots,)])):
                rank = len(of_slots)
                if stored.shape[:rank] == of_slots:
                    ones = [1] * (stored.ndim - rank)
                    return once_known(stored, some.reshape(*of_slots, *ones))
            if stored.ndim == 4 and batch and stored.shape[0] % batch == 0:
                # Of a kernel: heads come before slots, and may be split together with the rows.
                parts = stored.shape[0] // batch
                of_rows = jnp.broadcast_to(some[:, :1], (batch, parts))
                return once_known(stored, of_rows.reshape(-1, 1, 1, 1))
            return stored  # a weight

        return jax.tree.map(known, pull)(gradient)

    block = jax.custom_vjp(run)
    block.defvjp(functools.partial(jax.vjp, checkpointed), backward)
    return block

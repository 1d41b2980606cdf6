"""Adapters of a Hatchling's linear layers Dx and E: add them, apply them, merge them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from thoughtbubbles.checks import check_adapter, check_deltas
from thoughtbubbles.hatchling.config import HatchlingConfig
from thoughtbubbles.weights import adapted

# The names of the axes of each layer: of its stack, there is none, its inputs and its outputs.
AXES = {"dx": ((), "embed", "heads"), "e": ((), "heads", "embed")}


def lora_targets(config: HatchlingConfig) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """List the layers `dx` (vectors to neurons) and `e` (neurons to vectors) with their sizes.

    Returns:
        Dict from a layer's name to `(stack, inputs, outputs)`, where `stack` is `()`.
    """
    width, neurons = config.embed_dim, config.num_neurons
    return {"dx": ((), width, neurons), "e": ((), neurons, width)}


def with_adapter(model: Any, adapter: Mapping[str, Any]) -> Any:
    """Return a copy of a model with adapters on Dx and E, which shares the model's arrays.

    Raises:
        ValueError: A name is not "dx" or "e", an adapter does not have its layer's shape, or the
            model has an adapter already.
    """
    check_adapter(model.lora_targets, adapter)
    if model.adapters is not None:
        raise ValueError("this model has an adapter already")
    copy = _copy(model)
    copy.adapters = nnx.data(dict(adapter))
    return copy


def adapted_neurons(
    neurons: jax.Array, value: jax.Array, adapters: Mapping[str, Any] | None
) -> jax.Array:
    """Add the output of Dx's adapter, if any, on `value [B, C, d]` to neurons `[H, B, C, N]`."""
    if adapters is None or "dx" not in adapters:
        return neurons
    more = adapters["dx"](value).reshape(*value.shape[:2], len(neurons), -1)
    return neurons + jnp.moveaxis(more, 2, 0).astype(neurons.dtype)


def adapted_vectors(
    vectors: jax.Array, y: jax.Array, adapters: Mapping[str, Any] | None
) -> jax.Array:
    """Add the output of E's adapter, if any, on neurons `y [H, B, C, N]` to vectors `[B, C, d]`."""
    if adapters is None:
        return vectors
    flat = jnp.moveaxis(y, 0, 2).reshape(*vectors.shape[:2], -1)
    return adapted(vectors, flat, adapters, "e")


def merged(model: Any, deltas: Mapping[str, jax.Array]) -> Any:
    """Return a copy of a model with `deltas [inputs, outputs]` added to Dx and E.

    Raises:
        ValueError: A name is not "dx" or "e", or a delta does not have its layer's shape.
    """
    check_deltas(model.lora_targets, deltas)
    copy = _copy(model)
    for name, delta in deltas.items():
        kernel = {"dx": copy.dx, "e": copy.e}[name]
        # Not kernel[...] = ...: that writes into NumPy arrays, which the other model shares.
        kernel.set_value(kernel[...] + delta.reshape(kernel.shape).astype(kernel.dtype))
    return copy


def _copy(model: Any) -> Any:
    leaves, structure = jax.tree.flatten(model)
    return jax.tree.unflatten(structure, leaves)

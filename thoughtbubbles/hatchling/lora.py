"""LoRA adapters on a Hatchling's linear layers Dx (vectors to neurons), E (neurons to vectors)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from thoughtbubbles.checks import check_adapter, check_deltas
from thoughtbubbles.hatchling.config import HatchlingConfig
from thoughtbubbles.weights import adapted

# Logical axis names of each layer: stack axes (none), input axis and output axis.
AXES = {"dx": ((), "embed", "heads"), "e": ((), "heads", "embed")}


def lora_targets(config: HatchlingConfig) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Return the sizes of the linear layers `dx` (vectors to neurons) and `e` (neurons to vectors).

    Returns:
        Mapping from layer name to `(stack, inputs, outputs)`, where `stack` is `()`.
    """
    width, neurons = config.embed_dim, config.num_neurons
    return {"dx": ((), width, neurons), "e": ((), neurons, width)}


def with_adapter(model: Any, adapter: Mapping[str, Any]) -> Any:
    """Return a copy of a `Hatchling` with adapters on Dx and E; the copy shares its arrays.

    Args:
        model: The `Hatchling`; it is not changed.
        adapter: Mapping from layer name ("dx", "e") to its adapter, a callable from
            `[..., inputs]` to `[..., outputs]`.

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
    """Add the output of the adapter of Dx, if there is one, to the output of Dx.

    Args:
        neurons: Output of Dx, `[H, B, C, N]`: `N` neurons per head for `C` vectors of each row.
        value: Input of Dx, vectors `[B, C, d]` of width d.
        adapters: Mapping from layer name ("dx", "e") to its adapter; None without adapters.
    """
    if adapters is None or "dx" not in adapters:
        return neurons
    more = adapters["dx"](value).reshape(*value.shape[:2], len(neurons), -1)
    return neurons + jnp.moveaxis(more, 2, 0).astype(neurons.dtype)


def adapted_vectors(
    vectors: jax.Array, y: jax.Array, adapters: Mapping[str, Any] | None
) -> jax.Array:
    """Add the output of the adapter of E, if there is one, to the output of E.

    Args:
        vectors: Output of E, `[B, C, d]`: `C` vectors of width d in each row.
        y: Input of E, gated neurons `[H, B, C, N]`: `N` neurons per head for each vector.
        adapters: Mapping from layer name ("dx", "e") to its adapter; None without adapters.
    """
    if adapters is None:
        return vectors
    flat = jnp.moveaxis(y, 0, 2).reshape(*vectors.shape[:2], -1)
    return adapted(vectors, flat, adapters, "e")


def merged(model: Any, deltas: Mapping[str, jax.Array]) -> Any:
    """Return a copy of a `Hatchling` with changes added to Dx and E, such as merged LoRA adapters.

    Args:
        model: The `Hatchling`; it is not changed.
        deltas: Mapping from layer name ("dx", "e") to a change of its kernel, `[inputs, outputs]`.

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

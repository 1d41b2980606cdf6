"""Adapters of a Hatchling: its linear layers Dx and E, adapters added to them, adapters merged."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from thoughtbubbles.checks import check_adapter, check_deltas
from thoughtbubbles.hatchling.config import HatchlingConfig

# The names of the axes of each layer: of its stack, there is none, its inputs and its outputs.
AXES = {"dx": ((), "embed", "heads"), "e": ((), "heads", "embed")}


def lora_targets(config: HatchlingConfig) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Dx, which makes neurons of vectors, and E, which makes vectors of neurons."""
    width, neurons = config.embed_dim, config.num_neurons
    return {"dx": ((), width, neurons), "e": ((), neurons, width)}


def with_adapter(model: Any, adapter: Mapping[str, Any]) -> Any:
    """The same arrays with an adapter added to Dx and E.

    Raises:
        ValueError: A name or a shape is that of another layer, or the model has an adapter already.
    """
    check_adapter(model.lora_targets, adapter)
    if model.adapters is not None:
        raise ValueError("this model has an adapter already")
    copy = _copy(model)
    copy.adapters = nnx.data(dict(adapter))
    return copy


def merged(model: Any, deltas: Mapping[str, jax.Array]) -> Any:
    """The model with `deltas [inputs, outputs]` added to Dx and E.

    Raises:
        ValueError: A name is that of another layer, or a delta has another shape than its layer.
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

"""Flatten pytrees to dicts from readable names to leaves, the form that checkpoints store."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util


class CheckpointError(ValueError):
    """Raised if a checkpoint can't be written or read, or differs from a tree; one-line message."""


def flatten(tree: Any) -> dict[str, Any]:
    """Flatten a pytree into a dict from names to leaves, in the tree's order.

    Args:
        tree: Pytree of arrays, real or abstract.

    Returns:
        Mapping from names to leaves. A name is the path of the leaf in the tree, joined by slashes,
        such as `blocks/attention/q`.

    Raises:
        CheckpointError: A leaf is not an array or is empty, or two leaves have the same name.
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        # An nnx.Variable adds this key below the name of the parameter.
        if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
            path = path[:-1]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in named:
            raise CheckpointError(f"two leaves have the name {name}: rename one of them")
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise CheckpointError(
                f"{name} is a Python {type(leaf).__name__} ({leaf!r}), not an array: "
                f"make it jnp.asarray({leaf!r})"
            )
        if leaf.size == 0:
            raise CheckpointError(f"{name} has shape {leaf.shape}, no elements to store: drop it")
        named[name] = leaf
    return named


def nested(leaves: Mapping[str, Any]) -> dict[Any, Any]:
    """Convert a flat dict of leaves to a nested dict by splitting names at the slashes.

    Keys are ints on a level whose names are all digits, such as the indices of a list.

    Args:
        leaves: Mapping from names to leaves, as `flatten` returns it.
    """

    def with_indices(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        as_key = int if all(key.isdigit() for key in node) else str
        return {as_key(key): with_indices(child) for key, child in node.items()}

    return with_indices(traverse_util.unflatten_dict(dict(leaves), sep="/"))


def forms(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Describe each leaf as text: its shape and dtype, e.g. "(4, 8) float32".

    The dtype of a PRNG key contains its implementation, e.g. "() key<threefry2x32>".
    """
    impls = key_impls(leaves)
    return {
        name: f"{tuple(leaf.shape)} "
        + (f"key<{impls[name]}>" if name in impls else str(leaf.dtype))
        for name, leaf in leaves.items()
    }


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_impls(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Return a mapping from the name of each leaf that is a PRNG key to its implementation."""
    impls = {}
    for name, leaf in leaves.items():
        if _is_key(leaf):
            # Inside of eval_shape, key_impl also works for an abstract key.
            jax.eval_shape(
                lambda key, name=name: impls.update({name: str(jax.random.key_impl(key))}),
                jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
            )
    return impls


def stored(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Replace PRNG keys with their uint32 key data, as checkpoints store keys."""
    return {n: jax.random.key_data(leaf) if _is_key(leaf) else leaf for n, leaf in leaves.items()}


def read_targets(leaves: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shape, dtype and sharding in which each leaf is read.

    A PRNG key is read as its uint32 data, sharded like the key. A leaf without a sharding is read
    onto the first local device.
    """
    targets = {}
    for name, leaf in leaves.items():
        form = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        if _is_key(leaf):
            form = jax.eval_shape(jax.random.key_data, form)
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        targets[name] = jax.ShapeDtypeStruct(form.shape, form.dtype, sharding=sharding)
    return targets

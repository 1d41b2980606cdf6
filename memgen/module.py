"""Base class of NNX modules with a visible constructor signature; parameters with named axes.

`Module` is a copy of `thoughtbubbles.module.Module`, as the two libraries do not import each other.
"""

import inspect
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

Param = TypeVar("Param", bound=nnx.Variable)


def named(
    kind: type[Param], value: jax.Array, axes: tuple[str | None, ...], inputs: int = 0
) -> Param:
    """Make a parameter with axis names, which `nnx.get_partition_spec` maps to mesh axes.

    Args:
        kind: Variable type of the parameter.
        value: Initial value.
        axes: Name of each axis; None for an axis that is never sharded.
        inputs: Number of axes that a matrix product contracts, stored as the variable's metadata.
    """
    # Flax would need a mesh to shard the parameter at its creation.
    return kind(value, inputs=inputs, out_sharding=axes, eager_sharding=False)


def checked_kernel(
    init: Initializer, key: jax.Array, shape: tuple[int, ...], dtype: Dtype
) -> jax.Array:
    """Call an initializer; raise a ValueError unless it returns an array of the given shape."""
    if not callable(init):
        raise ValueError(
            f"kernel_init is a {type(init).__name__}: give an initializer, such as "
            "nnx.initializers.normal(0.02)"
        )
    kernel = init(key, shape, dtype)
    if getattr(kernel, "shape", None) != shape:
        is_array = hasattr(kernel, "shape")
        given = f"array of shape {kernel.shape}" if is_array else type(kernel).__name__
        raise ValueError(
            f"kernel_init gives a {given} for a kernel of {shape}: return one of the shape that it "
            "is called with"
        )
    return jnp.asarray(kernel)


class _Constructor:
    """Descriptor that returns a class's constructor signature, which Flax's metaclass hides."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature | None:
        if instance is not None:  # an instance's signature is that of `__call__`
            return None
        if owner.__init__ is object.__init__:
            return inspect.Signature()
        signature = inspect.signature(owner.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class Module(nnx.Module):
    """An `nnx.Module` whose constructor's arguments are shown by `help()` and editors."""

    __signature__ = _Constructor()

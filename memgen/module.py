"""NNX modules whose classes say their constructors' arguments, and parameters that name their axes.

The two libraries do not import each other: `Module` is that of `thoughtbubbles.module`.
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
    """A parameter that names its axes to Flax: `nnx.get_partition_spec` maps them by its rules.

    Args:
        kind: Type of the parameter.
        value: Initial value.
        axes: Name of each axis, None for one that no mesh splits.
        inputs: Number of leading axes that a product contracts.
    """
    # Not sharded where it is made, for which Flax would need a mesh.
    return kind(value, inputs=inputs, out_sharding=axes, eager_sharding=False)


def checked_kernel(
    init: Initializer, key: jax.Array, shape: tuple[int, ...], dtype: Dtype
) -> jax.Array:
    """What an initializer gives; a ValueError unless it has the shape that was asked for."""
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
    """Descriptor of a class's signature, which Flax's metaclass would hide."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature | None:
        if instance is not None:  # whose call is another one
            return None
        if owner.__init__ is object.__init__:
            return inspect.Signature()
        signature = inspect.signature(owner.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class Module(nnx.Module):
    """An `nnx.Module` whose class has the signature of its constructor."""

    __signature__ = _Constructor()

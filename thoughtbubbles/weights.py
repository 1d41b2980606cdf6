"""Parameters with logical axis names, and norms.

The metadata of every parameter holds the logical names of its axes (`axes`, without the leading
`layers` axis of stacked blocks) and the number of its contracted axes (`inputs`). A module needs no
mesh: the names have no effect until they are mapped to mesh axes. Flax finds the names as
`out_sharding` (with `layers`); `nnx.get_partition_spec` maps them by Flax's logical axis rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from thoughtbubbles.checks import check_choice, check_rngs
from thoughtbubbles.module import Module

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float

INIT_STD = 0.02

Variable = TypeVar("Variable", bound=nnx.Variable)


def weight(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    inputs: int = 1,
    std: float = INIT_STD,
    *,
    init: Initializer | None = None,
    dtype: Dtype = jnp.float32,
) -> nnx.Param:
    """Make the kernel of a linear layer or an embedding table, with random initial values.

    Args:
        rngs: PRNG keys, of which one is consumed.
        shape: Shape of the kernel.
        axes: Logical name of each axis.
        inputs: Number of leading axes that the linear layer contracts.
        std: Standard deviation of the normal distribution of the initial values.
        init: Initializer to use instead of the normal distribution. It is called with the matrix
            shape `(inputs, outputs)`, products of the axis sizes, so that it sees the right fan-in
            and fan-out.
        dtype: Dtype of the kernel.

    Raises:
        ValueError: `rngs` is not an `nnx.Rngs`, or `init` is not callable or returns another shape.
    """
    check_rngs(rngs)
    key = rngs.params()
    if init is None:
        value = (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    else:
        matrix = math.prod(shape[:inputs]), math.prod(shape[inputs:])
        value = checked_kernel(init, key, matrix, dtype).reshape(shape)
    return named(nnx.Param, value, axes, inputs)


def checked_kernel(
    init: Initializer, key: jax.Array, shape: tuple[int, ...], dtype: Dtype
) -> jax.Array:
    """Call an initializer; raise a ValueError unless it returns an array of shape `shape`."""
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


def vector(value: jax.Array, axes: tuple[str | None, ...]) -> nnx.Param:
    """Make a bias, scale or embedding vector, which has no contracted axes and no weight decay."""
    return named(nnx.Param, value, axes)


def named(
    kind: type[Variable],
    value: jax.Array,
    axes: tuple[str | None, ...],
    inputs: int = 0,
    stack: int = 0,
) -> Variable:
    """Make a variable whose metadata holds the logical names of its axes.

    Args:
        kind: Class of the variable.
        value: Initial value.
        axes: Logical name of each axis after the stack axes; None for an axis that is never
            sharded.
        inputs: Number of axes after the stack axes that a linear layer contracts.
        stack: Number of leading axes over which layers are stacked.
    """
    names = ("layers",) * stack + axes
    # No eager sharding, for which Flax would need a mesh.
    return kind(value, axes=axes, inputs=inputs, out_sharding=names, eager_sharding=False)


def without_layers(stack: Any) -> Any:
    """Drop the `layers` axis from the axis names of stacked modules, before they are unstacked."""

    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731

    def of_one(leaf: Any) -> Any:
        metadata = leaf.get_metadata() if is_variable(leaf) else {}
        named = metadata.get("out_sharding") and "axes" in metadata  # a parameter of ours
        return leaf.replace(out_sharding=metadata["axes"]) if named else leaf

    return jax.tree.map(of_one, stack, is_leaf=is_variable)


def plus_bias(y: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """Add a bias over the last axes of `y`, in the dtype of `y`; None adds nothing."""
    if bias is None:
        return y
    return y + jnp.expand_dims(bias[...].astype(y.dtype), range(y.ndim - bias.ndim))


def adapted(y: jax.Array, x: jax.Array, adapters: Mapping[str, Any] | None, name: str) -> jax.Array:
    """Add the output of a linear layer's LoRA adapter, if there is one, to the layer's output.

    Args:
        y: Output of the layer; its output axis may be split into several axes.
        x: `[..., inputs]` input of the layer.
        adapters: Mapping from layer name to its adapter, a callable from `[..., inputs]` to
            `[..., outputs]`; None without adapters.
        name: Name of the layer.
    """
    if adapters is None or name not in adapters:
        return y
    return y + adapters[name](x).reshape(y.shape).astype(y.dtype)


@jax.custom_jvp
def _variance(x: jax.Array) -> jax.Array:
    """Variance `[..., 1]` over the last axis.

    The custom derivative omits the derivative through the mean, which is 0. With it, XLA on a CPU
    would recompute the sum of the gradients of all later layers for each layer.
    """
    return jnp.square(x - x.mean(axis=-1, keepdims=True)).mean(axis=-1, keepdims=True)


@_variance.defjvp
def _variance_jvp(primals, tangents):
    (x,), (change,) = primals, tangents
    centred = x - x.mean(axis=-1, keepdims=True)
    return _variance(x), 2 * (centred * change).mean(axis=-1, keepdims=True)


class Norm(Module):
    """LayerNorm or RMSNorm over the last axis, computed in float32.

    Args:
        width: Size of the last axis.
        kind: Kind of the norm.
        bias: Whether a LayerNorm has a bias.
        eps: Constant added to the variance (ε).
        axis: Logical name of the last axis, for sharding.
        param_dtype: Dtype of the parameters.

    Raises:
        ValueError: The kind is unknown.
    """

    def __init__(
        self,
        width: int,
        kind: Literal["layernorm", "rmsnorm"] = "layernorm",
        *,
        bias: bool = True,
        eps: float = 1e-5,
        axis: str = "embed",
        param_dtype: Dtype = jnp.float32,
    ):
        check_choice("norm", kind, ("layernorm", "rmsnorm"))
        self.kind, self.eps = kind, eps
        self.scale = vector(jnp.ones((width,), param_dtype), (axis,))
        has_bias = bias and kind == "layernorm"
        self.bias = vector(jnp.zeros((width,), param_dtype), (axis,)) if has_bias else None

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Return `x` normalised, in the dtype of `x`."""
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            variance, y = _variance(y), y - y.mean(axis=-1, keepdims=True)
        else:
            variance = jnp.square(y).mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(variance + self.eps)
        # Expanded to the rank of `y`: users may forbid rank promotion.
        y = y * jnp.expand_dims(self.scale[...].astype(y.dtype), range(y.ndim - 1))
        if self.bias is not None:
            y = plus_bias(y, self.bias)
        return y.astype(x.dtype)

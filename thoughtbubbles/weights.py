"""Parameters and norms: values with the names of their axes.

The metadata of every parameter holds the names of its axes (`axes`, without the leading `layers`
axis of stacked blocks) and the number of contracted ones (`inputs`). A module needs no mesh: the
names have no effect until they are mapped to the axes of one. Flax finds them too
(`out_sharding`, with `layers`): `nnx.get_partition_spec` maps them by Flax's logical axis rules.
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
    """A weight, whose first `inputs` axes are contracted.

    Args:
        rngs: Random keys, of which one is taken.
        shape: Shape of the weight.
        axes: Name of each axis.
        inputs: Number of leading axes that a product contracts.
        std: Standard deviation of the normal distribution that the values are drawn from.
        init: Initializer in place of that distribution. It is called for a matrix of all inputs by
            all outputs, so that what it makes of fan-in and fan-out is right.
        dtype: Type of the weight.

    Raises:
        ValueError: The keys are not those of Flax, or the initializer gives another shape.
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


def vector(value: jax.Array, axes: tuple[str | None, ...]) -> nnx.Param:
    """A bias, scale or embedding vector, without contracted axes and weight decay."""
    return named(nnx.Param, value, axes)


def named(
    kind: type[Variable],
    value: jax.Array,
    axes: tuple[str | None, ...],
    inputs: int = 0,
    stack: int = 0,
) -> Variable:
    """A variable that names its axes.

    Args:
        kind: Type of the variable.
        value: Initial value.
        axes: Name of each axis, without those of a stack; None for one that no mesh splits.
        inputs: Number of leading axes that a product contracts.
        stack: Number of leading axes over which layers are stacked.
    """
    names = ("layers",) * stack + axes
    # Not sharded where it is made, for which Flax would need a mesh.
    return kind(value, axes=axes, inputs=inputs, out_sharding=names, eager_sharding=False)


def without_layers(stack: Any) -> Any:
    """Stacked modules whose parameters name the axes of one module, for taking them apart."""

    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731

    def of_one(leaf: Any) -> Any:
        metadata = leaf.get_metadata() if is_variable(leaf) else {}
        named = metadata.get("out_sharding") and "axes" in metadata  # a parameter of ours
        return leaf.replace(out_sharding=metadata["axes"]) if named else leaf

    return jax.tree.map(of_one, stack, is_leaf=is_variable)


def plus_bias(y: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """`y` plus a bias of its last axes, in its dtype."""
    if bias is None:
        return y
    return y + jnp.expand_dims(bias[...].astype(y.dtype), range(y.ndim - bias.ndim))


def adapted(y: jax.Array, x: jax.Array, adapters: Mapping[str, Any] | None, name: str) -> jax.Array:
    """A linear layer's output `y` of `x`, plus that of the layer's adapter, if it has one.

    Args:
        y: Output of the layer; its last axis may be split over several axes.
        x: `[..., inputs]` input of the layer.
        adapters: Adapters by the layer's name, callables from `[..., inputs]` to `[..., outputs]`.
        name: Name of the layer.
    """
    if adapters is None or name not in adapters:
        return y
    return y + adapters[name](x).reshape(y.shape).astype(y.dtype)


@jax.custom_jvp
def _variance(x: jax.Array) -> jax.Array:
    """Variance `[..., 1]` over the last axis.

    Its derivative leaves out the part by way of the mean, which is 0: with it, XLA on a CPU sums
    the gradients of all later layers anew for each layer.
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
        eps: Term added to the variance (ε).
        axis: Name of the axis, for sharding.
        param_dtype: Type of the parameters.

    Raises:
        ValueError: The kind is another one.
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
        """Normalised `x`, in its dtype."""
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            variance, y = _variance(y), y - y.mean(axis=-1, keepdims=True)
        else:
            variance = jnp.square(y).mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(variance + self.eps)
        # As many axes as `y`: users may forbid the promotion of ranks.
        y = y * jnp.expand_dims(self.scale[...].astype(y.dtype), range(y.ndim - 1))
        if self.bias is not None:
            y = plus_bias(y, self.bias)
        return y.astype(x.dtype)

"""int8 quantisation for inference, symmetric, with one scale per output of a linear layer.

The kernels of linear layers and embeddings are stored in int8. Norms, biases and fork layers (whose
scores decide which streams live) keep their dtype.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from thoughtbubbles.placement import embedding_rows, product, rows_at
from thoughtbubbles.transposed import TransposedKernel
from thoughtbubbles.weights import named

LARGEST = 127
# Number of int8 values that are converted at a time, so that they stay in a core's cache until they
# are multiplied. A whole table would be written to RAM in float32 and read again for each token.
CHUNK = 1 << 19

Model = TypeVar("Model", bound=nnx.Module)


class Int8Param(nnx.Variable):
    """An array of an `Int8Weight`; it is not a trained parameter."""


class Int8Weight(nnx.Module):
    """Kernel of a linear layer or an embedding, or a stack of kernels, in int8.

    Args:
        kernel: Kernel to quantise, `[*stack, *inputs, *outputs]` float.
        inputs: Number of contracted axes of the kernel.
        stack: Number of leading axes over which layers are stacked.
        axes: Logical names of the kernel's axes after the stack axes; None for no names. If there
            are several input (or output) axes, only the name of the first is used.

    Attributes:
        values: `[*stack, outputs, inputs]` int8, with the input axes flattened to one axis and the
            output axes to another.
        scale: `[*stack, outputs]` float32, the largest magnitude among the kernel values of each
            output, divided by 127.
        inputs: Number of contracted axes of the layer's input.
        outputs: Shape of the layer's output without its leading axes.
    """

    def __init__(
        self,
        kernel: jax.Array,
        inputs: int = 1,
        stack: int = 0,
        axes: tuple[str | None, ...] | None = None,
    ):
        shape = kernel.shape[stack:]
        self.inputs, self.outputs = inputs, shape[inputs:]
        matrix = kernel.reshape(*kernel.shape[:stack], math.prod(shape[:inputs]), -1)
        matrix = matrix.swapaxes(-1, -2).astype(jnp.float32)
        largest = jnp.abs(matrix).max(axis=-1)
        # A NaN in the kernel makes the scale NaN, and so the output.
        scale = jnp.where(largest == 0, 1.0, largest) / LARGEST
        values = jnp.rint(matrix / scale[..., None]).astype(jnp.int8)
        into, out_of = (None, None) if axes is None else (axes[0], axes[inputs])
        self.values = named(Int8Param, values, (out_of, into), stack=stack)
        self.scale = named(Int8Param, scale, (out_of,), stack=stack)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the linear layer to `x [..., *inputs]`; return `[..., *outputs]` float32.

        A stack of kernels can't be called.
        """
        x = x.reshape(*x.shape[: x.ndim - self.inputs], -1)
        y = _in_chunks(x, self.values[...])
        y = y * jnp.expand_dims(self.scale[...], range(x.ndim - 1))
        return y.reshape(*x.shape[:-1], *self.outputs)

    def rows(self, index: jax.Array) -> jax.Array:
        """Look up the embeddings of an index `[...]`; return `[..., inputs]` float32.

        An index outside the table gives NaN.
        """
        scale = embedding_rows(self.scale[...], index)
        values = rows_at(self.values[...], index, mode="clip")
        return values.astype(jnp.float32) * scale[..., None]


def linear(x: jax.Array, kernel: Any, dtype: Any, inputs: int = 1) -> jax.Array:
    """Apply a linear layer without bias, whose kernel is float or int8.

    Args:
        x: Input of the layer, `[..., *inputs]`.
        kernel: Kernel `[*inputs, *outputs]`, an `nnx.Param`, `TransposedKernel` or `Int8Weight`.
        dtype: Dtype of the result and, if the kernel is not an `Int8Weight`, of the computation.
        inputs: Number of contracted axes of an `nnx.Param`; ignored for other kernels.

    Returns:
        Output of the layer, `[..., *outputs]`.
    """
    if isinstance(kernel, Int8Weight):
        return kernel(x).astype(dtype)
    if isinstance(kernel, TransposedKernel):
        return kernel(x.astype(dtype))
    return product(x, kernel[...].astype(dtype), inputs)


def unquantised(score: Any) -> jax.Array:
    """Return a fork layer's score kernel; raise a ValueError if it was quantised."""
    dtype = getattr(score, "dtype", type(score).__name__)
    fine = hasattr(score, "dtype") and jnp.issubdtype(dtype, jnp.floating)
    if not fine or jnp.dtype(dtype).itemsize < 2:
        raise ValueError(
            f"the score weight of a fork layer is {dtype}, and must be float32 or bfloat16, as "
            'scores would tie: exclude "forks" from quantisation, or use '
            "thoughtbubbles.quantisation.quantise"
        )
    return score


def quantise(model: Model) -> Model:
    """Return a copy of a `Thoughtbubbles` model with linear layers and embeddings in int8.

    The copy is for inference. `generate`, `for_decoding`, caches, LoRA adapters (`apply_lora`) and
    policies work as before; training and merging of adapters (`merge_lora`) do not.

    Args:
        model: Model in float32 or bfloat16, before or after `for_decoding`.

    Raises:
        ValueError: The model has another architecture, or is in int8 already.
    """
    if not hasattr(model, "unstacked"):
        raise ValueError(f"{type(model).__name__} has no int8 form: give a Thoughtbubbles model")
    leaves, structure = jax.tree.flatten(model)
    copy: Any = jax.tree.unflatten(structure, leaves)
    if in_int8(copy):
        raise ValueError("the weights of this model are in int8 already: quantise it once")
    for block in [copy.blocks] if copy.unstacked is None else copy.unstacked:
        for layer, names in ((block.attention, "qkvo"), (block.mlp, ("up", "gate", "down"))):
            for name in names:
                if (kernel := getattr(layer, name)) is not None:
                    setattr(layer, name, nnx.data(_of_kernel(kernel)))
    # One scale for each token id: a row of the table, which is an output of a tied LM head.
    copy.embed = nnx.data(Int8Weight(copy.embed[...].T, axes=("embed", "vocab")))
    if copy.head is not None:
        copy.head = nnx.data(_of_kernel(copy.head))
    return copy


def in_int8(model: Any) -> bool:
    """Whether a model was made by `quantise`."""
    return isinstance(getattr(model, "embed", None), Int8Weight)


def _of_kernel(kernel: nnx.Param) -> Int8Weight:
    """Quantise a kernel `[*stack, *inputs, *outputs]`."""
    metadata = kernel.get_metadata()
    axes = metadata["axes"]
    return Int8Weight(kernel[...], metadata["inputs"], kernel.ndim - len(axes), axes)


def _in_chunks(x: jax.Array, values: jax.Array) -> jax.Array:
    """Product `[..., outputs]` float32 of `x [..., inputs]` and `values [outputs, inputs]` int8."""
    # With explicit axes, where a slice of a sharded array is an error, there are no chunks.
    if any((*jax.typeof(values).sharding.spec, *jax.typeof(x).sharding.spec[x.ndim - 1 :])):
        return _product(x, values)
    # At least two chunks, so that the conversion stays in a loop and no compiler moves it in front.
    # A barrier would be dropped earlier, and a zero made of `x` is a collective if `x` is sharded.
    chunks = max(2, -(-values.size // CHUNK))
    # A number of chunks near by that divides the rows leaves no remainder.
    chunks = next((n for n in range(chunks, 2 * chunks) if len(values) % n == 0), chunks)
    rows = len(values) // chunks
    at = chunks * rows
    # Chunk `c` has the outputs `c`, `c + chunks`, ...: if a compiler shards the outputs, each
    # device has an equal part of every chunk.
    parts = values[:at].reshape(rows, chunks, values.shape[1])

    def step(index: jax.Array, y: jax.Array) -> jax.Array:
        found = _product(x, jax.lax.dynamic_index_in_dim(parts, index, axis=1, keepdims=False))
        return jax.lax.dynamic_update_index_in_dim(y, found, index, axis=-1)

    # Depends on `x`, or the results of all layers would be allocated before the first layer runs;
    # and on the values, so that it varies over the same manual axes.
    start = x[..., :1, None].astype(jnp.float32) + jnp.zeros_like(values[0, 0], jnp.float32)
    y = jnp.broadcast_to(start, (*x.shape[:-1], rows, chunks))
    y = jax.lax.fori_loop(0, chunks if rows else 0, step, y).reshape(*x.shape[:-1], at)
    return y if at == len(values) else jnp.concatenate([y, _product(x, values[at:])], axis=-1)


def _product(x: jax.Array, values: jax.Array) -> jax.Array:
    # bfloat16 represents int8 values exactly.
    return jnp.einsum(
        "...i,oi->...o", x, values.astype(x.dtype), preferred_element_type=jnp.float32
    )

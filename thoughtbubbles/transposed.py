"""Large kernels stored transposed, with which a CPU decodes several rows faster.

XLA on a CPU multiplies a few rows by a kernel `[inputs, outputs]` at half of the speed at which the
kernel could be read from memory. With the kernel as the first operand, `[outputs, inputs]`, and the
rows as columns, the product is 1.2 to 1.7 times as fast (docs/performance.md).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

LEAST_BYTES = 1 << 26
"""Total size of a model's kernels above which they do not stay in a CPU's cache."""
LEAST_ELEMENTS = 1 << 18
"""Number of elements of the smallest kernel that is transposed."""
MOST_ROWS = 256
"""Number of rows up to which the kernel is the first operand of the product."""

KERNELS = {"attention": "qkvo", "mlp": ("up", "gate", "down")}


class TransposedKernel(nnx.Module):
    """Kernel of a linear layer or LM head, stored as a matrix `[outputs, inputs]`.

    Args:
        matrix: Array `[outputs, inputs]`, with all inputs in one axis and all outputs in another.
        outputs: Sizes of the layer's output.
        inputs: Number of contracted axes of the layer's input.
    """

    def __init__(self, matrix: jax.Array, outputs: tuple[int, ...], inputs: int = 1):
        self.matrix = nnx.Param(matrix)
        self.outputs, self.inputs = outputs, inputs

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `[..., *outputs]` in the dtype of `x [..., *inputs]`."""
        rows, matrix = x.shape[: x.ndim - self.inputs], self.matrix[...].astype(x.dtype)
        x = x.reshape(math.prod(rows), matrix.shape[1])
        if 1 < len(x) <= MOST_ROWS:
            # Without barriers XLA folds the transposes into the product, which is slow again.
            columns = jax.lax.optimization_barrier(x.T)
            y = jax.lax.optimization_barrier(matrix @ columns).T
        else:
            y = jnp.einsum("ri,oi->ro", x, matrix)
        return y.reshape(*rows, *self.outputs)


def transpose_kernels(model: Any) -> bool:
    """Replace the large kernels of a result of `for_decoding` by transposed ones, in place.

    Only a large `Thoughtbubbles` model in float32 on one CPU device is changed, which then decodes
    a batch faster and a single row up to a tenth slower. Results differ by rounding.

    Args:
        model: Model for inference, with unstacked blocks that no other model shares.

    Returns:
        Whether the model was changed.
    """
    blocks = getattr(model, "unstacked", None) or []
    held = [
        (layer, name, kernel)
        for block in blocks
        for part, names in KERNELS.items()
        for layer in [getattr(block, part)]
        for name in names
        if isinstance(kernel := getattr(layer, name), nnx.Param)
    ]
    table = getattr(model, "embed", None) if getattr(model, "head", None) is None else model.head
    arrays = [kernel.get_value() for *_, kernel in held]
    if not held or not isinstance(table, nnx.Param) or not all(map(_in_float32_on_one_cpu, arrays)):
        return False
    small = sum(array.nbytes for array in arrays) < LEAST_BYTES
    if small or jnp.dtype(model.config.dtype) != jnp.float32:
        return False
    del arrays
    while held:  # each kernel is freed before the next one is transposed
        layer, name, kernel = held.pop()
        array, inputs = kernel.get_value(), kernel.get_metadata()["inputs"]
        if array.size >= LEAST_ELEMENTS:
            matrix = array.reshape(math.prod(array.shape[:inputs]), -1).T
            setattr(layer, name, nnx.data(TransposedKernel(matrix, array.shape[inputs:], inputs)))
    array = table.get_value()
    matrix = array if model.head is None else array.T  # a tied head shares the embedding's array
    model.head = nnx.data(TransposedKernel(matrix, (len(matrix),)))
    return True


def _in_float32_on_one_cpu(array: Any) -> bool:
    if isinstance(array, Tracer) or not isinstance(array, jax.Array):
        return False
    [*devices] = array.devices()
    return array.dtype == jnp.float32 and len(devices) == 1 and devices[0].platform == "cpu"

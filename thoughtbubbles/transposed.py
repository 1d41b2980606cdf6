"""Large kernels stored transposed, with which a CPU decodes faster.

XLA on a CPU multiplies a few rows by a kernel `[inputs, outputs]` at half of the speed at which the
kernel could be read from memory. With the kernel as the first operand, `[outputs, inputs]`, and the
rows as columns, the product is 1.2 to 1.7 times as fast. A single row is multiplied faster by a
transposed kernel if the kernel has no more outputs than inputs (docs/performance.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

LEAST_BYTES = 1 << 26
"""Total size of a model's kernels above which they do not stay in a CPU's cache."""
LEAST_ELEMENTS = 1 << 18
"""Number of elements of the smallest kernel that is transposed."""
MOST_ROWS = 128
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


def can_transpose(model: Any) -> bool:
    """Whether a result of `for_decoding` is a large model in float32 on one CPU device.

    Args:
        model: `Thoughtbubbles` model with unstacked blocks.
    """
    kernels = [kernel for *_, kernel in _kernels(model)]
    if not kernels or not all(isinstance(kernel, nnx.Param) for kernel in kernels):
        return False
    arrays = [kernel.get_value() for kernel in kernels]
    large = sum(array.nbytes for array in arrays) >= LEAST_BYTES
    computes_so = jnp.dtype(model.config.dtype) == jnp.float32
    return large and computes_so and all(map(_in_float32_on_one_cpu, arrays))


def transpose_kernels(model: Any, batch: bool) -> None:
    """Replace large kernels of a model's blocks by transposed ones, in place.

    Results differ by rounding.

    Args:
        model: Model that `can_transpose`, for inference, whose blocks no other model shares.
        batch: Whether to transpose all large kernels, with which several rows are decoded faster
            and a single row is not. Otherwise only kernels with no more outputs than inputs are
            transposed, with which a single row is decoded faster.
    """
    for layer, name, kernel in _kernels(model):
        array, inputs = kernel.get_value(), kernel.get_metadata()["inputs"]
        matrix = array.reshape(math.prod(array.shape[:inputs]), -1)
        if array.size >= LEAST_ELEMENTS and (batch or matrix.shape[0] >= matrix.shape[1]):
            kernel = TransposedKernel(matrix.T, array.shape[inputs:], inputs)
            setattr(layer, name, nnx.data(kernel))
    if batch and model.head is None and isinstance(model.embed, nnx.Param):
        # A tied LM head multiplies the embedding's array, which is transposed already.
        table = model.embed.get_value()
        model.head = nnx.data(TransposedKernel(table, (len(table),)))


def _kernels(model: Any) -> Iterator[tuple[Any, str, Any]]:
    """Yield the layer, the name and the kernel of each linear layer of the unstacked blocks."""
    for block in getattr(model, "unstacked", None) or []:
        for part, names in KERNELS.items():
            layer = getattr(block, part)
            for name in names:
                if (kernel := getattr(layer, name)) is not None:
                    yield layer, name, kernel


def _in_float32_on_one_cpu(array: Any) -> bool:
    if isinstance(array, Tracer) or not isinstance(array, jax.Array):
        return False
    [*devices] = array.devices()
    return array.dtype == jnp.float32 and len(devices) == 1 and devices[0].platform == "cpu"

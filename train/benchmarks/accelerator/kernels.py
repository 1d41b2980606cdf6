"""Measure attention kernels: errors against the reference in float32, and times."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from thoughtbubbles.attention import Attend, attend, attend_reference
from thoughtbubbles.kernels import attend_cudnn, attend_splash
from train.benchmarks.accelerator.record import Record, seconds_in_a_loop
from train.benchmarks.accelerator.sizes import KernelShape, Sizes


def implementations(platform: str) -> dict[str, Attend]:
    """Return the attention functions that run on a platform, keyed by name."""
    if platform == "tpu":
        return {"xla": attend, "splash": attend_splash}
    if platform in ("gpu", "cuda"):
        return {"xla": attend, "cudnn": attend_cudnn}
    stand_in = functools.partial(attend_cudnn, implementation="xla")
    return {"xla": attend, "cudnn's layout by xla": stand_in}


def measure_kernels(record: Record, sizes: Sizes) -> None:
    """Measure each kernel on each shape, with and without a bias."""
    for shape in sizes.kernels:
        for biased in (False, True):
            for name, kernel in implementations(jax.devices()[0].platform).items():
                record.measure(
                    f"{name} {shape}{' bias' if biased else ''}",
                    functools.partial(against_reference, kernel, shape, biased, sizes.calls),
                )


def against_reference(
    kernel: Attend, shape: KernelShape, biased: bool, calls: int
) -> dict[str, Any]:
    """Measure the errors and times of a kernel on random bfloat16 arrays.

    Args:
        kernel: Attention function.
        shape: Sizes of the attention call.
        biased: Whether the call has a bias.
        calls: Number of calls in a timed round.

    Returns:
        Dict of `errors`, the results of `error_of` for "out", "d_query", "d_key", "d_value" and, if
        biased, "d_bias"; and of `forward_seconds`, `forward_tflops_per_second`,
        `forward_and_gradient_seconds` and `forward_and_gradient_tflops_per_second`.
    """
    inputs, cotangent = random_inputs(shape, biased)
    exact = [None if x is None else x.astype(jnp.float32) for x in inputs]
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(with_gradients(attend_reference))(*exact, cotangent.astype(jnp.float32))
    gradients = jax.jit(with_gradients(kernel))
    found = gradients(*inputs, cotangent)
    names = ("out", "d_query", "d_key", "d_value", "d_bias")
    errors = {
        name: error_of(mine, theirs)
        for name, mine, theirs in zip(names, found, expected, strict=False)
    }
    seconds = seconds_in_a_loop(kernel, inputs, calls)
    with_backward = seconds_in_a_loop(with_gradients(kernel), (*inputs, cotangent), calls)
    return {
        "errors": errors,
        "forward_seconds": seconds,
        "forward_tflops_per_second": shape.flops / seconds / 1e12,
        "forward_and_gradient_seconds": with_backward,
        # Seven products instead of two: the backward pass recomputes attention probabilities.
        "forward_and_gradient_tflops_per_second": 3.5 * shape.flops / with_backward / 1e12,
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def random_inputs(shape: KernelShape, biased: bool) -> tuple[tuple[Any, ...], jax.Array]:
    """Sample random inputs of an attention call.

    Returns:
        Query, key, value (bfloat16, `[batch, slots, heads, width]`) and bias (float32, `[batch,
        slots]`; None if not `biased`) as a tuple; and a cotangent in the query's shape and dtype.
    """
    query, key, value, bias, cotangent = jax.random.split(jax.random.key(0), 5)

    def heads(key: jax.Array, count: int) -> jax.Array:
        sizes = (shape.batch, shape.slots, count, shape.width)
        return jax.random.normal(key, sizes, jnp.bfloat16)

    rows = (shape.batch, shape.slots)
    bias = jax.random.uniform(bias, rows, minval=-8.0, maxval=0.0) if biased else None
    inputs = heads(query, shape.heads), heads(key, shape.kv_heads), heads(value, shape.kv_heads)
    return (*inputs, bias), heads(cotangent, shape.heads)


def with_gradients(kernel: Attend) -> Any:
    """Make a function of a kernel's inputs and a cotangent that also computes the gradients.

    The function returns the kernel's result, followed by the gradient of each input that is not
    None.
    """

    def function(query: Any, key: Any, value: Any, bias: Any, cotangent: Any) -> tuple[Any, ...]:
        given = (query, key, value) if bias is None else (query, key, value, bias)
        call = lambda *arrays: kernel(*arrays, *(None,) * (bias is None))  # noqa: E731
        out, backward = jax.vjp(call, *given)
        return (out, *backward(cotangent.astype(out.dtype)))

    return function


def error_of(mine: jax.Array, theirs: jax.Array) -> dict[str, float]:
    """Return the error of `mine` against the exact array `theirs`.

    Returns:
        "max_absolute", the largest absolute error, and "relative", the norm of the error divided by
        the norm of the exact array.
    """
    difference = mine.astype(jnp.float32) - theirs.astype(jnp.float32)
    return {
        "max_absolute": float(jnp.abs(difference).max()),
        "relative": float(jnp.linalg.norm(difference.ravel()) / jnp.linalg.norm(theirs.ravel())),
    }

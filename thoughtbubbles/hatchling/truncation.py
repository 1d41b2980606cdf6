"""Truncated backpropagation through time: no gradient flows between the segments of a row."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Segment = Callable[[Any, Any, Any], tuple[jax.Array, tuple[Any, Any]]]
"""Function from parameters, state and inputs of a segment to `(loss, (next state, other sums))`."""


def truncated_sum(segment: Segment, params: Any, state: Any, inputs: Any) -> tuple[jax.Array, Any]:
    """Sum a loss over consecutive segments, each of which starts from the previous one's state.

    The sum is differentiable with respect to the parameters; the gradient treats each state as a
    constant. Loss and gradient are computed together, segment by segment, so activations of only
    one segment are stored at a time, for rows of any length.

    Args:
        segment: Function that computes the loss of a segment, the state after the segment, and
            other sums.
        params: Parameters, a pytree of arrays. Arrays that are not floating-point get no gradient.
        state: State before the first segment; it gets no gradient.
        inputs: Pytree of arrays whose axis 0 indexes the segments.

    Returns:
        Sum of the losses, and the other sums added over the segments, which get no gradient.
    """
    leaves, structure = jax.tree.flatten(params)
    trained = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def join(floats: list[Any], others: list[Any]) -> Any:
        left = iter(floats), iter(others)
        return jax.tree.unflatten(structure, [next(left[not is_float]) for is_float in trained])

    def scan(step: Callable[[Any, Any], tuple[Any, Any]], state: Any, inputs: Any) -> Any:
        example = jax.eval_shape(step, state, jax.tree.map(lambda leaf: leaf[0], inputs))[1]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example)

        def add(carry: Any, inputs: Any) -> tuple[Any, None]:
            state, total = carry
            state, found = step(state, inputs)
            return (state, jax.tree.map(jnp.add, total, found)), None

        return jax.lax.scan(add, (state, zeros), inputs)[0][1]

    def forward(floats: Any, others: Any, state: Any, inputs: Any) -> Any:
        def step(state: Any, inputs: Any) -> tuple[Any, Any]:
            loss, (state, sums) = segment(join(floats, others), state, inputs)
            return state, (loss, sums)

        return scan(step, state, inputs)

    def with_gradient(floats: Any, others: Any, state: Any, inputs: Any) -> Any:
        def step(state: Any, inputs: Any) -> tuple[Any, Any]:
            of = lambda floats: segment(join(floats, others), state, inputs)  # noqa: E731
            (loss, (state, sums)), gradient = jax.value_and_grad(of, has_aux=True)(floats)
            return state, ((loss, sums), gradient)

        return scan(step, state, inputs)

    def backward(gradient: Any, cotangent: Any) -> Any:
        scaled = jax.tree.map(lambda leaf: cotangent[0].astype(leaf.dtype) * leaf, gradient)
        return scaled, None, None, None

    total = jax.custom_vjp(forward)
    total.defvjp(with_gradient, backward)
    floats, others = (
        [leaf for leaf, is_float in zip(leaves, trained, strict=True) if is_float == wanted]
        for wanted in (True, False)
    )
    return total(floats, others, state, inputs)

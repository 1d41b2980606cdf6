"""Checks of arguments: each raises a ValueError of one line with the wrong value and a remedy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.experimental import multihost_utils


def on_host(array: Any) -> np.ndarray:
    """Return an entire JAX or NumPy array as a NumPy array.

    A JAX array that is sharded over several processes is gathered: each process must call this
    function.
    """
    if not isinstance(array, jax.Array) or array.is_fully_replicated or array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def checked_ids(tokens: Any) -> jax.Array:
    """Return token ids as an array; raise a ValueError unless it is integer `[batch, tokens]`."""
    if not hasattr(tokens, "dtype"):
        given = type(tokens).__name__
        try:
            tokens = jnp.asarray(tokens)
        except (TypeError, ValueError):
            raise ValueError(
                f"token ids in a {given} that makes no array: give equally long rows of integers"
            ) from None
    if tokens.ndim != 2:
        shape = tokens.shape
        raise ValueError(f"token ids of shape {shape}: give [batch, tokens], such as tokens[None]")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"token ids of type {tokens.dtype}: give int32")
    return tokens


def check_config(config: Any, kind: type) -> None:
    """Raise a ValueError unless `config` is an instance of `kind`."""
    if not isinstance(config, kind):
        raise ValueError(
            f"config is a {type(config).__name__}: give a {kind.__name__}, such as "
            f"{kind.__name__}()"
        )


def check_rngs(rngs: Any) -> None:
    """Raise a ValueError unless `rngs` is an `nnx.Rngs` of Flax."""
    if not hasattr(rngs, "params"):
        raise ValueError(f"rngs is a {type(rngs).__name__}: give nnx.Rngs(seed), or nnx.Rngs(key)")


def check_stop(stop: Any) -> None:
    """Raise a ValueError unless `stop` is a sequence of integer token ids."""
    is_list = not isinstance(stop, str) and hasattr(stop, "__iter__")
    if not is_list or not all(map(_is_id, stop)):
        raise ValueError(f"stop={stop!r}: give a list of token ids, such as (3,)")


def _is_id(value: Any) -> bool:
    return is_whole(value) and not isinstance(value, bool) and abs(value) < 2**31


def check_floating(name: str, dtype: Any) -> None:
    """Raise a ValueError unless `dtype` is floating-point; integers would round values to 0."""
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        dtype = repr(dtype)
    if isinstance(dtype, str) or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name}={dtype}: choose a floating type, such as float32")


def is_whole(value: Any) -> bool:
    """Whether a value is a scalar integer of Python, NumPy or JAX."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return not value.shape and bool(jnp.issubdtype(value.dtype, jnp.integer))
    return hasattr(value, "__index__")


def is_number(value: Any) -> bool:
    """Whether a value is a scalar number of Python, NumPy or JAX."""
    return hasattr(value, "__float__") and not getattr(value, "shape", ())


def check_number(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is a scalar number."""
    if not is_number(value):
        raise ValueError(f"{name}={value!r}: give a number")


def check_by_token(name: str, values: Any, tokens: Any) -> None:
    """Raise a ValueError unless `values` has the shape of `tokens`."""
    if jnp.shape(values) != jnp.shape(tokens):
        raise ValueError(
            f"{name} of shape {jnp.shape(values)} for tokens of shape {jnp.shape(tokens)}: give "
            "one entry for each token"
        )


def checked_mask(loss_mask: Any, tokens: Any) -> jax.Array:
    """Return a loss mask as bool; raise a ValueError unless it has the shape of `tokens`.

    A mask of floats is rejected too: as bool, every weight other than 0 would count as 1.
    """
    check_by_token("a loss mask", loss_mask, tokens)
    dtype = jnp.result_type(loss_mask)
    if jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(f"a loss mask of type {dtype}: give bool, such as weights > 0")
    return jnp.asarray(loss_mask).astype(bool)


def check_decisions(decisions: Any, tokens: Any) -> None:
    """Raise a ValueError unless `decisions` has the shape of `tokens` and is not bool."""
    check_by_token("decisions", decisions, tokens)
    if jnp.issubdtype(jnp.result_type(decisions), jnp.bool):
        raise ValueError("decisions of type bool: give 1 for invoked, 0 for skipped, -1 for none")


def check_rows(rows: int, **values: Any) -> None:
    """Raise a ValueError unless the first axis of each value has size `rows`."""
    for name, value in values.items():
        if jnp.shape(value)[:1] != (rows,):
            raise ValueError(f"{name} of shape {jnp.shape(value)} for {rows} rows: give one a row")


def check_lengths(length: Any, rows: int, name: str = "length") -> None:
    """Raise a ValueError unless `length` is `[rows]` of integers."""
    length = length if hasattr(length, "dtype") else np.asarray(length)
    shape, dtype = length.shape, length.dtype
    if shape != (rows,):
        raise ValueError(f"{name} of shape {shape} for {rows} rows: give one number a row")
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name} of type {dtype}: give integers, such as int32")


def checked_lengths(length: Any, tokens: jax.Array) -> Any:
    """Return the number of real tokens of each row of `tokens [B, C]`, `[B]`, as an array.

    Raises:
        ValueError: `length` is not `[B]` of integers, or (checked unless traced) not from 0 to `C`.
    """
    rows, most = tokens.shape
    check_lengths(length, rows)
    length = length if hasattr(length, "dtype") else np.asarray(length, np.int32)
    if not isinstance(length, Tracer):
        for row, count in enumerate(on_host(length).tolist()):
            if not 0 <= count <= most:
                raise ValueError(
                    f"length {count} of row {row}, which has {most} tokens: choose from 0 to {most}"
                )
    return length


def check_woven_length(length: int, capacity: int) -> None:
    """Raise a ValueError if a row of `length` tokens and latents exceeds a session's capacity."""
    if length > capacity:
        raise ValueError(
            f"a row would grow to {length} tokens and latents, the session holds "
            f"{capacity}: begin with more max_responses"
        )


def check_module(module: Any) -> None:
    """Raise a ValueError unless `module` is or contains an `nnx.Module`."""
    is_module = lambda part: isinstance(part, nnx.Module)  # noqa: E731
    if not any(map(is_module, jax.tree.leaves(module, is_leaf=is_module))):
        raise ValueError(
            f"a {type(module).__name__} holds no nnx.Module, whose layers have names: give one"
        )


def check_by_name(name: str, values: Any) -> None:
    """Raise a ValueError unless `values` is a mapping (from names of linear layers)."""
    if not hasattr(values, "items"):
        raise ValueError(
            f"{name} is a {type(values).__name__}: give a mapping from names of linear layers"
        )


def wrong_matrices(low: Any, target: Any) -> tuple[int, ...] | None:
    """Return the shape of an adapter's product `a b` if it does not fit its layer, else None.

    An adapter without matrices `a` and `b` is an arbitrary callable and always fits. A product with
    more axes than the layer's kernel may hold a separate matrix for each batch element: then only
    the last two axes of the product must match the layer.

    Args:
        low: Adapter, with or without matrices `a [..., inputs, rank]` and `b [..., rank, outputs]`.
        target: Shape of the layer's stack, its number of inputs, and its number of outputs.
    """
    a, b = (getattr(getattr(low, part, None), "shape", ()) for part in ("a", "b"))
    if len(a) < 2 or len(b) < 2:
        return None
    shape, layer = (*a[:-1], b[-1]), (*target[0], *target[1:])
    fits = shape == layer or (len(shape) > len(layer) and shape[-2:] == layer[-2:])
    return None if fits else shape


def check_width(values: Any, width: int, reader: str) -> None:
    """Raise a ValueError unless `values` is an array whose last axis has size `width`.

    Args:
        values: Array of vectors `[..., width]`.
        width: Expected width.
        reader: Module whose input the vectors are, for the error message: "a weaver".
    """
    if not hasattr(values, "shape"):
        raise ValueError(f"vectors in a {type(values).__name__} for {reader}: give an array")
    if values.shape[-1] != width:
        raise ValueError(
            f"vectors of width {values.shape[-1]} for {reader} of width {width}: give those of the "
            "decoder that it was made with"
        )

"""Checks of arguments; an error is one line with the given and expected value and a remedy."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from thoughtbubbles.placement import broadcast_beside
from thoughtbubbles.streams import Streams


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise a ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose {' or '.join(choices)}")


def check_config(config: Any, kind: type) -> None:
    """Raise a ValueError unless `config` is an instance of `kind`."""
    if not isinstance(config, kind):
        raise ValueError(
            f"config is a {type(config).__name__}: give a {kind.__name__}, such as "
            f"{kind.__name__}.preset('tiny')"
        )


def check_fields(config: Any) -> None:
    """Raise a ValueError if a field annotated int, float or tuple holds a value of another type."""
    for name, kinds in _kinds(type(config)).items():
        value = getattr(config, name)
        if value is None and type(None) in kinds:
            continue
        if int in kinds and not is_whole(value):
            raise ValueError(f"{name}={value!r}: give a whole number")
        if float in kinds and not is_number(value):
            raise ValueError(f"{name}={value!r}: give a number")
        if tuple in kinds and not (isinstance(value, tuple) and all(map(is_whole, value))):
            raise ValueError(f"{name}={value!r}: give a tuple of whole numbers, such as (1,)")


@functools.cache
def _kinds(config: type) -> dict[str, tuple[Any, ...]]:
    """Return a dict from a dataclass's fields to the types in their annotations.

    A field has one type, and possibly None's type; `tuple[int, ...]` is given as `tuple`. Fields of
    several types are left out. The dict is empty if an annotation can't be evaluated, because the
    annotation uses names that only type checkers know.
    """
    try:
        hints = typing.get_type_hints(config)
    except (AttributeError, NameError, SyntaxError, TypeError):
        return {}
    found = {}
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = typing.get_args(hint) if union else (hint,)
        if sum(kind is not type(None) for kind in kinds) == 1:
            whole = lambda kind: tuple if typing.get_args(kind) == (int, ...) else kind  # noqa: E731
            found[field.name] = tuple(map(whole, kinds))
    return found


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


def check_ids(tokens: Any) -> None:
    """Raise a ValueError unless `tokens` are integers `[batch, tokens]`."""
    shape = _array(tokens).shape
    if len(shape) != 2:
        raise ValueError(f"token ids of shape {shape}: give [batch, tokens], such as tokens[None]")
    check_integers(tokens)


def check_integers(tokens: Any) -> None:
    """Raise a ValueError unless `tokens` are integers, of any shape."""
    dtype = _array(tokens).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"token ids of type {dtype}: give int32, or vectors to hidden_states")


def _array(values: Any) -> Any:
    """Return token ids as an array; raise a ValueError for ragged lists."""
    if hasattr(values, "dtype"):
        return values
    try:
        return jnp.asarray(values)
    except (TypeError, ValueError):
        given = type(values).__name__
        raise ValueError(
            f"token ids in a {given} that makes no array: give equally long rows of integers"
        ) from None


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


def check_sizes(**sizes: Any) -> None:
    """Raise a ValueError unless each size is an integer of 1 or more."""
    for name, value in sizes.items():
        if not is_whole(value):
            given = getattr(value, "shape", None) or repr(value)
            example = ", such as tokens.shape[0]" if name == "batch" else ""
            raise ValueError(f"{name}={given}: give a whole number{example}")
        if value < 1:
            raise ValueError(f"{name}={value}: choose 1 or more")


def check_lengths(length: Any, rows: int) -> None:
    """Raise a ValueError unless `length` is an integer or an integer array `[rows]`."""
    length = length if hasattr(length, "dtype") else np.asarray(length)
    shape, dtype = length.shape, length.dtype
    if shape not in ((), (rows,)):
        raise ValueError(f"length of shape {shape} for {rows} rows: give one number a row")
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"length of type {dtype}: give integers, such as int32")


def checked_lengths(length: Any, x: Any) -> jax.Array:
    """Check and return lengths of rows of vectors `x [B, T, D]` as `[B]` int32; None means `T`."""
    if length is not None:
        check_lengths(length, x.shape[0])
    return broadcast_beside(x.shape[1] if length is None else length, x, 1)


def check_vectors(x: Any, embed_dim: int, reader: str) -> None:
    """Raise a ValueError unless `x` is a float array `[batch, tokens, embed_dim]`."""
    if jnp.ndim(x) != 3:
        raise ValueError(f"vectors of shape {jnp.shape(x)}: give [batch, tokens, width]")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"vectors of type {x.dtype}: embed token ids first (embed_tokens)")
    if x.shape[-1] != embed_dim:
        raise ValueError(
            f"vectors of width {x.shape[-1]} for {reader} of embed_dim={embed_dim}: give both the "
            "same width"
        )


def check_targets(targets: Any, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless `targets` are integers with the predictions' `shape`."""
    if jnp.shape(targets) != shape:
        raise ValueError(
            f"targets of shape {jnp.shape(targets)} for predictions of shape {shape}: give one id "
            "for each, such as tokens[:, 1:] for what run gave of tokens[:, :-1]"
        )
    check_integers(targets)


def check_adapter(targets: Mapping[str, Any], adapter: Any) -> None:
    """Raise a ValueError unless each adapter names a linear layer and fits the layer's shape."""
    check_by_name("adapter", adapter)
    for name, low in adapter.items():
        if name not in targets:
            raise ValueError(f"no linear layer {name!r}: choose from {', '.join(targets)}")
        if shape := wrong_matrices(low, targets[name]):
            stack, *matrix = targets[name]
            raise ValueError(
                f"{name}: an adapter of shape {shape} for a layer of {(*stack, *matrix)}: make one "
                "for this model"
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


def check_by_name(name: str, values: Any) -> None:
    """Raise a ValueError unless `values` is a mapping (from names of linear layers)."""
    if not hasattr(values, "items"):
        raise ValueError(
            f"{name} is a {type(values).__name__}: give a mapping from names of linear layers"
        )


def check_deltas(targets: Mapping[str, Any], deltas: Mapping[str, Any]) -> None:
    """Raise a ValueError unless each delta names a linear layer and has its shape."""
    check_by_name("deltas", deltas)
    for name, delta in deltas.items():
        if name not in targets:
            raise ValueError(f"no linear layer {name!r}: choose from {', '.join(targets)}")
        stack, *matrix = targets[name]
        if delta.shape != (*stack, *matrix):
            raise ValueError(
                f"{name}: a delta of shape {delta.shape} for a layer of {(*stack, *matrix)}: merge "
                "the adapter of this model"
            )


def check_floating(name: str, dtype: Any) -> None:
    """Raise a ValueError unless `dtype` is floating-point; integers would round values to 0."""
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        dtype = repr(dtype)
    if isinstance(dtype, str) or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name}={dtype}: choose a floating type, such as float32")


def check_streams(streams: Any, embed_dim: int, layer: str) -> None:
    """Raise a ValueError unless `streams` are `Streams` of width `embed_dim`."""
    if not isinstance(streams, Streams):
        shape = getattr(streams, "shape", type(streams).__name__)
        raise ValueError(f"{layer} takes Streams, not {shape}: Streams.start(x)")
    if streams.x.shape[-1] != embed_dim:
        raise ValueError(
            f"residuals of width {streams.x.shape[-1]} in {layer} of embed_dim={embed_dim}: "
            "give both the same width"
        )

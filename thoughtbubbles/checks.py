"""Checks of arguments: a wrong one is one line that names both values and the way out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from thoughtbubbles.streams import Streams


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise a ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose {' or '.join(choices)}")


def check_config(config: Any, kind: type) -> None:
    """Raise a ValueError unless a config is of its class."""
    if not isinstance(config, kind):
        raise ValueError(
            f"config is a {type(config).__name__}: give a {kind.__name__}, such as "
            f"{kind.__name__}.preset('tiny')"
        )


def check_ids(tokens: Any) -> None:
    """Raise a ValueError unless these are token ids `[batch, tokens]`."""
    shape = _array(tokens).shape
    if len(shape) != 2:
        raise ValueError(f"token ids of shape {shape}: give [batch, tokens], such as tokens[None]")
    check_integers(tokens)


def check_integers(tokens: Any) -> None:
    """Raise a ValueError unless token ids are integers."""
    dtype = _array(tokens).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"token ids of type {dtype}: give int32, or vectors to hidden_states")


def _array(values: Any) -> Any:
    """Values as an array; nested lists of numbers become one."""
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
    """Raise a ValueError unless these are the keys of Flax, `nnx.Rngs`."""
    if not hasattr(rngs, "params"):
        raise ValueError(f"rngs is a {type(rngs).__name__}: give nnx.Rngs(seed), or nnx.Rngs(key)")


def check_stop(stop: Any) -> None:
    """Raise a ValueError unless these are token ids to stop at."""
    is_list = not isinstance(stop, str) and hasattr(stop, "__iter__")
    is_id = lambda end: jnp.issubdtype(getattr(end, "dtype", type(end)), jnp.integer)  # noqa: E731
    if not is_list or not all(map(is_id, stop)):
        raise ValueError(f"stop={stop!r}: give a list of token ids, such as (3,)")


def check_sizes(**sizes: Any) -> None:
    """Raise a ValueError unless these are whole numbers of 1 or more."""
    for name, value in sizes.items():
        if hasattr(value, "shape") and value.shape or not hasattr(value, "__index__"):
            given = getattr(value, "shape", None) or repr(value)
            raise ValueError(f"{name}={given}: give a whole number, such as tokens.shape[0]")
        if value < 1:
            raise ValueError(f"{name}={value}: choose 1 or more")


def check_deltas(targets: Mapping[str, Any], deltas: Mapping[str, Any]) -> None:
    """Raise a ValueError unless each delta is of a linear layer, and of its shape."""
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
    """Raise a ValueError unless a type is of floats: integers would round values to 0."""
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(f"{name}={jnp.dtype(dtype)}: choose a floating type, such as float32")


def check_streams(streams: Any, embed_dim: int, layer: str) -> None:
    """Raise a ValueError unless these are streams of a layer's width."""
    if not isinstance(streams, Streams):
        shape = getattr(streams, "shape", type(streams).__name__)
        raise ValueError(f"{layer} takes Streams, not {shape}: Streams.start(x)")
    if streams.x.shape[-1] != embed_dim:
        raise ValueError(
            f"residuals of width {streams.x.shape[-1]} in {layer} of embed_dim={embed_dim}: "
            "give both the same width"
        )

"""Checks of arguments: a wrong one is one line that names both values and the way out."""

from __future__ import annotations

from collections.abc import Sequence
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

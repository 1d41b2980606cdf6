"""Checks of arguments: a wrong one is one line that names both values and the way out."""

from typing import Any

import jax
import jax.numpy as jnp


def checked_ids(tokens: Any) -> jax.Array:
    """Token ids as an array; a ValueError unless they are `[batch, tokens]` of integers."""
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
    """Raise a ValueError unless a config is of its class."""
    if not isinstance(config, kind):
        raise ValueError(
            f"config is a {type(config).__name__}: give a {kind.__name__}, such as "
            f"{kind.__name__}()"
        )


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


def check_floating(name: str, dtype: Any) -> None:
    """Raise a ValueError unless a type is of floats: integers would round values to 0."""
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(f"{name}={jnp.dtype(dtype)}: choose a floating type, such as float32")


def check_by_token(name: str, values: Any, tokens: Any) -> None:
    """Raise a ValueError unless there is one value for each token."""
    if jnp.shape(values) != jnp.shape(tokens):
        raise ValueError(
            f"{name} of shape {jnp.shape(values)} for tokens of shape {jnp.shape(tokens)}: give "
            "one entry for each token"
        )


def check_width(values: Any, width: int, reader: str) -> None:
    """Raise a ValueError unless the last axis has the width that its reader was made for."""
    if values.shape[-1] != width:
        raise ValueError(
            f"vectors of width {values.shape[-1]} for {reader} of width {width}: give those of the "
            "decoder that it was made with"
        )

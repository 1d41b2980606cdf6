"""Checks of arguments: a wrong one is one line that names both values and the way out."""

from typing import Any

import jax.numpy as jnp


def check_ids(tokens: Any) -> None:
    """Raise a ValueError unless these are token ids `[batch, tokens]`."""
    if jnp.ndim(tokens) != 2:
        shape = jnp.shape(tokens)
        raise ValueError(f"token ids of shape {shape}: give [batch, tokens], such as tokens[None]")
    if not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
        raise ValueError(f"token ids of type {jnp.result_type(tokens)}: give int32")


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

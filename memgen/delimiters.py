"""Boundaries at which memory may be asked for, as a table over token ids."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

DELIMITERS = (",", ".", "\n")
BOUNDARY, UNLESS_AFTER_DIGIT, DIGIT = 1, 2, 4
Mode = Literal["suffix", "exact_id", "sentence"]


def boundary_table(
    texts: Sequence[str],
    mode: Mode = "suffix",
    delimiters: Sequence[str] = DELIMITERS,
    encode: Callable[[str], Sequence[int]] | None = None,
) -> np.ndarray:
    """What `is_boundary` needs to know of each token, `[V]` uint8.

    Args:
        texts: the surface text of each id.
        mode: `suffix`: the text ends with a delimiter, in numbers and abbreviations too (the
            authors' code). `exact_id`: the token is the delimiter's own, merged ones are missed (a
            later revision of theirs). `sentence`: it ends with a line break or with one of . ? !
            that does not follow a digit, which may be a decimal point.
        delimiters: for the first two modes.
        encode: text to ids, for `exact_id`.

    Raises:
        ValueError: an unknown mode, no delimiter, or `exact_id` without `encode`.
    """
    table = np.zeros(len(texts), np.uint8)
    if mode == "sentence":
        for index, text in enumerate(texts):
            table[index] = _sentence(text)
        return table
    if not delimiters or not all(delimiters):
        raise ValueError(f"delimiters={tuple(delimiters)}: give at least one, none of them empty")
    if mode == "suffix":
        table[[text.endswith(tuple(delimiters)) for text in texts]] = BOUNDARY
    elif mode == "exact_id":
        if encode is None:
            raise ValueError("mode='exact_id' looks delimiters up: pass encode")
        table[[id_ for text in delimiters for id_ in encode(text)]] = BOUNDARY
    else:
        raise ValueError(f"mode={mode!r}: choose suffix, exact_id or sentence")
    return table


def _sentence(text: str) -> int:
    flags = DIGIT if text[-1:].isdigit() else 0
    ends = text.rstrip(" ")
    if ends.endswith(("\n", "?", "!")):
        return BOUNDARY
    if ends.endswith("."):
        if ends == ".":
            return BOUNDARY | UNLESS_AFTER_DIGIT
        return flags if ends[-2].isdigit() else BOUNDARY
    return flags


def is_boundary(table: jax.Array, last: jax.Array, previous: jax.Array) -> jax.Array:
    """Whether a text that ends with ids `previous`, `last` (int32, any shape) is at a boundary."""
    here, before = jnp.take(table, last), jnp.take(table, previous)
    doubtful = (here & UNLESS_AFTER_DIGIT > 0) & (before & DIGIT > 0)
    return (here & BOUNDARY > 0) & ~doubtful

"""Boundaries in a text, at which the trigger decides, found by a table of flags over token ids."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np

from memgen.placement import AnyArray, table_rows

DELIMITERS = (",", ".", "\n")
BOUNDARY, UNLESS_AFTER_DIGIT, DIGIT = 1, 2, 4
Mode = Literal["suffix", "exact_id", "sentence"]


def boundary_table(
    texts: Sequence[str],
    mode: Mode = "suffix",
    delimiters: Sequence[str] = DELIMITERS,
    encode: Callable[[str], Sequence[int]] | None = None,
) -> np.ndarray:
    """Compute the flags of each token id from which `is_boundary` finds the boundaries of a text.

    Args:
        texts: Surface text of each token id, in the order of ids.
        mode: Rule for the tokens after which there is a boundary. "suffix": the token's text ends
            with a delimiter, also within numbers and abbreviations (the authors' code). "exact_id":
            the token is one of the ids that `encode` gives for a delimiter, so tokens that merge a
            delimiter with other text are missed (a later revision of the authors' code).
            "sentence": the token's text ends with a line break or with one of . ? !, except a
            period after a digit, which may be a decimal point.
        delimiters: Delimiters of the modes "suffix" and "exact_id".
        encode: Function from text to token ids, required by the mode "exact_id".

    Returns:
        Flags of each token id, `[V]` uint8.

    Raises:
        ValueError: `texts` is not a list of strings, the mode is unknown, `delimiters` is empty or
            holds an empty text, or the mode is "exact_id" and `encode` is missing.
    """
    if isinstance(texts, str) or not hasattr(texts, "__len__"):
        raise ValueError(f"texts are a {type(texts).__name__}: give a list, the text of each id")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"the text of id {index} is {text!r}: give the surface text, a str")
    table = np.zeros(len(texts), np.uint8)
    if mode == "sentence":
        for index, text in enumerate(texts):
            table[index] = _sentence(text)
        return table
    if isinstance(delimiters, (str, bytes)) or not hasattr(delimiters, "__iter__"):
        raise ValueError(f"delimiters={delimiters!r}: give a tuple, such as (',', '.')")
    delimiters = tuple(delimiters)  # an iterator is read once
    if not delimiters or not all(delimiters):
        raise ValueError(f"delimiters={delimiters}: give at least one, none of them empty")
    if mode == "suffix":
        table[[text.endswith(delimiters) for text in texts]] = BOUNDARY
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


def is_boundary(table: AnyArray, last: AnyArray, previous: AnyArray) -> jax.Array:
    """Return whether each text ends at a boundary, as bool of the shape of `last`.

    Args:
        table: `[V]` uint8 flags of each token id, as `boundary_table` returns them.
        last: Id of the last token of each text, int32 of any shape.
        previous: Id of the second-to-last token of each text, int32 of the shape of `last`.
    """
    here, before = table_rows(table, last), table_rows(table, previous)
    doubtful = (here & UNLESS_AFTER_DIGIT > 0) & (before & DIGIT > 0)
    return (here & BOUNDARY > 0) & ~doubtful

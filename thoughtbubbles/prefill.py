"""Prefill in blocks: long prompts with the memory of one block beside the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from thoughtbubbles.architecture import Architecture

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float

Progress = Callable[[int, int], None]
"""Function that is called after each block with the number of tokens of the longest row that were
read so far, and with that of all of them."""

BLOCK = 512
"""Number of tokens of a block, over all rows."""
SMALLEST_BLOCK = 32
"""Number of tokens of a block in each row, at least."""
LARGEST_WHOLE = 2**29
"""Bytes of a forward pass over whole rows, about, above which they are read in blocks."""
LONGEST_WHOLE = 4096
"""Number of tokens above which rows are read in blocks by a model that knows no such bytes."""


def block_size(rows: int) -> int:
    """Number of tokens of a block in each of so many rows, a power of two."""
    return max(BLOCK >> (rows - 1).bit_length(), SMALLEST_BLOCK)


def in_blocks(model: Architecture, rows: int, tokens: int) -> bool:
    """Whether rows are read in blocks: a pass over them is `large`, and the model `cacheable`.

    Args:
        model: Any architecture.
        rows: Number of rows.
        tokens: Number of tokens of each row, padding included.
    """
    return model.cacheable and large(model, rows, tokens)


def large(model: Architecture, rows: int, tokens: int) -> bool:
    """Whether a pass over whole rows takes more memory than blocks are taken for."""
    if tokens <= block_size(rows):
        return False
    whole = getattr(model.config, "prefill_bytes", None)
    if whole is None:
        return tokens > LONGEST_WHOLE
    return rows * whole(tokens) > LARGEST_WHOLE


def block_bytes(model: Architecture, rows: int) -> int:
    """Bytes that reading a block of each row takes beside parameters and cache, about.

    Args:
        model: Any architecture. What its config has no `extend_bytes` for is not counted.
        rows: Number of rows.
    """
    extend = getattr(model.config, "extend_bytes", lambda rows, num_tokens: 0)
    return extend(rows, block_size(rows))


def long_cache(tokens: int) -> int:
    """Number of tokens that a cache of long rows is made for: at most an eighth more than needed.

    There are eight such numbers between a power of two and the next, and so are programs.
    """
    step = max(1 << max((tokens - 1).bit_length() - 4, 0), BLOCK)
    return -(-tokens // step) * step


def read_blocks(
    step: Callable[[Any, jax.Array, jax.Array, slice], Any],
    carry: Any,
    tokens: np.ndarray,
    length: np.ndarray,
    progress: Progress | None = None,
) -> Any:
    """Call a compiled step for block after block of rows.

    Args:
        step: Function of the carry, the tokens of the block `[B, C]`, the number of real ones in
            each row `[B]` and the block's place in the rows, to the next carry.
        carry: Value that the first step gets, such as an empty cache.
        tokens: Token ids `[B, T]` int32, padded on the right.
        length: Number of real tokens of each row, `[B]` int32.
        progress: Function that is told how far it is; each block is then waited for.

    Returns:
        The carry after the last block.
    """
    longest, size = int(length.max()), block_size(len(tokens))
    for first in range(0, longest, size):
        block = tokens[:, first : first + size]
        block = np.pad(block, ((0, 0), (0, size - block.shape[1])))
        count = np.clip(length - first, 0, size).astype(np.int32)
        # Arrays of JAX, which a program takes to the mesh that it runs on.
        place = slice(first, first + size)
        carry = step(carry, jnp.asarray(block), jnp.asarray(count), place)
        if progress is not None:
            jax.block_until_ready(carry)
            progress(min(first + size, longest), longest)
    return carry


def prefill(
    model: Architecture,
    tokens: np.ndarray,
    length: np.ndarray,
    max_tokens: int,
    progress: Progress | None = None,
) -> tuple[Float[Array, "B V"], Any]:
    """Logits after the last token of each row, and a cache that holds the rows.

    Args:
        model: Model that is `cacheable`, best one made `for_decoding`.
        tokens: Token ids `[B, T]` int32, padded on the right.
        length: Number of real tokens of each row, `[B]` int32, 1 or more.
        max_tokens: Number of tokens that fit into a row of the cache.
        progress: Function that is told how far it is.
    """

    def step(carry: Any, block: jax.Array, count: jax.Array, _: slice) -> Any:
        return _read_block(model, *carry, block, count)

    carry = empty_cache(model, len(tokens), max_tokens), jnp.zeros((len(tokens), model.vocab_size))
    cache, logits = read_blocks(step, carry, tokens, length, progress)
    return logits, cache


@functools.partial(jax.jit, static_argnames=("rows", "max_tokens"))
def empty_cache(model: Architecture, rows: int, max_tokens: int) -> Any:
    """`model.init_cache`, compiled."""
    return model.init_cache(rows, max_tokens)


@functools.partial(jax.jit, donate_argnames="cache")
def _read_block(model, cache, logits, tokens, count):
    output, cache = model.advance(cache, tokens, count)
    here = model.logits_at(output, jnp.maximum(count - 1, 0))
    return cache, jnp.where((count > 0)[:, None], here, logits)

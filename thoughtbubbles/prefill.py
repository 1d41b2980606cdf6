"""Chunked prefill: a long prompt is prefilled in blocks, to save memory for activations."""

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
"""Function that is called after each block with the number of tokens of the longest row that are
prefilled so far, and the number of all tokens of that row."""

BLOCK = 512
"""Number of tokens of a block, summed over all rows."""
SMALLEST_BLOCK = 32
"""Minimum number of tokens of a block in each row."""
LARGEST_WHOLE = 2**29
"""Approximate bytes of a forward pass over whole rows above which rows are prefilled in blocks."""
LONGEST_WHOLE = 4096
"""Tokens of a row above which rows are prefilled in blocks, if the config has no `prefill_bytes`.
"""


def block_size(rows: int) -> int:
    """Return the block size in tokens per row, a power of two, for a batch of `rows` rows."""
    return max(BLOCK >> (rows - 1).bit_length(), SMALLEST_BLOCK)


def in_blocks(model: Architecture, rows: int, tokens: int) -> bool:
    """Whether to prefill in blocks: whole rows are `large`, and the model is `cacheable`.

    Args:
        model: Model of any architecture.
        rows: Number of rows.
        tokens: Number of tokens in each row, padding included.
    """
    return model.cacheable and large(model, rows, tokens)


def large(model: Architecture, rows: int, tokens: int) -> bool:
    """Whether a forward pass over whole rows takes too much memory.

    The limit is `LARGEST_WHOLE` bytes, as estimated by the config's `prefill_bytes`, or
    `LONGEST_WHOLE` tokens in a row for a config without that method. Rows that fit into one block
    are never large.
    """
    if tokens <= block_size(rows):
        return False
    whole = getattr(model.config, "prefill_bytes", None)
    if whole is None:
        return tokens > LONGEST_WHOLE
    return rows * whole(tokens) > LARGEST_WHOLE


def block_bytes(model: Architecture, rows: int) -> int:
    """Estimate the bytes that prefill of one block takes in addition to parameters and cache.

    Args:
        model: Model of any architecture; the estimate is 0 if its config has no `extend_bytes`.
        rows: Number of rows.
    """
    extend = getattr(model.config, "extend_bytes", lambda rows, num_tokens: 0)
    return extend(rows, block_size(rows))


def long_cache(tokens: int) -> int:
    """Round up the capacity in tokens of a cache of long rows, to limit the compiled programs.

    The result is a multiple of `BLOCK`, and of an eighth of the largest power of two below
    `tokens`, so that there are at most eight different capacities between two powers of two.
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
    """Call a compiled step on consecutive blocks of rows of tokens.

    Args:
        step: Function that returns the next carry. Its arguments are the carry, the token ids
            `[B, C]` of a block of `C` tokens, the number of real tokens of the block in each row
            `[B]`, and the slice of the token axis that the block covers.
        carry: Carry of the first step, such as an empty cache.
        tokens: Token ids `[B, T]` int32, padded on the right.
        length: Number of real tokens in each row, `[B]` int32.
        progress: Function to call when the device has finished a block; None dispatches the blocks
            without waiting.

    Returns:
        The carry after the last block.
    """
    longest, size = int(length.max()), block_size(len(tokens))
    for first in range(0, longest, size):
        block = tokens[:, first : first + size]
        block = np.pad(block, ((0, 0), (0, size - block.shape[1])))
        count = np.clip(length - first, 0, size).astype(np.int32)
        # JAX arrays, which a compiled program moves to its mesh.
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
    """Prefill rows in blocks into a new cache.

    Args:
        model: Model that is `cacheable`, preferably the result of its `for_decoding`.
        tokens: Token ids `[B, T]` int32, padded on the right.
        length: Number of real tokens in each row, `[B]` int32, 1 or more.
        max_tokens: Maximum number of tokens in a row of the cache.
        progress: Function to call after each block, or None.

    Returns:
        Logits at the last token of each row, and the cache after these tokens.
    """

    def step(carry: Any, block: jax.Array, count: jax.Array, _: slice) -> Any:
        return _read_block(model, *carry, block, count)

    carry = empty_cache(model, len(tokens), max_tokens), jnp.zeros((len(tokens), model.vocab_size))
    cache, logits = read_blocks(step, carry, tokens, length, progress)
    return logits, cache


@functools.partial(jax.jit, static_argnames=("rows", "max_tokens"))
def empty_cache(model: Architecture, rows: int, max_tokens: int) -> Any:
    """Return an empty cache from `model.init_cache`, made in a compiled program."""
    return model.init_cache(rows, max_tokens)


@functools.partial(jax.jit, donate_argnames="cache")
def _read_block(model, cache, logits, tokens, count):
    output, cache = model.advance(cache, tokens, count)
    here = model.logits_at(output, jnp.maximum(count - 1, 0))
    return cache, jnp.where((count > 0)[:, None], here, logits)

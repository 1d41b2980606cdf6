"""Check whether texts fit into memory before anything is compiled or allocated."""

import contextlib
from collections.abc import Iterator

import jax

from thoughtbubbles import Architecture
from thoughtbubbles.prefill import block_bytes, in_blocks, large, long_cache
from train.devices.memory import free_bytes, size_text


def needed_bytes(
    model: Architecture, rows: int, tokens: int, cached: int = 0, blocks: bool = False
) -> int:
    """Estimate the bytes of a forward pass over rows and of its cache, without the parameters.

    Args:
        model: Any architecture. Activations are counted only if its config has the methods that
            estimate their size (`pass_bytes`, `prefill_bytes`, `extend_bytes`).
        rows: Number of rows.
        tokens: Number of tokens in each row.
        cached: Number of tokens that a cache in each row can hold; 0 for no cache.
        blocks: Whether the rows are prefilled into the cache block by block.
    """
    prefill = getattr(model.config, "prefill_bytes", lambda num_tokens: 0)
    whole = getattr(model.config, "pass_bytes", lambda rows, tokens: rows * prefill(tokens))
    total = block_bytes(model, rows) if blocks else whole(rows, tokens)
    if cached:
        # Extrapolated from two small sizes, so that a large cache need not be traced.
        small, large = (_cache_bytes(model, rows, size) for size in (64, 128))
        total += small + (large - small) * max(cached - 64, 0) // 64
    return total


def _cache_bytes(model: Architecture, rows: int, tokens: int) -> int:
    cache = jax.eval_shape(lambda: model.init_cache(rows, tokens))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def check_text_memory(
    model: Architecture,
    rows: int,
    tokens: int,
    new: int = 0,
    cached: bool = True,
    blocks: bool | None = None,
) -> None:
    """Raise a ValueError, with the length that would fit, if texts don't fit into memory.

    Args:
        model: Any architecture.
        rows: Number of texts at a time.
        tokens: Number of tokens of the longest text.
        new: Number of tokens that are added to each text.
        cached: Whether keys and values are cached; without a cache every prefix is recomputed.
        blocks: Whether long texts are prefilled in blocks (`thoughtbubbles.prefill`); None means
            the value of `cached`.
    """
    if blocks is None:
        blocks = cached

    def needed(length: int) -> int:
        # As `generate` compiles it: for a power of two.
        width = _power(length) if cached else length + new
        if blocks and in_blocks(model, rows, width):
            return needed_bytes(model, rows, length, long_cache(length + new), blocks=True)
        if not cached:
            return needed_bytes(model, rows, width)
        return needed_bytes(model, rows, width, _power(length + new))

    free = free_bytes()
    if free is None or needed(tokens) <= free:
        return
    fits, above = 0, tokens
    while above - fits > 1:
        middle = (fits + above) // 2
        fits, above = (middle, above) if needed(middle) <= free else (fits, middle)
    also = f" and {new:,} new ones" if new else ""
    way_out = "so shorten them or take fewer at a time" if fits else "so add fewer new ones"
    whole = ""
    if not model.cacheable and large(model, rows, tokens):
        whole = f" in one pass, as {model.fork_policy} chooses among all tokens of a text"
    raise ValueError(
        f"{_texts(rows, tokens)}{also} need about {size_text(needed(tokens))}{whole}, "
        f"{size_text(free)} are free: {fits:,} tokens fit, {way_out}"
    )


@contextlib.contextmanager
def memory_errors(model: Architecture, rows: int, tokens: int) -> Iterator[None]:
    """Context manager that turns jax's out-of-memory error into a ValueError of one line."""
    blocks = in_blocks(model, rows, tokens)
    needed = needed_bytes(model, rows, tokens, tokens if blocks else 0, blocks)
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"{_texts(rows, tokens)} ran out of memory (their forward pass alone takes about "
            f"{size_text(needed)}): shorten them or take fewer at a time"
        ) from error


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _texts(rows: int, tokens: int) -> str:
    return f"{rows} text{'s' * (rows > 1)} of up to {tokens:,} tokens"

"""Rounding of array sizes to a few buckets, so that compiled programs are reused."""

SHORTEST = 16


def bucket(size: int, multiple: int = 1) -> int:
    """Return the smallest product of `multiple` and a power of two that is at least `size`."""
    parts = -(-max(size, 1) // multiple)
    return multiple * (1 << (parts - 1).bit_length())

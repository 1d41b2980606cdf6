"""Sizes that programs are compiled for: few, so that they are found again."""

SHORTEST = 16


def bucket(size: int, multiple: int = 1) -> int:
    """`multiple` times a power of two, `size` or more."""
    parts = -(-max(size, 1) // multiple)
    return multiple * (1 << (parts - 1).bit_length())

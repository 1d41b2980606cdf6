"""On which side a document stands: decided by its content alone."""

from __future__ import annotations

import hashlib
from typing import Literal

from train.data.config import DataError

_KEY = b"thoughtbubbles: held out"  # another use of the same hash must not see the same documents


def digest(text: str) -> bytes:
    """16 bytes that name a document. Copies have the same digest and so never part."""
    return hashlib.blake2b(text.encode(), digest_size=16, key=_KEY).digest()


def held_out(document: bytes, share: float) -> bool:
    """Whether the document of this digest is for validation: true for `share` of all digests,
    and never changed by other documents that come or go."""
    return int.from_bytes(document[:8]) < share * 2**64


def split_of(document: str, share: float) -> Literal["train", "validation"]:
    """The split of a document, where `share` of all documents is held out."""
    return "validation" if held_out(digest(document), share) else "train"


def divide(documents: set[bytes], share: float, corpus: str) -> tuple[set[bytes], set[bytes]]:
    """Train and validation digests, neither empty: a side that `held_out` leaves empty, as it may
    in a small corpus, gets the document that is nearest to it.

    Raises:
        DataError: fewer than two documents.
    """
    if len(documents) < 2:
        raise DataError(
            f"corpus {corpus} has {len(documents)} distinct document, and one must be held out: "
            "add a second file, or point at a longer one"
        )
    ordered = sorted(documents)
    border = sum(held_out(document, share) for document in ordered)
    border = min(max(border, 1), len(ordered) - 1)
    return set(ordered[border:]), set(ordered[:border])

"""Assign each document to the training or the held-out split by its content alone."""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Literal

from train.data.config import DataError

_KEY = b"thoughtbubbles: held out"  # keeps the split independent of other uses of the hash


def canonical(text: str) -> str:
    """Normalise a text, so that copies of one document become equal.

    Unicode becomes NFC, line ends become line feeds, and white space at the ends of lines and of
    the text is removed.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "\n".join(map(str.rstrip, text.split("\n"))).rstrip("\n")


def digest(text: str) -> bytes:
    """Hash of a text, 16 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=16, key=_KEY).digest()


def document_digest(text: str) -> bytes:
    """Hash of a document, 16 bytes, equal for documents whose `canonical` texts are equal."""
    return digest(canonical(text) + "\n")


def held_out(document: bytes, share: float) -> bool:
    """Whether a document is held out, which depends on the hash of this document alone.

    Args:
        document: Hash of the document (`document_digest`).
        share: Fraction of all documents that is held out.
    """
    return int.from_bytes(document[:8]) < share * 2**64


def split_of(document: str, share: float) -> Literal["train", "validation"]:
    """Choose the split of a document; `share` is the fraction of documents that is held out."""
    return "validation" if held_out(document_digest(document), share) else "train"


def divide(documents: set[bytes], share: float, corpus: str) -> tuple[set[bytes], set[bytes]]:
    """Divide documents into a training and a held-out split, neither of which is empty.

    If `held_out` leaves a split empty, as it may in a small corpus, that split gets the document
    whose hash is nearest to the border between the splits.

    Args:
        documents: Hashes of the documents.
        share: Fraction of all documents that is held out.
        corpus: Name of the corpus, for the error message.

    Returns:
        Hashes of the training documents, and hashes of the held-out documents.

    Raises:
        DataError: There are fewer than two documents.
    """
    if len(documents) < 2:
        raise too_few(corpus, len(documents))
    ordered = sorted(documents)
    border = sum(held_out(document, share) for document in ordered)
    border = min(max(border, 1), len(ordered) - 1)
    return set(ordered[border:]), set(ordered[:border])


def too_few(corpus: str, count: int) -> DataError:
    """Make the error for a corpus with too few documents to hold one out."""
    return DataError(
        f"corpus {corpus} has {count} distinct document{'s' * (count != 1)}, and one must be held "
        "out: add a second file, or point at a longer one"
    )

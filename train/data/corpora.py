"""A corpus: documents in two splits, train and validation, and a fingerprint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

from train.data.local import LocalCorpus
from train.data.tfds_names import TfdsCorpus

Split = Literal["train", "validation"]


class Corpus(Protocol):
    """Text to train on."""

    @property
    def name(self) -> str:
        """What the user called it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when a document, or the side it is on, may have changed."""
        ...

    def documents(self, split: Split) -> Iterator[str]:
        """The documents of a split, in an order that only depends on their content; none is
        empty. Prepares the corpus on disk if that hasn't happened yet."""
        ...

    def count(self, split: Split) -> int:
        """Documents that were stored for the split, for a progress bar."""
        ...


def open_corpus(spec: str, validation: float, cache: Path) -> Corpus:
    """The corpus that `DataConfig.corpus` names.

    Args:
        spec: "stdlib", a path, or "tfds:NAME[/CONFIG]".
        validation: share of documents to hold out, if the corpus has no held-out split.
        cache: folder that prepared corpora are kept in.

    Raises:
        DataError: there is no such corpus, or nothing in it.
    """
    if spec.startswith("tfds:"):
        return TfdsCorpus(spec, validation, cache)
    return LocalCorpus(spec, validation, cache)

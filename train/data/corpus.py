"""A corpus: documents in two splits, train and validation, with a fingerprint."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, Protocol

from train.data import splits

Split = Literal["train", "validation"]


class Corpus(Protocol):
    """An opened corpus: documents in a training and a held-out split."""

    @property
    def name(self) -> str:
        """Name of the corpus in messages."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash that changes whenever a document, or the split of a document, may have changed."""
        ...

    @property
    def note(self) -> str:
        """Message for the user: how many files were read and which were skipped; may be empty."""
        ...

    def documents(self, split: Split) -> Iterator[str]:
        """Yield the documents of a split in the same order each time, without blank documents.

        The first call prepares the corpus on disk, unless it is prepared already.
        """
        ...

    def count(self, split: Split) -> int:
        """Count the stored documents that are read to yield a split, for a progress bar."""
        ...


class SplitCorpus:
    """Corpus of the documents that a function returns, split by their content (`splits.held_out`).

    Documents with equal `splits.canonical` texts are in the same split. The fingerprint is a hash
    of all documents, so the function is called one more time before each run.

    Args:
        name: Name of the corpus in messages.
        documents: Function that returns all documents, in the same order each time.
        validation: Fraction of the documents to hold out, between 0 and 1.
    """

    note = ""

    def __init__(self, name: str, documents: Callable[[], Iterable[str]], validation: float):
        self.name = name
        self._documents, self._validation = documents, validation

    @property
    def fingerprint(self) -> str:
        return self._scan[0]

    def documents(self, split: Split) -> Iterator[str]:
        return (document for document in self._texts() if self._split(document) == split)

    def count(self, split: Split) -> int:
        return self._scan[1][split]

    def _texts(self) -> Iterator[str]:
        return (document for document in self._documents() if document.strip())

    def _split(self, document: str) -> Split:
        return splits.split_of(document, self._validation)

    @functools.cached_property
    def _scan(self) -> tuple[str, Counter[Split]]:
        """Fingerprint of all documents, and number of documents of each split."""
        total = hashlib.blake2b(f"{self._validation} ".encode(), digest_size=16)
        counts: Counter[Split] = Counter()
        for document in self._texts():
            total.update(splits.digest(document))
            counts[self._split(document)] += 1
        return total.hexdigest(), counts

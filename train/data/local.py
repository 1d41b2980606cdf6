"""Corpus of local files, whose documents are prepared on disk."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

from train.data.config import DataError
from train.data.corpus import Split
from train.data.documents import StoredDocuments, write_documents
from train.data.storage import build_once
from train.data.text_files import TextFiles

FORMAT = 2  # increased when prepared corpora must be made again


class LocalCorpus:
    """Corpus of local files, whose documents are written to the cache once.

    The cache folder is named after a hash of the files: an edited corpus is prepared again, an
    unchanged corpus is reused. Of equal documents (`splits.canonical`), only one is kept. The
    held-out split is the files' own split (`TextFiles.held_out`) if there is one; otherwise
    documents are held out by a hash of their content.

    Args:
        files: Files of the corpus.
        validation: Fraction of the documents to hold out, between 0 and 1.
        cache: Folder that prepared corpora are kept in.
    """

    def __init__(self, files: TextFiles, validation: float, cache: Path):
        self.name = files.name
        self._files, self._validation = files, validation
        self.fingerprint = self._identity()
        self._folder = cache / "corpora" / self.fingerprint

    @property
    def note(self) -> str:
        repeated = self._prepared.repeated if self._folder.exists() else 0
        return self._files.note + f", {repeated:,} repeated documents left out" * bool(repeated)

    def documents(self, split: Split) -> Iterator[str]:
        return self._prepared.documents(split)

    def count(self, split: Split) -> int:
        return self._prepared.count(split)

    @functools.cached_property
    def _prepared(self) -> StoredDocuments:
        build_once(self._folder, self._build)
        return StoredDocuments(self._folder)

    def _build(self, folder: Path) -> None:
        write_documents(self._files, self._validation, folder)
        if self._identity() != self.fingerprint:  # else the hash would name other documents
            raise DataError(
                f"files of {self.name} changed while they were read: start again when they stay"
            )

    def _identity(self) -> str:
        identity = f"{FORMAT} {self._files.fingerprint()} {self._validation}"
        return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

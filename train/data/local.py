"""Local text files as a corpus that is prepared on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from train.data.storage import build_once
from train.data.text_files import TextFiles

FORMAT = 1  # to be raised when prepared corpora must be made again


class LocalCorpus:
    """Text files as a TFDS data set in the cache.

    The data set is named by the files' content: an edited folder is prepared again, an unchanged
    one is reused. Documents of equal content are kept once. The split is by content
    (`splits.divide`).

    Args:
        files: Text files of the corpus.
        validation: Share of the documents to hold out, between 0 and 1.
        cache: Folder that prepared corpora are kept in.
    """

    def __init__(self, files: TextFiles, validation: float, cache: Path):
        self.name = files.name
        self._files, self._validation = files, validation
        identity = f"{FORMAT} {files.fingerprint()} {validation} {files.lone}"
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
        self._folder = cache / "corpora" / self.fingerprint

    def documents(self, split: str) -> Iterator[str]:
        return self._prepared().documents(split)

    def count(self, split: str) -> int:
        return self._prepared().count(split)

    def _prepared(self):
        # TFDS takes half a second to import, which a run with packed rows in the cache never needs.
        from train.data.builder import StoredText, prepare_text

        build_once(self._folder, lambda folder: prepare_text(self._files, self._validation, folder))
        return StoredText(self._folder)

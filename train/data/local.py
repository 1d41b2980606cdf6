"""Local text: the Python standard library's own source, a folder, or a lone file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from train.data.source import find_source
from train.data.storage import build_once

FORMAT = 1  # raise when prepared corpora must be made anew


class LocalCorpus:
    """Text files as a TFDS data set in the cache, named by what the files hold: an edited folder
    is prepared anew, an unchanged one is reused.

    Documents of equal content are kept once. The split is by content (`splits.divide`).
    """

    def __init__(self, spec: str, validation: float, cache: Path):
        self._source = find_source(spec)
        self._validation = validation
        identity = f"{FORMAT} {self._source.fingerprint()} {validation} {self._source.lone}"
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
        self._folder = cache / "corpora" / self.fingerprint

    @property
    def name(self) -> str:
        return self._source.name

    def documents(self, split: str) -> Iterator[str]:
        return self._prepared().documents(split)

    def count(self, split: str) -> int:
        return self._prepared().count(split)

    def _prepared(self):
        # TFDS takes half a second to import, which a run with packed rows in the cache never needs.
        from train.data.builder import StoredText, prepare_text

        build_once(
            self._folder, lambda folder: prepare_text(self._source, self._validation, folder)
        )
        return StoredText(self._folder)

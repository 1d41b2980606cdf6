"""Options of pretraining data, and the error for a user's mistake about data."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from pathlib import Path

OF_WEIGHTS = "weights:"
"""Prefix of `DataConfig.tokenizer` for a pretrained tokenizer; the hash of its file follows."""


class DataError(ValueError):
    """A user's mistake about data; the message is one line with the mistake and the way out."""


def check_rows(seq_len: int, validation: float, seed: int) -> None:
    """Raise a DataError for a row length, held-out fraction or seed that is out of range."""
    if seq_len < 1:
        raise DataError(f"seq_len={seq_len}: a row needs at least 1 target")
    if not 0 < validation < 1:
        raise DataError(f"validation={validation} is not a share: choose a number between 0 and 1")
    if seed < 0:
        raise DataError(f"seed={seed} is negative: choose 0 or more")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Corpus, tokenizer and row length of a run."""

    corpus: str = "stdlib"
    """Source of the text: "stdlib" (the Python standard library's own source), the path of a folder
    or file of text, JSON Lines or Parquet, files(path=..., field='text') with options,
    "tfds:NAME[/CONFIG]" (a TFDS data set on disk), a source of a plugin as name(key=value), or a
    mixture of such sources with their weights as mix({"stdlib": 0.6, "~/texts": 0.4})."""

    tokenizer: str = "bytes"
    """Either "bytes", or the path of a Hugging Face tokenizer.json. A run that starts from
    pretrained weights uses their tokenizer, named weights:HASH; cache_dir keeps a copy of it."""

    seq_len: int = 256
    """Number of target tokens per row; each row holds seq_len + 1 tokens."""

    seed: int = 0
    """Seed of the shuffle of the training rows. Neither the train/held-out split nor the packed
    rows depend on the seed."""

    validation: float = 0.05
    """Fraction of the documents to hold out, unless the corpus has its own held-out split."""

    cache_dir: str | None = None
    """Folder of prepared data; ${XDG_CACHE_HOME:-~/.cache}/thoughtbubbles/data by default."""

    def __post_init__(self) -> None:
        check_rows(self.seq_len, self.validation, self.seed)

    @property
    def cache(self) -> Path:
        """Folder of prepared data."""
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(home).expanduser() / "thoughtbubbles" / "data"

    @property
    def tokenizer_source(self) -> str:
        """Argument for `load_tokenizer`: "bytes", or the path of a file.

        Raises:
            DataError: The tokenizer comes from pretrained weights, and its copy in the cache is
                missing or damaged.
        """
        if not self.tokenizer.startswith(OF_WEIGHTS):
            return self.tokenizer
        digest = self.tokenizer.removeprefix(OF_WEIGHTS)
        file = self.tokenizer_file(digest)
        if not file.is_file():
            raise DataError(
                f"tokenizer {self.tokenizer!r} is not in {file.parents[1]}: it came with "
                "pretrained weights, name them by --init.weights"
            )
        if content_digest(file.read_bytes()) != digest:
            raise DataError(f"the tokenizer in {file} is damaged: delete its folder")
        return str(file)

    def tokenizer_file(self, digest: str) -> Path:
        """Path of the cached copy of a pretrained tokenizer whose content has the hash `digest`."""
        return self.cache / "tokenizers" / re.sub(r"\W", "_", digest) / "tokenizer.json"


def content_digest(content: bytes) -> str:
    """Hash of a tokenizer file's content, which names its copy in the cache."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()

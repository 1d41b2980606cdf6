"""Pack the corpus of a DataConfig into rows of tokens once, and keep the rows in the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from tqdm import tqdm

from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.data.config import DataConfig, DataError
from train.data.corpus import Corpus, Split
from train.data.packing import PackedRows, write_rows
from train.data.sources import open_corpus
from train.data.storage import build_once
from train.data.tokenizers import Tokenizer, load_tokenizer

FORMAT = 1  # increased when packed rows must be made again

_METADATA = "metadata.json"


@dataclasses.dataclass(frozen=True)
class PackedData:
    """Training and held-out split of a corpus as packed rows of tokens.

    Attributes:
        train: Rows of the training split.
        validation: Rows of the held-out split.
        tokenizer: Tokenizer of the rows.
        fingerprint: Hash of corpus, split, tokenizer and row length; equal fingerprints mean equal
            rows.
        statistics: Names of the "corpus" and the "tokenizer", and for each split ("train" and
            "validation") the counts of "documents", "tokens", "bytes" and "rows".
        note: Message for the user: how many files were read or skipped, or where the rows come
            from; may be empty.
    """

    train: PackedRows
    validation: PackedRows
    tokenizer: Tokenizer
    fingerprint: str
    statistics: dict[str, Any]
    note: str = ""

    @property
    def sources(self) -> dict[str, str]:
        """Mapping from each source of a mixture to its rows' fingerprint; empty for one corpus."""
        return {}

    @property
    def summary(self) -> str:
        """Description of the data for people: documents and rows of each split, and tokenizer."""
        train, validation = self.statistics["train"], self.statistics["validation"]
        return (
            f"{self.statistics['corpus']}: {train['documents']:,} documents "
            f"({train['bytes'] / 1e6:.1f} MB) to train on, {validation['documents']:,} "
            f"({validation['bytes'] / 1e6:.1f} MB) held out; {train['rows']:,} + "
            f"{validation['rows']:,} rows of {self.train.seq_len} tokens "
            f"({self.statistics['tokenizer']}, vocabulary {self.tokenizer.vocab_size:,})"
            f"{self.note and '; '}{self.note}"
        )


def prepare_corpus(config: DataConfig, stored: str = "") -> PackedData:
    """Open the packed rows of one corpus; if the cache has none, pack them first.

    Packing shows its progress on a terminal.

    Args:
        config: Corpus, tokenizer and row length.
        stored: Fingerprint of rows that were packed earlier; "" for none. If the cache has these
            rows and they were packed with this tokenizer, they are opened without reading the
            corpus. Otherwise the fingerprint is ignored.

    Raises:
        DataError: Corpus or tokenizer cannot be used, the corpus is too small, or stored rows are
            damaged.
    """
    folder = _folder(config, stored)
    if folder is not None:
        statistics, rows = _read(folder, config.seq_len)
        tokenizer = load_tokenizer(config.tokenizer_source)
        if statistics.get("tokenizer_fingerprint") == tokenizer.fingerprint:
            note = f"rows packed before, {folder}"
            both = rows["train"], rows["validation"]
            return PackedData(*both, tokenizer, stored, statistics, note)
    return prepare_documents(open_corpus(config.corpus, config.validation, config.cache), config)


def prepare_documents(corpus: Corpus, config: DataConfig) -> PackedData:
    """Open the packed rows of an opened corpus; if the cache has none, pack them first.

    Args:
        corpus: Corpus to pack, instead of the corpus that the config names.
        config: Tokenizer, row length and cache.

    Raises:
        DataError: The tokenizer cannot be used, or the corpus is too small.
    """
    tokenizer = load_tokenizer(config.tokenizer_source)
    identity = f"{FORMAT} {corpus.fingerprint} {tokenizer.fingerprint} {config.seq_len}"
    if isinstance(tokenizer, PretrainedTokenizer):  # its fingerprint covers neither of these
        identity += f" {tokenizer.separator} {tokenizer.vocab_size}"
    fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    folder = config.cache / "rows" / fingerprint
    build_once(folder, lambda partial: pack(corpus, tokenizer, config.seq_len, partial))
    return _open(folder, corpus, tokenizer, config.seq_len, fingerprint)


def stored_rows(config: DataConfig, fingerprint: str, split: Split) -> PackedRows | None:
    """Open rows that were packed earlier, even if their corpus has changed or is gone.

    Args:
        config: Row length and cache.
        fingerprint: Fingerprint of the data, `PackedData.fingerprint`.
        split: Split of the corpus.

    Returns:
        Rows of the split, or None if the cache has none with this fingerprint.

    Raises:
        DataError: The rows are damaged.
    """
    folder = _folder(config, fingerprint)
    return None if folder is None else _read(folder, config.seq_len)[1][split]


def _folder(config: DataConfig, fingerprint: str) -> Path | None:
    """Folder of the rows of a fingerprint; None if the cache has none."""
    folder = config.cache / "rows" / fingerprint
    known = re.fullmatch(r"\w+", fingerprint) and (folder / _METADATA).is_file()
    return folder if known else None


def pack(corpus: Corpus, tokenizer: Tokenizer, seq_len: int, folder: Path) -> None:
    """Write the packed rows of both splits, and their statistics.

    Args:
        corpus: Documents to pack.
        tokenizer: Tokenizer of the documents.
        seq_len: Number of targets per row.
        folder: Empty folder to write.

    Raises:
        DataError: A split has too few tokens for a row.
        OSError: The folder cannot be written.
    """
    statistics: dict[str, Any] = {
        "format": FORMAT,
        "corpus": corpus.name,
        "corpus_fingerprint": corpus.fingerprint,
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "seq_len": seq_len,
    }
    splits: tuple[Split, Split] = ("train", "validation")
    for split in splits:
        documents = tqdm(
            corpus.documents(split),
            f"packing {split}",
            corpus.count(split),
            unit="document",
            leave=False,
            disable=None,  # shown on a terminal only
        )
        with documents:
            counts = write_rows(
                documents, tokenizer, seq_len, _file(folder, split), keep_tail=split == "validation"
            )
        if not counts["rows"]:
            raise DataError(
                f"the {split} split of {corpus.name} has {counts['tokens']} tokens, a row needs "
                f"{seq_len + 1} (seq_len={seq_len} and one more): choose a larger corpus or a "
                "smaller seq_len"
            )
        statistics[split] = counts
    (folder / _METADATA).write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")


def _open(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, seq_len: int, fingerprint: str
) -> PackedData:
    statistics, rows = _read(folder, seq_len)
    # Equal content may have been packed under another path.
    statistics |= {"corpus": corpus.name, "tokenizer": tokenizer.name}
    train, validation = rows["train"], rows["validation"]
    return PackedData(train, validation, tokenizer, fingerprint, statistics, corpus.note)


def _read(folder: Path, seq_len: int) -> tuple[dict[str, Any], dict[str, PackedRows]]:
    """Statistics and rows of both splits."""
    try:
        statistics = json.loads((folder / _METADATA).read_text(encoding="utf-8"))
        rows = {
            split: PackedRows(_file(folder, split), seq_len, statistics["vocab_size"])
            for split in ("train", "validation")
        }
        damaged = any(len(rows[split]) != statistics[split]["rows"] for split in rows)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        damaged = True
    if damaged:
        raise DataError(f"the prepared rows in {folder} are damaged: delete that folder")
    return statistics, rows


def _file(folder: Path, split: str) -> Path:
    return folder / f"{split}.array_record"

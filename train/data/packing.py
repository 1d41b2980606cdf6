"""Pack documents into rows of equal length in ArrayRecord files, and read rows by their index."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from train.data.config import DataError
from train.data.storage import record_writer
from train.data.tokenizers import Tokenizer

PADDING = -1
"""Token id of padding, which fills up a row after the end of its text."""

_BLOCK = 1 << 18  # tokens in memory before their rows are written


class PackedRows:
    """Packed rows of a split, with random access by index.

    Row i holds tokens i·seq_len to (i + 1)·seq_len, both included, of the concatenation [separator]
    document [separator] document ..., so that each token except the very first is a target exactly
    once. `rows[i]` is a pair: the tokens [seq_len + 1], int32, and the number of bytes of text that
    the targets tokens[1:] stand for. A short last row is padded with -1.

    Args:
        path: ArrayRecord file of the rows.
        seq_len: Number of targets per row.
        vocab_size: Size of the vocabulary that the rows were written with.
    """

    def __init__(self, path: Path, seq_len: int, vocab_size: int):
        self.seq_len = seq_len
        self._folder = path.parent
        self._record = record_dtype(seq_len, vocab_size)
        # Here: what needs no packed rows runs without array_record.
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._source = ArrayRecordDataSource(os.fspath(path))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        tokens, sizes = self.read(indices)
        return list(zip(tokens, sizes.tolist(), strict=True))

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read many rows in one access.

        Args:
            indices: Indices of the rows [n].

        Returns:
            Token ids [n, seq_len + 1], int32, and the number of bytes of text that the targets of
            each row stand for [n], int32.

        Raises:
            IndexError: A row does not exist.
            DataError: The stored rows are damaged.
        """
        rows = [int(index) for index in indices]
        for index in rows:
            if not 0 <= index < len(self):
                raise IndexError(f"row {index} of {len(self)}")
        if not rows:
            return np.zeros((0, self.seq_len + 1), np.int32), np.zeros(0, np.int32)
        try:
            stored = b"".join(self._source.__getitems__(rows))
        except RuntimeError as error:  # array_record, at a hash that differs
            line = f"the prepared rows in {self._folder} are damaged: delete that folder"
            raise DataError(line) from error
        records = np.frombuffer(stored, self._record)
        tokens = records["tokens"].astype(np.int32)
        if self._record["tokens"].base.kind == "u":
            tokens[tokens == np.iinfo(np.uint16).max] = PADDING
        return tokens, records["bytes"].astype(np.int32)


def record_dtype(seq_len: int, vocab_size: int) -> np.dtype:
    """Dtype of a stored row: little-endian, with 16 bits per token if the vocabulary allows it.

    The fields are "bytes" and "tokens" [seq_len + 1]. With 16 bits, the largest value is padding.
    """
    token = "<u2" if vocab_size <= np.iinfo(np.uint16).max else "<i4"
    return np.dtype([("bytes", "<i4"), ("tokens", token, (seq_len + 1,))])


def write_rows(
    documents: Iterable[str], tokenizer: Tokenizer, seq_len: int, path: Path, *, keep_tail: bool
) -> dict[str, int]:
    """Tokenise documents, pack the tokens into rows and write the rows.

    Args:
        documents: Documents, in the order in which they are concatenated.
        tokenizer: Tokenizer of the documents.
        seq_len: Number of targets per row.
        path: ArrayRecord file to write.
        keep_tail: Whether the last tokens, if they do not fill a row, are padded to a row; False
            drops these tokens.

    Returns:
        Dict with the counts of "documents", "tokens" (with separators), "bytes" of text, and
        "rows".

    Raises:
        OSError: The file cannot be written.
    """
    counts = {"documents": 0, "tokens": 0, "bytes": 0, "rows": 0}
    record = record_dtype(seq_len, tokenizer.vocab_size)
    tokens = sizes = np.zeros(0, np.int32)
    with record_writer(path) as write:
        for ids, lengths in _blocks(documents, tokenizer, counts):
            tokens = np.concatenate([tokens, ids])
            sizes = np.concatenate([sizes, lengths])
            written = _write(write, tokens, sizes, seq_len, record)
            counts["rows"] += written
            tokens, sizes = tokens[written * seq_len :], sizes[written * seq_len :]
        if keep_tail and len(tokens) > 1:
            missing = seq_len + 1 - len(tokens)
            tokens = np.pad(tokens, (0, missing), constant_values=PADDING)
            counts["rows"] += _write(write, tokens, np.pad(sizes, (0, missing)), seq_len, record)
    return counts


def _blocks(
    documents: Iterable[str], tokenizer: Tokenizer, counts: dict[str, int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield blocks of at least _BLOCK tokens, except for the last, and the bytes of each token.

    The numbers of documents, tokens and bytes are added to `counts`.
    """
    separator = (np.array([tokenizer.separator], np.int32), np.zeros(1, np.int32))
    pieces: list[tuple[np.ndarray, np.ndarray]] = []
    pending = 0
    for document in documents:
        ids, lengths = tokenizer.encode(document)
        if not len(ids):  # a normalizer may leave nothing of a document
            continue
        pieces += [separator, (ids, lengths)]
        pending += 1 + len(ids)
        counts["documents"] += 1
        counts["tokens"] += 1 + len(ids)
        counts["bytes"] += int(lengths.sum())
        if pending >= _BLOCK:
            yield _joined(pieces)
            pieces, pending = [], 0
    if pieces:
        yield _joined(pieces)


def _joined(pieces: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    ids, lengths = zip(*pieces, strict=True)
    return np.concatenate(ids), np.concatenate(lengths)


def _write(
    write: Callable[[bytes], None],
    tokens: np.ndarray,
    sizes: np.ndarray,
    seq_len: int,
    record: np.dtype,
) -> int:
    """Write all complete rows at the front of `tokens`; return the number of rows."""
    count = max(0, len(tokens) - 1) // seq_len
    if count:
        windows = np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]
        rows = np.empty(count, record)
        rows["tokens"] = windows[:count]
        rows["bytes"] = sizes[1 : count * seq_len + 1].reshape(count, seq_len).sum(axis=1)
        for row in rows:
            write(row.tobytes())
    return count

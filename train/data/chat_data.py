"""Turn conversations into rows whose loss covers the assistant's tokens, and rows into batches."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from train.data import splits
from train.data.config import DataError, check_rows
from train.data.conversations import Conversation, conversation_files, read_conversations
from train.data.packing import PADDING, PackedRows
from train.data.reader import Batch, TrainReader, padded_batches
from train.data.tokenizers import Tokenizer

SHORTEST_ROW = 64
"""Number of targets below which the rows of a batch are not shortened."""


@dataclasses.dataclass(frozen=True)
class ChatDataConfig:
    """Conversations, row length and packing of a run on chat data."""

    path: tuple[str, ...] = ()
    """Files of conversations (JSON Lines, also packed, Parquet, Arrow), and folders of them."""

    validation_path: str | None = None
    """File or folder of held-out conversations, instead of a fraction of those in path."""

    validation: float = 0.05
    """Fraction of the conversations that is held out if there is no validation_path."""

    seq_len: int = 1024
    """Maximum number of target tokens in a row; a row holds seq_len + 1 tokens. The rows of a batch
    are shortened to the smallest power of two, at least 64, that fits the longest of them."""

    pack: bool = False
    """Whether a row holds several conversations, each masked from the others. Only a plain decoder
    takes packed rows; a model that forks needs one conversation per row."""

    end_token: str | None = None
    """Token that ends an answer if the files of the weights name another one, such as "<|im_end|>"
    for the base models of Qwen2.5; the tuned model stops there too."""

    close_thoughts: bool = False
    """Whether to put an empty thought before answers without one, for templates whose generation
    prompt opens <think>."""

    seed: int = 0
    """Seed of the order of the training rows; neither the split nor the rows depend on it."""

    def __post_init__(self) -> None:
        check_rows(self.seq_len, self.validation, self.seed)


@dataclasses.dataclass(frozen=True, eq=False)
class ChatRows:
    """N rows of tokens: inputs are all but the last token of a row, targets all but the first.

    Attributes:
        tokens: Token ids `[N, seq_len + 1]`, int32; -1 for padding.
        loss_mask: Whether the token is in the loss: content or end of an answer that is learned
            `[N, seq_len + 1]`, bool.
        segment: Index of the token's conversation in the row `[N, seq_len + 1]`, int32; -1 for
            padding.
        position: Position of the token in its conversation `[N, seq_len + 1]`, int32; 0 for
            padding.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    segment: np.ndarray
    position: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def seq_len(self) -> int:
        """Number of targets of a row."""
        return self.tokens.shape[1] - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each row `[N]`, without padding."""
        return (self.segment >= 0).sum(axis=1)

    def width(self, indices: np.ndarray | slice) -> int:
        """Number of targets to which some rows are shortened when they are read together.

        It is a power of two of at least `SHORTEST_ROW`, so that few programs are compiled, and at
        most `seq_len`.

        Args:
            indices: Indices of the rows `[b]`.
        """
        longest = int(self.lengths[indices].max(initial=2)) - 1
        return min(max(SHORTEST_ROW, 1 << (longest - 1).bit_length()), self.seq_len)

    def read(self, indices: np.ndarray, width: int | None = None) -> Batch:
        """Read some rows, shortened to a common width.

        Args:
            indices: Indices of the rows `[b]`.
            width: Number of targets of the rows, T; None takes `width(indices)`.

        Returns:
            Dict of "tokens", "loss_mask", "segment" and "position" `[b, T + 1]`, as the attributes,
            and "rows" `[b]`, int64, the indices.
        """
        fields = (field.name for field in dataclasses.fields(self))
        end = 1 + (self.width(indices) if width is None else width)
        batch = {name: getattr(self, name)[indices, :end] for name in fields}
        return batch | {"rows": np.asarray(indices, np.int64)}

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield batches, as from `read`, of rows evenly spaced over the split, without repeats.

        Args:
            batch_size: Number of rows of a batch; the last batch is padded to it by rows of
                padding, with -1 as their index in "rows".
            limit: Maximum number of rows to read; None reads all of them.

        Raises:
            DataError: The batch size is less than 1.
        """
        padding = {"tokens": PADDING, "loss_mask": False, "segment": -1, "position": 0, "rows": -1}
        return padded_batches(self.read, len(self), batch_size, limit, padding)


@dataclasses.dataclass(frozen=True, eq=False)
class ChatData:
    """Training and held-out conversations as rows.

    Attributes:
        train: Rows of the training split.
        validation: Rows of the held-out split.
        tokenizer: Tokenizer of the rows.
        fingerprint: Hash of the rows and the tokenizer.
        statistics: Counts of each split ("train", "validation"): "conversations", "texts" (a
            conversation may need several), "tokens", "loss_tokens" (in the loss), "rows", and texts
            that were "cut" (truncated) or "dropped" because a row is too short for them.
        name: Paths of the files and folders, as the user wrote them.
        note: Message for people: which files of folders were read and which skipped; empty if there
            are no folders.
    """

    train: ChatRows
    validation: ChatRows
    tokenizer: Tokenizer
    fingerprint: str
    statistics: dict[str, dict[str, int]]
    name: str
    note: str = ""

    @property
    def summary(self) -> str:
        """Description of the data for people, in one line."""
        train, validation = self.statistics["train"], self.statistics["validation"]
        total = {count: train[count] + validation[count] for count in train}
        length, rows = self.train.seq_len, total["rows"]
        widest = max(side.width(slice(None)) for side in (self.train, self.validation))
        return (
            f"{self.name}: {train['conversations']:,} conversations to train on, "
            f"{validation['conversations']:,} held out; {train['rows']:,} + "
            f"{validation['rows']:,} rows of {widest} tokens "
            f"({total['tokens'] / (rows * (widest + 1)):.0%} full, "
            f"{total['loss_tokens'] / total['tokens']:.0%} of it in the loss); "
            f"{total['cut']:,} cut at {length + 1} tokens, {total['dropped']:,} left out "
            f"(no answer within them); {self.tokenizer.name}{self.note and '; '}{self.note}"
        )


def prepare_chat(config: ChatDataConfig, tokenizer: Tokenizer) -> ChatData:
    """Read and tokenise conversations, and put them into rows in memory.

    A text that is too long for a row is truncated, and is dropped if no answer begins in what is
    left. Conversations of equal content are in the same split. Conversations of a validation_path
    are held out even if the training data contain them too.

    Args:
        config: Files, row length and packing.
        tokenizer: Tokenizer of the model.

    Raises:
        DataError: There are no files, a record is not a conversation or does not fit the tokenizer,
            or a split has no rows.
    """
    if not config.path:
        raise DataError("no chat data are named: pass --data.path and a JSONL file or a folder")
    name = ", ".join(config.path)
    found = [chat for path in config.path for chat in read_conversations(path)]
    if config.validation_path is not None:
        held_out = list(read_conversations(config.validation_path))
        chosen = {"train": found, "validation": held_out}
    else:
        train, validation = splits.divide({c.digest for c in found}, config.validation, name)
        sides = {"train": train, "validation": validation}
        chosen = {side: [c for c in found if c.digest in of] for side, of in sides.items()}
    identity = hashlib.blake2b(tokenizer.fingerprint.encode(), digest_size=16)
    rows: dict[str, ChatRows] = {}
    statistics: dict[str, dict[str, int]] = {}
    for side, chats in chosen.items():
        source = name if side == "train" else config.validation_path or name
        rows[side], statistics[side] = _rows(chats, tokenizer, config, f"{side} data of {source}")
        for field in dataclasses.fields(ChatRows):
            values = getattr(rows[side], field.name)
            identity.update(f"{field.name} {values.shape} ".encode() + values.tobytes())
    paths = [*config.path, *filter(None, [config.validation_path])]
    notes = {path: note for path in paths if (note := conversation_files(path)[1])}
    note = "; ".join(f"{path}: {note}" for path, note in notes.items())
    return ChatData(
        rows["train"], rows["validation"], tokenizer, identity.hexdigest(), statistics, name, note
    )


class ChatReader(TrainReader):
    """Reader of chat rows: a `TrainReader` with batches as from `ChatRows.read`.

    Args:
        rows: Rows of the split.
        global_batch: Number of rows of a batch over all processes.
        seed: Seed of the order.
        local_rows: Indices in the batch of the rows that this process reads; None reads all.
    """

    def __init__(
        self, rows: ChatRows, global_batch: int, seed: int, local_rows: np.ndarray | None = None
    ):
        self._chat = rows
        # Only the order is inherited, which needs nothing but the number of rows.
        super().__init__(cast(PackedRows, rows), global_batch, seed, local_rows)

    def _read(self, rows: np.ndarray) -> Batch:
        local = rows if self._local_rows is None else rows[self._local_rows]
        return self._chat.read(local, self._chat.width(rows))  # of one width on all processes


def segment_mask(segment: jax.Array) -> jax.Array:
    """Compute the attention mask of packed rows: causal, and within a conversation.

    Padding attends to padding alone. Padding tokens are -1, for which `embed_tokens` gives NaN, and
    NaN spreads through masked attention: give padding a real id, `jnp.maximum(tokens, 0)`.

    Args:
        segment: Index of each token's conversation in its row `[B, T]`, int32.

    Returns:
        Whether a query attends to a key `[B, T, T]` (row, query, key), bool.
    """
    same = segment[:, :, None] == segment[:, None, :]
    return same & jnp.tri(segment.shape[1], dtype=bool)


def _rows(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, config: ChatDataConfig, what: str
) -> tuple[ChatRows, dict[str, int]]:
    width = config.seq_len + 1
    counts = {"conversations": len(conversations), "texts": 0, "cut": 0, "dropped": 0}
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    shown = tqdm(conversations, "tokenising", unit="conversation", leave=False, disable=None)
    for example in (
        example for chat in shown for example in chat.examples(tokenizer, config.close_thoughts)
    ):
        counts["texts"] += 1
        loss_mask = np.array(example.loss_mask[:width])
        loss_mask[:1] = False  # the first token of a row is no target
        if not loss_mask.any():
            counts["dropped"] += 1
            continue
        counts["cut"] += len(example.ids) > width
        # A cut text may end in a question without an answer.
        end = int(np.flatnonzero(loss_mask)[-1]) + 1
        kept.append((np.array(example.ids[:end], np.int32), loss_mask[:end]))
    if not kept:
        raise DataError(
            f"the {what} have no assistant token within seq_len={config.seq_len} and one more in "
            f"any of {counts['texts']} texts: choose a larger seq_len, or other data"
        )
    lengths = [len(ids) for ids, _ in kept]
    packed = pack(lengths, width) if config.pack else [[text] for text in range(len(kept))]
    rows = ChatRows(
        np.full((len(packed), width), PADDING, np.int32),
        np.zeros((len(packed), width), bool),
        np.full((len(packed), width), -1, np.int32),
        np.zeros((len(packed), width), np.int32),
    )
    for row, members in enumerate(packed):
        start = 0
        for segment, (ids, loss_mask) in enumerate(kept[member] for member in members):
            here = row, slice(start, start + len(ids))
            rows.tokens[here], rows.loss_mask[here] = ids, loss_mask
            rows.segment[here], rows.position[here] = segment, np.arange(len(ids))
            start += len(ids)
    counts |= {"tokens": sum(lengths), "loss_tokens": int(rows.loss_mask.sum())}
    return rows, counts | {"rows": len(packed)}


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Pack texts into rows by best-fit decreasing: longest first, each into the fullest that fits.

    Args:
        lengths: Lengths of the texts in tokens, at most `width` each.
        width: Number of tokens of a row.

    Returns:
        Indices of the texts of each row.
    """
    rows: list[list[int]] = []
    by_free: dict[int, list[int]] = {}  # rows by their number of free tokens
    sizes: list[int] = []  # the keys, ascending
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        fit = bisect.bisect_left(sizes, lengths[text])
        if fit < len(sizes):
            free = sizes[fit]
            row = by_free[free].pop()
            if not by_free[free]:
                del by_free[free], sizes[fit]
        else:
            free, row = width, len(rows)
            rows.append([])
        rows[row].append(text)
        left = free - lengths[text]
        if left not in by_free:
            bisect.insort(sizes, left)
        by_free.setdefault(left, []).append(row)
    return rows


def one_response_rows(rows: ChatRows) -> ChatRows:
    """Make a row for each response: all up to the response's end, with the loss on it alone.

    A weaver adds memory to one response; earlier turns are context without memory.

    Args:
        rows: Rows of conversations, each with any number of responses.

    Returns:
        Rows of the same length, one for each response, padded with -1.
    """
    marks = rows.loss_mask
    begins = marks & ~np.pad(marks, ((0, 0), (1, 0)))[:, :-1]
    ends = marks & ~np.pad(marks, ((0, 0), (0, 1)))[:, 1:]
    row, first = np.nonzero(begins)
    last = np.nonzero(ends)[1]
    index = np.arange(marks.shape[1])
    within = index <= last[:, None]
    return ChatRows(
        tokens=np.where(within, rows.tokens[row], -1).astype(np.int32),
        loss_mask=within & (index >= first[:, None]),
        segment=np.where(within, rows.segment[row], -1).astype(np.int32),
        position=np.where(within, rows.position[row], 0).astype(np.int32),
    )

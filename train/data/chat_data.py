"""Turn conversations into rows with a loss mask on the assistant's tokens, and read batches."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
from collections.abc import Collection, Iterator, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from train.data import splits
from train.data.chat_templates import answer_ends
from train.data.config import DataError, check_rows
from train.data.conversations import Conversation, conversation_files, read_conversations
from train.data.packing import PADDING, PackedRows
from train.data.reader import Batch, TrainReader, padded_batches
from train.data.tokenizers import Tokenizer

SHORTEST_ROW = 64
"""Smallest number of targets to which the rows per batch are shortened."""


@dataclasses.dataclass(frozen=True)
class ChatDataConfig:
    """Chat data of a fine-tuning run: files of conversations, row length, sequence packing."""

    path: tuple[str, ...] = ()
    """Files of conversations, or folders of such files: JSON Lines (plain or compressed), Parquet
    or Arrow."""

    validation_path: str | None = None
    """File or folder of held-out conversations, which are not trained on even if path has them too,
    unless it has no others; None holds out a fraction of the conversations in path."""

    validation: float = 0.05
    """Fraction of the conversations to hold out if validation_path is None."""

    seq_len: int = 1024
    """Maximum number of target tokens per row; each row holds seq_len + 1 tokens. The rows of a
    batch are shortened to the smallest power of two, at least 64, that fits the longest row."""

    pack: bool = False
    """Whether to pack several conversations into one row, with no attention between conversations.
    Only a plain decoder takes packed rows; a model that forks needs one conversation per row."""

    end_token: str | None = None
    """Additional end token, for a chat template that ends answers with a token that the model's
    files do not list as an end token, such as "<|im_end|>" for the base models of Qwen2.5. The
    tuned model also stops at this token. None adds no token."""

    close_thoughts: bool = False
    """Whether to put an empty thinking block before each answer that has none, for chat templates
    whose generation prompt opens <think>."""

    seed: int = 0
    """Seed of the shuffle of the training rows. Neither the train/held-out split nor the content of
    the rows depends on the seed."""

    def __post_init__(self) -> None:
        check_rows(self.seq_len, self.validation, self.seed)


@dataclasses.dataclass(frozen=True, eq=False)
class ChatRows:
    """N rows of tokens: inputs are all but the last token of a row, targets all but the first.

    Attributes:
        tokens: Token ids `[N, seq_len + 1]`, int32; -1 for padding.
        loss_mask: Whether each token is in the loss, which covers the content and the end token of
            learned answers `[N, seq_len + 1]`, bool.
        segment: Index of each token's conversation within the row `[N, seq_len + 1]`, int32; -1
            for padding.
        position: Position of each token in its conversation `[N, seq_len + 1]`, int32; 0 for
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
        """Number of targets per row."""
        return self.tokens.shape[1] - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens in each row `[N]`, without padding."""
        return (self.segment >= 0).sum(axis=1)

    def width(self, indices: np.ndarray | slice) -> int:
        """Compute the number of targets to which rows are shortened when they are read together.

        The number is a power of two of at least `SHORTEST_ROW`, so that few shapes are compiled, or
        `seq_len` if that is smaller.

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
            Mapping from name to array: "tokens", "loss_mask", "segment" and "position"
            `[b, T + 1]`, as in the attributes of this class, and "rows" `[b]`, int64, the indices.
        """
        fields = (field.name for field in dataclasses.fields(self))
        end = 1 + (self.width(indices) if width is None else width)
        batch = {name: getattr(self, name)[indices, :end] for name in fields}
        return batch | {"rows": np.asarray(indices, np.int64)}

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield batches, as `read` returns them, of rows that are evenly spaced over the split.

        Args:
            batch_size: Number of rows per batch. The last batch is filled up with rows of padding,
                whose index in "rows" is -1.
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
        statistics: Mapping from split ("train", "validation") to counts: "conversations", "texts"
            (one or several per conversation), "tokens" of the rows, "loss_tokens" (tokens in the
            loss), "rows", "cut" (truncated texts), and "dropped" (texts without a token in the
            loss).
        name: Paths of the files and folders, as the user wrote them.
        note: Message for the user: how many files of each folder were read and which were skipped,
            and how many conversations are in both splits' files; may be empty.
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
    """Read and tokenise conversations, and arrange their tokens in rows in RAM.

    A text that is too long for a row is truncated, and is dropped if no answer begins before the
    cut. Conversations of equal content are in the same split. The conversations of
    `validation_path` are held out, and not trained on even if the files in `path` contain them too,
    unless those contain no others.

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
    paths = [*config.path, *filter(None, [config.validation_path])]
    notes = [f"{path}: {note}" for path in paths if (note := conversation_files(path)[1])]
    if config.validation_path is not None:
        held_out = list(read_conversations(config.validation_path))
        own = {c.digest for c in held_out}
        learned = [c for c in found if c.digest not in own]
        if found and not learned:  # to see whether a model can learn them at all
            learned = found
            notes.append(f"all conversations of {name} are trained on and held out")
        elif both := len(found) - len(learned):
            notes.append(f"{both:,} conversations of {name} are held out, and not trained on")
        chosen = {"train": learned, "validation": held_out}
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
    note = "; ".join(notes)
    return ChatData(
        rows["train"], rows["validation"], tokenizer, identity.hexdigest(), statistics, name, note
    )


class ChatReader(TrainReader):
    """Reader of chat rows in shuffled order: a `TrainReader` whose batches `ChatRows.read` makes.

    Args:
        rows: Rows of the split.
        global_batch: Number of rows per batch over all processes.
        seed: Seed of the shuffle.
        local_rows: Indices, within the global batch, of the rows that this process reads; None
            reads all rows.
    """

    def __init__(
        self, rows: ChatRows, global_batch: int, seed: int, local_rows: np.ndarray | None = None
    ):
        self._chat = rows
        # Only the shuffled order is inherited, which depends only on the number of rows.
        super().__init__(cast(PackedRows, rows), global_batch, seed, local_rows)

    def _read(self, rows: np.ndarray) -> Batch:
        local = rows if self._local_rows is None else rows[self._local_rows]
        return self._chat.read(local, self._chat.width(rows))  # the same width on all processes


def segment_mask(segment: jax.Array) -> jax.Array:
    """Compute the attention mask of packed rows: causal attention within each conversation.

    Padding attends only to padding. The id of padding is -1, for which `embed_tokens` returns NaN,
    and NaN spreads even through masked attention. So replace the ids of padding before the forward
    pass, as `jnp.maximum(tokens, 0)` does.

    Args:
        segment: Index of each token's conversation in its row `[B, T]`, int32.

    Returns:
        Mask `[B, T, T]` (row, query, key), bool; True where the query attends to the key.
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
    """Pack texts into rows by best-fit decreasing.

    Texts are placed in order of decreasing length, each in the fullest row that has space for it.

    Args:
        lengths: Lengths of the texts in tokens, at most `width` each.
        width: Number of tokens per row.

    Returns:
        List of rows; each row is a list of the indices of its texts.
    """
    rows: list[list[int]] = []
    by_free: dict[int, list[int]] = {}  # rows by their number of free tokens
    sizes: list[int] = []  # keys of `by_free`, in increasing order
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


def one_response(data: ChatData) -> ChatData:
    """Make one row per response in both splits (`one_response_rows`), and count the new rows."""
    ends = answer_ends(data.tokenizer)
    made = {side: one_response_rows(getattr(data, side), ends) for side in data.statistics}
    statistics = {
        side: counts | {"tokens": int(made[side].lengths.sum()), "rows": len(made[side])}
        for side, counts in data.statistics.items()
    }
    return dataclasses.replace(data, **made, statistics=statistics)


def one_response_rows(rows: ChatRows, ends: Collection[int]) -> ChatRows:
    """Make one row per response: the tokens up to its end, with only the response in the loss.

    A weaver adds latent memory to one response; earlier turns are context without latent memory.

    Args:
        rows: Rows of conversations, each with any number of responses.
        ends: Ids of the tokens that end a response (`answer_ends`), after which a chat template may
            begin the next response without a token between.

    Returns:
        Rows of the same length, one for each response, padded with -1.
    """
    marks = rows.loss_mask
    goes_on = marks[:, :-1] & marks[:, 1:] & ~np.isin(rows.tokens[:, :-1], list(ends))
    row, first = np.nonzero(marks & ~np.pad(goes_on, ((0, 0), (1, 0))))
    last = np.nonzero(marks & ~np.pad(goes_on, ((0, 0), (0, 1))))[1]
    index = np.arange(marks.shape[1])
    within = index <= last[:, None]
    return ChatRows(
        tokens=np.where(within, rows.tokens[row], -1).astype(np.int32),
        loss_mask=within & (index >= first[:, None]),
        segment=np.where(within, rows.segment[row], -1).astype(np.int32),
        position=np.where(within, rows.position[row], 0).astype(np.int32),
    )

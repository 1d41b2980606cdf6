"""Conversations in JSON Lines to rows whose loss covers the assistant's tokens.

A line is `{"messages": [{"role": ..., "content": ...}, ...]}` (roles: system, user, assistant,
tool), `{"prompt": ..., "completion": ...}` or `{"question": ..., "answer": ...}`. The first of the
three formats that a line has is used, and its other fields are ignored.

Pretrained tokenizers render a conversation with their own chat template
(`train.data.chat_templates.chat_examples`), in which a prompt and its completion are a user's and
an assistant's message. Without a template a completion directly follows its prompt, an answer
follows its question, or a single user message, after a line break, and the separator ends both.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.data import splits
from train.data.chat_templates import Example, Message, chat_examples, text_example
from train.data.config import DataError, check_rows
from train.data.json_lines import read_json_lines
from train.data.packing import PADDING, PackedRows
from train.data.reader import Batch, TrainReader, padded_batches
from train.data.tokenizers import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
SUFFIXES = (".jsonl", ".jsonl.gz")
_PAIRS = (("prompt", "completion"), ("question", "answer"))
_FORMATS = '"messages", or "prompt" and "completion", or "question" and "answer"'


@dataclasses.dataclass(frozen=True)
class ChatDataConfig:
    """Conversations, row length and packing of a run on chat data."""

    path: tuple[str, ...] = ()
    """JSON Lines files, and folders of them (.jsonl, also with .gz, at any depth)."""

    validation_path: str | None = None
    """File or folder of held-out conversations, instead of a share of the others."""

    validation: float = 0.05
    """Share of the conversations that is held out, without a validation_path."""

    seq_len: int = 1024
    """Targets per row; a row holds seq_len + 1 tokens."""

    pack: bool = False
    """Several conversations in a row, each masked from the others. Only a plain decoder takes such
    rows; a model that forks needs rows of one conversation."""

    seed: int = 0
    """Order of the training rows. Neither the split nor the rows depend on it."""

    def __post_init__(self) -> None:
        check_rows(self.seq_len, self.validation, self.seed)


@dataclasses.dataclass(frozen=True, eq=False)
class ChatRows:
    """Rows of tokens: inputs are all but the last token of a row, targets all but the first.

    Attributes:
        tokens: Token ids `[N, seq_len + 1]`, int32; -1 for padding.
        loss_mask: Whether the assistant wrote the token, its content or the end of its turn
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

    def read(self, indices: np.ndarray) -> Batch:
        """Some rows.

        Args:
            indices: Indices of the rows `[b]`.

        Returns:
            The four attributes by their names `[b, seq_len + 1]`, and the indices as "rows" `[b]`,
            int64.
        """
        fields = (field.name for field in dataclasses.fields(self))
        batch = {name: getattr(self, name)[indices] for name in fields}
        return batch | {"rows": np.asarray(indices, np.int64)}

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Rows in the form of `read`, evenly spaced over the split, once and in order.

        Args:
            batch_size: Number of rows of a batch; the last batch is padded to it by rows of
                padding, with -1 as their index.
            limit: Number of rows to read; None reads all of them.

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
        statistics: Counts of each split: "conversations", "texts" (a conversation may need
            several), "tokens", "loss_tokens" (those in the loss), "rows", and texts that were "cut"
            or "dropped" because a row is too short for them.
        name: Names of the files, as the user wrote them.
    """

    train: ChatRows
    validation: ChatRows
    tokenizer: Tokenizer
    fingerprint: str
    statistics: dict[str, dict[str, int]]
    name: str

    @property
    def summary(self) -> str:
        """One line for people."""
        train, validation = self.statistics["train"], self.statistics["validation"]
        total = {count: train[count] + validation[count] for count in train}
        length, rows = self.train.seq_len, total["rows"]
        return (
            f"{self.name}: {train['conversations']:,} conversations to train on, "
            f"{validation['conversations']:,} held out; {train['rows']:,} + "
            f"{validation['rows']:,} rows of {length} tokens "
            f"({total['tokens'] / (rows * (length + 1)):.0%} full, "
            f"{total['loss_tokens'] / total['tokens']:.0%} of it in the loss); "
            f"{total['cut']:,} cut at {length + 1} tokens, {total['dropped']:,} left out "
            f"(no answer within them); {self.tokenizer.name}"
        )


def prepare_chat(config: ChatDataConfig, tokenizer: Tokenizer) -> ChatData:
    """Read, render and pack conversations, in memory.

    A text that is too long for a row loses its end, and is dropped if no answer begins in what is
    left. Conversations of equal content are in the same split; those of a validation_path are held
    out whatever the others are.

    Args:
        config: Files, row length and packing.
        tokenizer: Tokenizer of the model.

    Raises:
        DataError: There are no files, a line is no conversation or does not fit the tokenizer, or a
            split has no rows.
    """
    if not config.path:
        raise DataError("no chat data are named: pass --data.path and a JSONL file or a folder")
    name = ", ".join(config.path)
    found = [chat for path in config.path for file in _files(path) for chat in _read(file)]
    if config.validation_path is not None:
        held_out = [chat for file in _files(config.validation_path) for chat in _read(file)]
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
    return ChatData(
        rows["train"], rows["validation"], tokenizer, identity.hexdigest(), statistics, name
    )


class ChatReader(TrainReader):
    """A `TrainReader` of chat rows, whose batches are those of `ChatRows.read`.

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
        return self._chat.read(rows if self._local_rows is None else rows[self._local_rows])


def segment_mask(segment: jax.Array) -> jax.Array:
    """Attention mask of packed rows: causal, and within a conversation.

    Padding attends to padding alone. Its tokens are -1, for which `embed_tokens` gives NaN, and NaN
    spreads through masked attention: give padding a real id, `jnp.maximum(tokens, 0)`.

    Args:
        segment: Index of each token's conversation in its row `[B, T]`, int32.

    Returns:
        Whether a query attends to a key `[B, T, T]` (row, query, key), bool.
    """
    same = segment[:, :, None] == segment[:, None, :]
    return same & jnp.tri(segment.shape[1], dtype=bool)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One line of a file.

    Attributes:
        where: File and line number, for error messages.
        messages: Messages with known roles and text as their content; the last is the assistant's.
        gap: Text between question and answer where there is no chat template.
        digest: Hash of messages and gap.
    """

    where: str
    messages: Sequence[Message]
    gap: str
    digest: bytes

    def examples(self, tokenizer: Tokenizer) -> list[Example]:
        """Texts with their loss masks; a chat template may need several for a conversation.

        Args:
            tokenizer: Tokenizer of the model.

        Raises:
            DataError: The conversation does not fit the tokenizer.
        """
        if isinstance(tokenizer, PretrainedTokenizer) and tokenizer.chat_template is not None:
            try:
                return chat_examples(tokenizer, self.messages)
            except ValueError as error:
                raise DataError(f"{self.where}: {error}") from error
        roles = [message["role"] for message in self.messages]
        if roles != ["user", "assistant"]:
            raise DataError(
                f"{self.where}: {tokenizer.name} has no chat template, so a conversation is one "
                f"user and one assistant message, here {', '.join(roles)}: cut it, or train a "
                "model that has a template"
            )
        question, answer = (message["content"] for message in self.messages)
        return [_plain(tokenizer, question + self.gap, answer)]


def _plain(tokenizer: Tokenizer, prompt: str, completion: str) -> Example:
    encode = lambda text: tokenizer.encode(text)[0].tolist()  # noqa: E731
    if isinstance(tokenizer, PretrainedTokenizer):
        return text_example(tokenizer.prompt, encode, prompt, completion, tokenizer.stop_ids[0])
    separator = tokenizer.separator
    return text_example(
        lambda text: [separator, *encode(text)], encode, prompt, completion, separator
    )


def _files(path: str) -> list[Path]:
    root = Path(path).expanduser()
    if not root.is_dir():
        return [root]
    inside = (file for file in sorted(root.rglob("*")) if file.name.endswith(SUFFIXES))
    hidden = lambda file: any(part.startswith(".") for part in file.relative_to(root).parts)  # noqa: E731
    found = [file for file in inside if file.is_file() and not hidden(file)]
    if not found:
        raise DataError(f"{path} has no file of conversations ({' or '.join(SUFFIXES)})")
    return found


def _read(file: Path) -> Iterator[Conversation]:
    for where, _, fields in read_json_lines(file):
        messages, gap = _messages(fields, where)
        digest = splits.digest(json.dumps([messages, gap], sort_keys=True))
        yield Conversation(where, messages, gap, digest)


def _messages(line: Mapping[str, Any], where: str) -> tuple[Sequence[Message], str]:
    if "messages" in line:
        return _checked(line["messages"], where), "\n"
    for question, answer in _PAIRS:
        if question in line and answer in line:
            messages = [
                {"role": "user", "content": _text(line[question], f'{where}: "{question}"')},
                {"role": "assistant", "content": _text(line[answer], f'{where}: "{answer}"')},
            ]
            return messages, "" if question == "prompt" else "\n"
    raise DataError(f"{where} has keys {', '.join(map(repr, line)) or 'none'}: give {_FORMATS}")


def _checked(messages: Any, where: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{where}: "messages" is no list with a message in it: delete the line')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise DataError(f'{where}: message {number} is no object with "role" and "content"')
        role = message.get("role")
        if role not in ROLES:
            raise DataError(
                f"{where}: message {number} has role {role!r}: choose from {', '.join(ROLES)}"
            )
        _text(message.get("content"), f"{where}: the content of message {number}")
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the last message is from {messages[-1]['role']!r}, and there is nothing to "
            "learn behind the last answer: end with the assistant's"
        )
    return messages


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} is {json.dumps(value)[:40]}, no text: give a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds half a character ({error.reason}): repair it") from error
    return value


def _rows(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, config: ChatDataConfig, what: str
) -> tuple[ChatRows, dict[str, int]]:
    width = config.seq_len + 1
    counts = {"conversations": len(conversations), "texts": 0, "cut": 0, "dropped": 0}
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    shown = tqdm(conversations, "tokenising", unit="conversation", leave=False, disable=None)
    for example in (example for chat in shown for example in chat.examples(tokenizer)):
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
    """Best-fit decreasing packing: longest texts first, each into the fullest row that takes it.

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
    """A row for each response: the conversation up to its end, with the loss on the response.

    A weaver adds memory to one response; earlier turns are context without memory.

    Args:
        rows: Rows of conversations, each with any number of responses.
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

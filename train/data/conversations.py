"""Read conversations from files, check them and tokenise them.

The formats of a record are described in `train.data.chat_formats`.

If the tokenizer has a chat template, the template renders each conversation
(`train.data.chat_templates.chat_examples`); a prompt and its completion become a user message and
an assistant message. Without a template, a completion directly follows its prompt, and every other
answer follows its question after a line break. The text ends with the tokenizer's end token or
separator.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.data import splits
from train.data.chat_formats import Chat, read_chat
from train.data.chat_templates import Example, chat_examples, text_example
from train.data.config import DataError
from train.data.records import is_records, read_records
from train.data.text_files import files_note, suffix_of, walk_files
from train.data.tokenizers import Tokenizer

FILES = ".jsonl, .ndjson, .parquet or .arrow, JSON also compressed"
"""Description, for messages, of the files that are read in a folder of conversations."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation: one record of a file.

    Attributes:
        where: File, and number of the line, row or item, for error messages.
        chat: Messages and tools of the record.
    """

    where: str
    chat: Chat

    @property
    def digest(self) -> bytes:
        """Hash of messages and tools, which is the same for all formats that say the same.

        The messages' texts are normalised by `splits.canonical`. The gap between question and
        answer, which differs between the formats, is not part of the hash.
        """
        messages = [
            {**message, "content": splits.canonical(message["content"])}
            for message in self.chat.messages
        ]
        # The "\n" keeps the hashes, and so the splits, of runs begun when the gap was hashed too.
        parts = [messages, "\n", *([self.chat.tools] if self.chat.tools else [])]
        return splits.digest(json.dumps(parts, sort_keys=True))

    def examples(self, tokenizer: Tokenizer, close_thoughts: bool = False) -> list[Example]:
        """Tokenise the conversation as one example, or as several if `chat_examples` needs them.

        Args:
            tokenizer: Tokenizer of the model.
            close_thoughts: Whether to begin an answer with an empty thinking block if the
                generation prompt opens a block and the answer has none.

        Raises:
            DataError: The chat template fails or refuses the conversation; or the tokenizer has no
                template and the conversation is not one user and one assistant message.
        """
        if isinstance(tokenizer, PretrainedTokenizer) and tokenizer.chat_template is not None:
            try:
                return chat_examples(
                    tokenizer,
                    self.chat.messages,
                    self.chat.in_loss,
                    self.chat.tools,
                    close_thoughts,
                )
            except ValueError as error:
                raise DataError(f"{self.where}: {error}") from error
        chat = self.chat
        roles = [message["role"] for message in chat.messages]
        extra = {name for message in chat.messages for name in message} - {
            "role",
            "content",
            "name",
        }
        if chat.tools or extra:
            named = ", ".join(sorted(extra)) or "tools"
            raise DataError(
                f"{self.where}: {tokenizer.name} has no chat template that would show {named}: "
                "take them out, or train a model that has a template"
            )
        if roles != ["user", "assistant"]:
            raise DataError(
                f"{self.where}: {tokenizer.name} has no chat template, so a conversation is one "
                f"user and one assistant message, here {', '.join(roles)}: cut it, or train a "
                "model that has a template"
            )
        question, answer = (message["content"] for message in chat.messages)
        return [_plain(tokenizer, question + chat.gap, answer)]


def _plain(tokenizer: Tokenizer, prompt: str, completion: str) -> Example:
    encode = lambda text: tokenizer.encode(text)[0].tolist()  # noqa: E731
    if isinstance(tokenizer, PretrainedTokenizer):
        return text_example(tokenizer.prompt, encode, prompt, completion, tokenizer.stop_ids[0])
    separator = tokenizer.separator
    return text_example(
        lambda text: [separator, *encode(text)], encode, prompt, completion, separator
    )


def conversation_files(path: str) -> tuple[list[Path], str]:
    """Find the files of conversations at a path, in the order in which they are read.

    Args:
        path: Path of a file with any name, or of a folder that is searched for `FILES` at any
            depth and through links; hidden files and folders are left out.

    Returns:
        Paths of the files, and a message that says how many files of the folder are read and which
        are skipped ("" for a single file).

    Raises:
        DataError: The folder has no such file.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        return [root], ""
    passed: Counter[str] = Counter()
    found = walk_files(root, passed)
    is_chat = lambda name: is_records(name) and not name.lower().endswith(".json")  # noqa: E731
    passed.update(suffix_of(name) for name in found if not is_chat(name))
    files = sorted(root / name for name in found if is_chat(name))
    note = files_note(len(files), +passed)
    if not files:
        raise DataError(f"{path} has no file of conversations ({FILES}); {note}")
    return files, note


def read_conversations(path: str) -> Iterator[Conversation]:
    """Yield the conversations of a file, or of all files of a folder in the order of their names.

    Args:
        path: File of records (JSON Lines, an array in a .json file, Parquet, Arrow), or a folder of
            `FILES`, as in `conversation_files`.

    Raises:
        DataError: The folder has no such file, a file cannot be read, or a record is not a
            conversation.
    """
    for file in conversation_files(path)[0]:
        for where, _, fields in read_records(file):
            yield Conversation(where, read_chat(fields, where))

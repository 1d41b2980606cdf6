"""Conversations of JSON Lines files, checked and tokenised.

A line is `{"messages": [{"role": ..., "content": ...}, ...]}` (roles: system, user, assistant,
tool), `{"prompt": ..., "completion": ...}` or `{"question": ..., "answer": ...}`. The first of the
three formats that a line has is used, and its other fields are ignored.

Pretrained tokenizers render a conversation with their own chat template
(`train.data.chat_templates.chat_examples`), in which a prompt and its completion are a user's and
an assistant's message. Without a template a completion directly follows its prompt, an answer
follows its question, or a single user message, after a line break, and the separator ends both.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.data import splits
from train.data.chat_templates import Example, Message, chat_examples, text_example
from train.data.config import DataError
from train.data.json_lines import read_json_lines
from train.data.tokenizers import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
SUFFIXES = (".jsonl", ".jsonl.gz")
_PAIRS = (("prompt", "completion"), ("question", "answer"))
_FORMATS = '"messages", or "prompt" and "completion", or "question" and "answer"'


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


def read_conversations(path: str) -> Iterator[Conversation]:
    """Conversations of a file, or of all files of a folder in the order of their names.

    Args:
        path: JSON Lines file, or a folder of files that end in .jsonl or .jsonl.gz, at any depth;
            hidden files and folders are left out.

    Raises:
        DataError: There is no such file, or a line is no conversation.
    """
    for file in _files(path):
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

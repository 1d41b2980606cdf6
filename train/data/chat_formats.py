"""Convert records of chat data to messages, and refuse fields that would change what is learned.

The formats are:

- `{"messages": [{"role": ..., "content": ...}, ...]}` with the roles system, user, assistant and
  tool; a message may have more fields that chat templates show (`tool_calls`, `reasoning_content`,
  `name`, ...), and `"weight": 0`, `"train": false` or `"loss": false`, each of which leaves the
  message out of the loss;
- ShareGPT: `{"conversations": [{"from": "human", "value": ...}, ...]}`;
- Alpaca: `{"instruction": ..., "input": ..., "output": ...}`, with `system` and `history`;
- `{"prompt": ..., "completion": ...}`, both texts or both lists of messages, and
  `{"question": ..., "answer": ...}`.

If a record has several of these formats, the first in this list is used. The fields `tools` and
`system` may accompany any format. Fields that would change what is learned (`_REFUSED`) are
refused; other fields, such as `id`, are ignored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from train.data.config import DataError

ROLES = ("system", "user", "assistant", "tool")

_PAIRS = (("prompt", "completion"), ("question", "answer"))
_FORMATS = (
    '"messages", or "conversations" (ShareGPT), or "instruction" and "output" (Alpaca), or '
    '"prompt" and "completion", or "question" and "answer"'
)
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "tool_response": "tool",
}
_LOSS = ("weight", "train", "loss")
_REFUSED = (
    "functions", "function_call", "chat_template_kwargs", "chosen", "rejected", "images", "image",
    "videos", "audios", "loss_mask", "label", *_LOSS,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chat:
    """Conversation of a record, in the form that chat templates need.

    Attributes:
        messages: Messages, each with a role of `ROLES` and a text as content; the last message is
            the assistant's.
        in_loss: Whether each message is in the loss; only messages of the assistant can be.
        tools: Tools that the assistant may call, as JSON schemas; empty if there are none.
        gap: Text between question and answer for tokenizers without a chat template.
    """

    messages: Sequence[Mapping[str, Any]]
    in_loss: Sequence[bool]
    tools: Sequence[Any]
    gap: str


def read_chat(record: Mapping[str, Any], where: str) -> Chat:
    """Convert a record in one of the formats to a conversation.

    Args:
        record: Fields of the record.
        where: File and line number, for error messages.

    Raises:
        DataError: The record has none of the formats, a message is invalid, the last message is not
            the assistant's, no message is in the loss, or a field is not supported.
    """
    for name in _REFUSED:
        value = record.get(name)
        of_line = name in (*_LOSS, "label")
        refused = bool(value) and not (of_line and value == 1) or (of_line and value in (0, False))
        if name == "label":  # of a completion: whether it is good; otherwise of a class
            refused = "completion" in record and value in (0, False)
        if refused:
            way_out = "delete the line" if of_line else "take the field out"
            raise DataError(
                f'{where}: the field "{name}" ({_shown(value)}) is not supported, and would change '
                f"what is learned: {way_out}"
            )
    raw, gap = _raw_messages(record, where)
    system = record.get("system") or record.get("system_prompt")
    if system:
        if raw and isinstance(raw[0], dict) and raw[0].get("role") == "system":
            raise DataError(f'{where}: a field "system" and a message of that role: keep one')
        raw = [{"role": "system", "content": system}, *raw]
    checked = [_message(message, number, where) for number, message in enumerate(raw, 1)]
    messages, in_loss = [m for m, _ in checked], [loss for _, loss in checked]
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the last message is from {messages[-1]['role']!r}, and there is nothing to "
            "learn behind the last answer: end with the assistant's"
        )
    if not any(in_loss):
        raise DataError(f"{where}: no message of the assistant is to be learned: delete the line")
    return Chat(messages, in_loss, _tools(record.get("tools"), where), gap)


def _raw_messages(record: Mapping[str, Any], where: str) -> tuple[list[Any], str]:
    """Return the unchecked messages, with known roles renamed as in `ROLES`, and `Chat.gap`."""
    if "messages" in record:
        return _list(record["messages"], "messages", where), "\n"
    if "conversations" in record:
        turns = _list(record["conversations"], "conversations", where)
        return [_sharegpt(turn, number, where) for number, turn in enumerate(turns, 1)], "\n"
    if "instruction" in record and "output" in record:
        return _alpaca(record, where), "\n"
    for question, answer in _PAIRS:
        if question not in record or answer not in record:
            continue
        if isinstance(record[question], list) and isinstance(record[answer], list):
            context = [
                {**message, "weight": 0} if isinstance(message, dict) else message
                for message in record[question]
            ]
            return _list(context + record[answer], answer, where), "\n"
        pair = [
            {"role": role, "content": _text(record[name], f'{where}: "{name}"')}
            for role, name in (("user", question), ("assistant", answer))
        ]
        return pair, "" if question == "prompt" else "\n"
    raise DataError(f"{where} has keys {', '.join(map(repr, record)) or 'none'}: give {_FORMATS}")


def _list(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(f'{where}: "{name}" is no list with a message in it: delete the line')
    return value


def _sharegpt(turn: Any, number: int, where: str) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    role = turn["from"]
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    if role == "function_call":
        raise DataError(
            f'{where}: message {number} is from "function_call": write it as "tool_calls" of an '
            'assistant\'s message, in the form "messages"'
        )
    known = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    return {"role": known, "content": turn.get("value"), **rest}


def _alpaca(record: Mapping[str, Any], where: str) -> list[Any]:
    history = record.get("history") or []
    messages = []
    for turn in _list(history, "history", where) if history else []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise DataError(f'{where}: "history" is no list of [question, answer]')
        messages += [
            {"role": "user", "content": turn[0]},
            {"role": "assistant", "content": turn[1]},
        ]
    question = _text(record["instruction"], f'{where}: "instruction"')
    more = _text(record.get("input") or "", f'{where}: "input"')
    messages.append({"role": "user", "content": "\n".join(filter(None, (question, more)))})
    return [*messages, {"role": "assistant", "content": record["output"]}]


def _message(message: Any, number: int, where: str) -> tuple[dict[str, Any], bool]:
    """Return a message in the form that chat templates need, and whether it is in the loss."""
    if not isinstance(message, dict):
        raise DataError(f'{where}: message {number} is no object with "role" and "content"')
    role = message.get("role")
    if role not in ROLES:
        raise DataError(
            f"{where}: message {number} has role {role!r}: choose from {', '.join(ROLES)}"
        )
    found = {name: value for name, value in message.items() if value is not None}
    what = f"{where}: the content of message {number}"
    content = message.get("content")
    if isinstance(content, list) and content:
        content = _joined(content, what)
    elif content is None and role == "assistant" and found.get("tool_calls"):
        content = ""  # a template that joins texts would print None
    found["content"] = _text(content, what)
    if "tool_calls" in found:
        found["tool_calls"] = _tool_calls(found["tool_calls"], f"{where}: message {number}")
    in_loss = role == "assistant"
    for name in _LOSS:
        value = found.pop(name, True)
        if value not in (0, 1):
            raise DataError(
                f'{where}: the "{name}" of message {number} is {_shown(value)}: give 0 or 1, as '
                "each token counts in full or not at all"
            )
        in_loss &= bool(value)
    for name in ("loss_mask", "mask", "function_call", "images", "image", "audio", "video"):
        if found.get(name):
            raise DataError(
                f'{where}: the field "{name}" of message {number} is not supported, and would '
                "change what is learned: take it out"
            )
    return (_plain(found, where) if found.keys() - {"role", "content"} else found), in_loss


def _joined(parts: list[Any], what: str) -> str:
    texts = [p.get("text") for p in parts if isinstance(p, dict) and p.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{what} is {_shown(parts)}, no text: give a string")
    return "".join(map(str, texts))


def _tool_calls(calls: Any, what: str) -> list[Any]:
    """Parse the arguments of tool calls to objects, which templates write as JSON themselves."""
    if not isinstance(calls, list):
        raise DataError(f'{what}: "tool_calls" is {_shown(calls)}: give a list')
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{what}: a tool call without the name of a function: {_shown(call)}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments or "{}", f"{what}: the arguments of {function['name']}")
        function = {**function, "arguments": arguments}
        found.append({**call, "function": function} if "function" in call else function)
    return found


def _tools(tools: Any, where: str) -> list[Any]:
    if isinstance(tools, str):
        tools = _json(tools or "[]", f'{where}: "tools"')
    if not isinstance(tools or [], list):
        raise DataError(f'{where}: "tools" is {_shown(tools)}: give a list of JSON schemas')
    return _plain(tools or [], where)


def _plain(value: Any, where: str) -> Any:
    """Copy a value as JSON, in which times and decimal numbers of Parquet are texts."""

    def text(of: Any) -> str:
        if isinstance(of, bytes):
            raise DataError(f"{where}: a field holds bytes ({of[:20]!r}), no text: take it out")
        return str(of)

    return json.loads(json.dumps(value, default=text))


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} are not JSON ({error}): repair them") from error


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} is {_shown(value)}, no text: give a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds half a character ({error.reason}): repair it") from error
    return value


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:40]

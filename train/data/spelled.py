"""Special tokens that the texts of a conversation spell out, and which are plain text there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer

_SIGNS = range(0xF0000, 0x10FFFE)  # private-use characters, and two pairs of noncharacters


def without_special_tokens(
    tokenizer: PretrainedTokenizer, messages: Sequence[Mapping[str, Any]], *others: Any
) -> tuple[list[Mapping[str, Any]], dict[str, str]]:
    """Replace special tokens in messages by signs, which a chat template shows as they are.

    The tokens stay in the messages of the assistant, which may be meant to write them.

    Args:
        tokenizer: Tokenizer of the model.
        messages: Messages of a conversation.
        others: Other values that the template shows, to be passed to `with_signs`.

    Returns:
        Messages with one sign for each special token, and a mapping from sign to token, which is
        empty if no message, and none of the others, spells a special token out.
    """
    pattern = _pattern(tokenizer.special_tokens())
    said = [message for message in messages if message.get("role") != "assistant"]
    found = {token for text in _texts([said, *others]) for token in pattern.findall(text)}
    if not found:
        return list(messages), {}
    used = set().union(*map(set, _texts([list(messages), tokenizer.chat_template, *others])))
    signs = iter(chr(code) for code in _SIGNS if chr(code) not in used)
    spelled = dict(zip(signs, sorted(found), strict=False))
    return messages_with_signs(messages, spelled), spelled


def fixed_signs(tokenizer: PretrainedTokenizer) -> dict[str, str]:
    """Map signs to all special tokens, for texts that are rendered before others are known.

    The signs are the last private-use characters of Unicode.
    """
    used = set(tokenizer.chat_template or "")
    signs = iter(chr(code) for code in reversed(_SIGNS) if chr(code) not in used)
    return dict(zip(signs, sorted(tokenizer.special_tokens()), strict=False))


def messages_with_signs(
    messages: Sequence[Mapping[str, Any]], spelled: Mapping[str, str]
) -> list[Mapping[str, Any]]:
    """Replace special tokens by their signs in all messages except for the assistant's.

    Args:
        messages: Messages of a conversation.
        spelled: Mapping from sign to special token.

    Raises:
        ValueError: A message has one of the signs already.
    """
    for text in _texts(list(messages)):
        if own := spelled.keys() & set(text):
            sign = min(own)
            raise ValueError(
                f"a message has the character {sign!r}, which stands for {spelled[sign]} here: "
                "take it out"
            )
    return [
        message if message.get("role") == "assistant" else with_signs(message, spelled)
        for message in messages
    ]


def with_signs(value: Any, spelled: Mapping[str, str]) -> Any:
    """Replace special tokens by their signs in the texts of nested lists and mappings.

    Args:
        value: JSON value, such as the schema of a tool.
        spelled: Mapping from sign to special token.
    """
    pattern, sign_of = _pattern(spelled.values()), {token: sign for sign, token in spelled.items()}

    def replaced(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda token: sign_of[token[0]], value)
        if isinstance(value, Mapping):
            return {replaced(name): replaced(of) for name, of in value.items()}
        return [replaced(of) for of in value] if isinstance(value, list | tuple) else value

    return replaced(value)


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds the longest of the tokens."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _texts(value: Any) -> list[str]:
    """Return all texts in nested lists and mappings, including the names of fields."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return _texts([*value, *value.values()])
    return [text for of in value for text in _texts(of)] if isinstance(value, list | tuple) else []

"""Special tokens that the texts of a conversation spell out, and which are plain text there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
        others: Other values that the template shows.

    Returns:
        Messages with one sign for each special token, and a mapping from sign to token, which is
        empty if no message spells a special token out.
    """
    tokens = sorted(tokenizer.special_tokens(), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
    said = [message for message in messages if message.get("role") != "assistant"]
    found = sorted({token for text in _texts(said) for token in pattern.findall(text)})
    if not found:
        return list(messages), {}
    used = set().union(*map(set, _texts([list(messages), tokenizer.chat_template, *others])))
    signs = iter(chr(code) for code in _SIGNS if chr(code) not in used)
    sign_of = dict(zip(found, signs, strict=False))

    def replaced(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda token: sign_of[token[0]], value)
        if isinstance(value, Mapping):
            return {name: replaced(of) for name, of in value.items()}
        return [replaced(of) for of in value] if isinstance(value, list | tuple) else value

    return [
        message if message.get("role") == "assistant" else replaced(message) for message in messages
    ], {sign: token for token, sign in sign_of.items()}


def _texts(value: Any) -> list[str]:
    """Return all texts in nested lists and mappings, without the names of fields."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping | list | tuple):
        return []
    return [text for of in inner for text in _texts(of)]

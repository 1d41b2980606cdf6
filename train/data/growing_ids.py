"""Token ids of texts that grow, such as the beginnings of a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer


class GrowingIds:
    """Encoder of texts, each of which begins as the last one does.

    The ids are those of `PretrainedTokenizer.rendered`. A tokenizer splits a text at its added
    tokens, and encodes each piece without the others. So only the text from an added token on is
    encoded, which both texts have and behind which they may differ.

    Args:
        tokenizer: Tokenizer of the texts.
        spelled: Signs of the texts for special tokens that are plain text, as in `rendered`.
    """

    def __init__(self, tokenizer: PretrainedTokenizer, spelled: Mapping[str, str]):
        self._tokenizer, self._spelled = tokenizer, spelled
        self._splits = tokenizer.splits()
        self._longest = max(map(len, tokenizer.added_tokens()), default=0)
        self._text, self._ids = "", []
        self._cuts: list[tuple[int, int]] = []  # index of character and of id of added tokens

    def encode(self, text: str) -> list[int]:
        """Encode a text, in time that grows with what is new in it."""
        # A longer added token may begin before the text's end, and is not seen in the shorter text.
        known = _common(self._text, text) - self._longest
        while self._cuts and self._cuts[-1][0] > known:
            self._cuts.pop()
        start, count = self._cuts.pop() if self._cuts else (0, 0)
        new, spans = self._tokenizer.rendered_spans(text[start:], self._spelled)
        for index, (id_, (first, end)) in enumerate(zip(new, spans, strict=True)):
            if id_ in self._splits and text[start + first : start + end] == self._splits[id_]:
                self._cuts.append((start + first, count + index))
        self._text, self._ids = text, self._ids[:count] + new
        return self._ids


def _common(one: str, other: str) -> int:
    """Count the leading characters that two texts have in common."""
    low, high = 0, min(len(one), len(other))
    if other.startswith(one[:high]):
        return high
    while low + 1 < high:  # `one` and `other` are equal up to `low`, and not up to `high`
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low

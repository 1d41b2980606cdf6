"""Text to ids with a tokenizer of the `tokenizers` library: special tokens and bytes of tokens."""

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np


def spelling_tokenizer(tokenizer: Any, control: Collection[str] = ()) -> Any:
    """Copy a tokenizer so that special tokens that a text spells out are encoded as plain text.

    A model may find a special token in its own vocabulary, as a word, as a piece with a high score,
    or by merges. In the copy the special tokens, except for the unknown token, have random names
    there, and no merges.

    Args:
        tokenizer: A `tokenizers.Tokenizer`.
        control: Added tokens that are treated as special whether or not they are marked so.
    """
    fields = json.loads(tokenizer.to_str())
    model, added = fields["model"], fields["added_tokens"]
    for token in added:
        token["special"] |= token["content"] in control
    special = {token["content"] for token in added if token["special"]}
    own = special & tokenizer.get_vocab(with_added_tokens=False).keys()
    if hidden := {token: secrets.token_hex(16) for token in own - {model.get("unk_token")}}:
        fields["added_tokens"] = [token for token in added if token["content"] not in hidden]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {hidden.get(token, token): i for token, i in model["vocab"].items()}
        else:  # a Unigram model has a list of pairs
            model["vocab"] = [[hidden.get(token, token), score] for token, score in model["vocab"]]
        if "merges" in model:
            inner = model.get("continuing_subword_prefix") or ""
            model["merges"] = [
                (left, right)
                for left, right in model["merges"]
                if not {left, right, left + right.removeprefix(inner)} & hidden.keys()
            ]
    copy = type(tokenizer).from_str(json.dumps(fields))
    copy.encode_special_tokens = True
    return copy


def encoded(tokenizer: Any, text: str, name: str, **options: Any) -> Any:
    """Encode a text with a tokenizer of the `tokenizers` library.

    Args:
        tokenizer: A `tokenizers.Tokenizer`.
        text: Text to encode.
        name: Name of the tokenizer in messages.
        options: Options of the tokenizer's method `encode`.

    Returns:
        A `tokenizers.Encoding`, with `ids` and `offsets`.

    Raises:
        ValueError: The text has half of a surrogate pair, such as `"\\ud800"` from JSON or from
            bytes that are not UTF-8, so that it is not Unicode text.
    """
    try:
        return tokenizer.encode(text, **options)
    except TypeError as error:
        wrong = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
        if wrong is None:
            raise
        raise ValueError(
            f"{name} can't encode {wrong!r} after {text.index(wrong)} characters, which is no "
            "Unicode text: convert the text to UTF-8"
        ) from error


def bytes_of_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Count the UTF-8 bytes of each token; the counts `[n]` int32 sum to the bytes of the text.

    Args:
        text: Text that was encoded.
        offsets: Index of the first character of each of the `n` tokens, and index after the token's
            last character.
    """
    if not offsets:
        return np.zeros(0, np.int32)
    # Tokens may share a character (parts of an emoji), and some normalizers move characters; the
    # running maximum counts every byte exactly once all the same.
    ends = np.maximum.accumulate(np.array(offsets, np.int64)[:, 1])
    ends[-1] = len(text)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    width = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    first_byte = np.concatenate([[0], np.cumsum(width)])
    return np.diff(first_byte[ends], prepend=0).astype(np.int32)


class Speller:
    """Encoder of rendered chat templates in which some special tokens are plain text.

    Args:
        tokenizer: A `tokenizers.Tokenizer` that finds special tokens.
        plain: Its `spelling_tokenizer`.
        special: Special tokens by id.
    """

    def __init__(self, tokenizer: Any, plain: Any, special: Mapping[int, str]):
        self._tokenizer, self._special = tokenizer, special
        from tokenizers import AddedToken

        self._plain = type(plain).from_str(plain.to_str())
        self._plain.encode_special_tokens = True
        self._mark = secrets.token_hex(16)
        self._plain.add_tokens([AddedToken(self._mark, normalized=False)])

    def encode(
        self, text: str, spelled: Mapping[str, str], name: str
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode a text with signs that stand for tokens which are plain text.

        Args:
            text: Text in which special tokens are special.
            spelled: Mapping from a sign, one character that the text has for nothing else, to the
                special token that is plain text there.
            name: Name of the tokenizer in messages.

        Returns:
            Ids, and where each token's text begins and ends. Tokens between special tokens have
            the whole of this text if there is a sign in it.
        """
        found = encoded(self._tokenizer, text, name, add_special_tokens=False)
        # An unknown character, such as a sign, has the id of the unknown token, which may be
        # special too. The match of a special token may include the white space around it.
        marks = [
            index
            for index, (id_, (begin, end)) in enumerate(zip(found.ids, found.offsets, strict=True))
            if id_ in self._special and self._special[id_] in text[begin:end]
        ]
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        start = first = 0  # of the tokens behind the last special one: character, and token
        for at in [*marks, len(found.ids)]:
            end = found.offsets[at][0] if at < len(found.ids) else len(text)
            part = text[start:end]
            if spelled.keys() & set(part):
                words = "".join(spelled.get(sign, sign) for sign in part)
                # A text behind a special token is no beginning, where some tokenizers add a space.
                prefix = self._mark if start else ""
                plain = encoded(self._plain, prefix + words, name, add_special_tokens=False)
                new = plain.ids[1 if prefix else 0 :]
                ids += new
                spans += [(start, end)] * len(new)
            else:
                ids += found.ids[first:at]
                spans += found.offsets[first:at]
            if at < len(found.ids):
                ids.append(found.ids[at])
                spans.append(found.offsets[at])
                start, first = found.offsets[at][1], at + 1
        return ids, spans

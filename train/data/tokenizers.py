"""Convert text to token ids and back, with the number of bytes that each token stands for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from thoughtbubbles.encoding import bytes_of_tokens, encoded, spelling_tokenizer
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer, byte_level_bpe
from train.data.config import DataError

SEPARATORS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "[SEP]",
)
"""Special tokens that can separate documents, in order of preference."""

_BYTES_JSON = '{"type": "bytes"}'
_PRETRAINED = "pretrained"  # type of a file that `pretrained_json` made


class Tokenizer(Protocol):
    """A tokenizer of pretraining data."""

    @property
    def name(self) -> str:
        """Name of the tokenizer in messages."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer; tokenizers with the same hash encode every text alike."""
        ...

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary; all ids are below it."""
        ...

    @property
    def separator(self) -> int:
        """Id of the token before every document, which also starts generation without a prompt."""
        ...

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Encode a text as token ids, without special tokens.

        Returns:
            Token ids [n], int32, and the number of UTF-8 bytes that each token stands for [n],
            int32. These numbers sum to the length of the text in bytes, unless n is 0.
        """
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decode token ids to text; separators and negative ids (padding) are skipped.

        Raises:
            DataError: An id is not in the vocabulary.
        """
        ...

    def to_json(self) -> str:
        """Return the content of a file from which `load_tokenizer` loads this tokenizer."""
        ...

    def to_pretrained(self) -> PretrainedTokenizer:
        """Convert to a tokenizer that has the same ids and puts the separator before a prompt."""
        ...


class ByteTokenizer:
    """Tokenizer whose tokens are the bytes of the UTF-8 text; 256 is the separator."""

    name = "bytes"
    vocab_size = 257
    separator = 256

    @property
    def fingerprint(self) -> str:
        return _fingerprint(_BYTES_JSON)

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        return ids, np.ones_like(ids)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(_tokens(ids, self)).decode(errors="replace")

    def to_json(self) -> str:
        return _BYTES_JSON

    def to_pretrained(self) -> PretrainedTokenizer:
        begin = SEPARATORS[0]
        vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
        text = byte_level_bpe(
            {**vocabulary, begin: self.separator}, [], {begin: True}, begin, "gpt-2", self.name
        )
        return PretrainedTokenizer(text, name=self.name, bos=begin, stop_tokens=[begin])


class HuggingFaceTokenizer:
    """Tokenizer of a tokenizer.json file, without the file's templates, padding and truncation.

    Args:
        path: Path of the file.

    Raises:
        DataError: The file cannot be read, is not a tokenizer.json, or has no token of
            `SEPARATORS`.
    """

    def __init__(self, path: str | Path):
        import tokenizers

        self.name = str(path)
        self._json = _read(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self._json)
        except Exception as error:  # the library raises nothing more precise
            raise DataError(
                f"{path} is not a tokenizer.json: {_first_line(error)}; export one with "
                "tokenizer.save(), or train one with python -m train.tokenizer"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab()
        known = [token for token in SEPARATORS if token in vocabulary]
        if not known:
            raise DataError(
                f"{path} has no token to separate documents with: add one of "
                f"{' '.join(SEPARATORS)} to its special tokens"
            )
        self._separator_token = known[0]
        # A document that spells out "<|endoftext|>" is a document, not two.
        self._tokenizer.add_special_tokens([known[0]])
        self._plain = spelling_tokenizer(self._tokenizer)
        self.separator: int = vocabulary[known[0]]
        self.vocab_size: int = max(vocabulary.values()) + 1

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self._json)

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = encoded(self._plain, text, self.name, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        return ids, bytes_of_tokens(text, encoding.offsets)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(_tokens(ids, self), skip_special_tokens=True)

    def to_json(self) -> str:
        return self._json

    def to_pretrained(self) -> PretrainedTokenizer:
        from tokenizers import Tokenizer, processors

        copy = Tokenizer.from_str(self._json)
        copy.no_truncation()
        copy.no_padding()
        begin = self._separator_token
        copy.add_special_tokens([begin])  # else one of the vocabulary would be decoded as text
        copy.post_processor = processors.TemplateProcessing(  # pyright: ignore
            single=[begin, "$A"], special_tokens=[(begin, self.separator)]
        )
        return PretrainedTokenizer(copy.to_str(), name=self.name, bos=begin, stop_tokens=[begin])


def load_tokenizer(spec: str) -> Tokenizer:
    """Load a tokenizer.

    Args:
        spec: Either "bytes", or the path of a tokenizer.json or of a file with the text of
            `Tokenizer.to_json` or `pretrained_json`.

    Raises:
        DataError: The file cannot be read, or does not hold a tokenizer.
    """
    text = _BYTES_JSON if spec == "bytes" else _read(spec)
    if text == _BYTES_JSON:
        return ByteTokenizer()
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = None  # refused below, with the reason
    if not isinstance(fields, dict) or fields.get("type") != _PRETRAINED:
        return HuggingFaceTokenizer(spec)
    try:
        return PretrainedTokenizer(fields["tokenizer"], **fields["options"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{spec} is damaged ({_first_line(error)}): delete its folder") from error


def pretrained_json(tokenizer: PretrainedTokenizer, options: Mapping[str, Any]) -> str:
    """Return the content of a file from which `load_tokenizer` loads a pretrained tokenizer.

    Args:
        tokenizer: Tokenizer of a pretrained model.
        options: Keyword arguments of `PretrainedTokenizer`, without the tokenizer.json.
    """
    stored = {"type": _PRETRAINED, "tokenizer": tokenizer.to_json(), "options": dict(options)}
    return json.dumps(stored)


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies, as in GPT-2."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in shown)
    letters = {byte: chr(byte) for byte in shown}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def _read(path: str | Path) -> str:
    file = Path(path).expanduser()
    try:
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise OSError("no regular file")  # a pipe would wait for ever
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f'cannot read tokenizer {path}: {_first_line(error)}; give "bytes" or the path of a '
            "tokenizer.json"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _fingerprint(json_text: str) -> str:
    canonical = json.dumps(json.loads(json_text), sort_keys=True)
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def _tokens(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> list[int]:
    """Ids without padding and separators."""
    array = np.asarray(ids, np.int64)
    if array.size and array.max() >= tokenizer.vocab_size:
        raise DataError(
            f"token id {array.max()} is outside the vocabulary of {tokenizer.vocab_size}: "
            "decode with the tokenizer that the ids come from"
        )
    return array[(array >= 0) & (array != tokenizer.separator)].tolist()

"""The tokenizer of pretrained weights: text to ids and back, stop tokens, chat template."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SEPARATOR = "<|endoftext|>"

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace("{1,3}", "")
BYTE_LEVEL_KINDS = ("gpt-2", "default", "smollm", "llama-bpe", "qwen2")
"""Pre-tokenizers that are supported, by their names in GGUF metadata."""


class PretrainedTokenizer:
    """A tokenizer of the `tokenizers` library with the special tokens of a model; thread-safe.

    Args:
        text: Content of the tokenizer.json.
        name: Name in messages, such as the file's path.
        bos: Beginning-of-sequence token, for chat templates; None for a model without one.
        stop_tokens: Tokens that end a text, the end-of-sequence token first.
        chat_template: Chat template in Jinja, or None.

    Attributes:
        name: Name in messages.
        chat_template: Chat template in Jinja, or None.
        vocab_size: Size of the vocabulary; all ids are below it.
        bos: Beginning-of-sequence token, or None.
        eos: End-of-sequence token, or None.
        stop_ids: Ids that end a text; the separator if no stop token is given.
        separator: Id in front of each document: the one that the tokenizer itself puts there, else
            that of `<|endoftext|>`, else the first stop id.

    Raises:
        ValueError: The text is no tokenizer.json, or a token is not in its vocabulary.
    """

    def __init__(
        self,
        text: str,
        *,
        name: str = "tokenizer.json",
        bos: str | None = None,
        stop_tokens: Sequence[str] = (),
        chat_template: str | None = None,
    ):
        import tokenizers

        self.name, self.chat_template, self._json = name, chat_template, text
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more precise
            why = (str(error).splitlines() or ["unknown reason"])[0]
            raise ValueError(f"{name} is not a tokenizer.json: {why}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as text
        self._vocabulary = vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        unknown = [token for token in (bos, *stop_tokens) if token and token not in vocabulary]
        if unknown:
            raise ValueError(f"{name} has no token {unknown[0]!r}, which the model's files use")
        self.bos, self.eos = bos, next(iter(stop_tokens), None)
        given = [vocabulary[token] for token in stop_tokens]
        prefix = self._tokenizer.encode("").ids[:1]
        separators = [*prefix, *(vocabulary[t] for t in [SEPARATOR] if t in vocabulary), *given]
        if not separators:
            raise ValueError(f"{name}: no file of the model has an eos_token: add one")
        self.separator: int = separators[0]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(given or separators[:1]))

    @property
    def stop_tokens(self) -> list[str]:
        """The tokens of `stop_ids`."""
        return [token for id_ in self.stop_ids if (token := self._tokenizer.id_to_token(id_))]

    @classmethod
    def from_folder(cls, folder: Path, config: Mapping[str, Any]) -> "PretrainedTokenizer":
        """The tokenizer of a Hugging Face folder.

        Args:
            folder: Folder with tokenizer.json and, optionally, tokenizer_config.json,
                generation_config.json and chat_template.jinja.
            config: Content of the folder's config.json, which may hold bos_token_id and
                eos_token_id.

        Raises:
            ValueError: The folder has no tokenizer.json, or a file in it is damaged.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{folder} has no tokenizer.json: save its fast tokenizer there")
        text = file.read_text(encoding="utf-8")
        options = _optional_json(folder / "tokenizer_config.json")
        generation = _optional_json(folder / "generation_config.json")
        tokens = _tokens_by_id(text, str(file))
        stop_tokens = [_content(options.get("eos_token"))]
        for source in (generation, config):
            found = source.get("eos_token_id")
            ids = found if isinstance(found, list) else [found]
            stop_tokens += [tokens.get(index) for index in ids if index is not None]
        template = folder / "chat_template.jinja"
        return cls(
            text,
            name=str(file),
            bos=_content(options.get("bos_token")) or tokens.get(config.get("bos_token_id")),
            stop_tokens=list(dict.fromkeys(token for token in stop_tokens if token)),
            chat_template=(
                template.read_text(encoding="utf-8")
                if template.is_file()
                else _default_template(options.get("chat_template"))
            ),
        )

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer.json, equal for tokenizers that encode alike."""
        canonical = json.dumps(json.loads(self._json), sort_keys=True)
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a text, int32 `[n]`, and the UTF-8 bytes of each, int32 `[n]`.

        A special token that the text spells out is encoded as plain text. The bytes sum to the
        text's length unless `n` is 0.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32), bytes_of_tokens(text, encoding.offsets)

    def prompt(self, text: str) -> list[int]:
        """Ids of a prompt, with what the tokenizer itself puts in front of a text.

        An empty prompt is the separator alone.
        """
        return self._tokenizer.encode(text).ids or [self.separator]

    def rendered(self, text: str) -> list[int]:
        """Ids of a text that spells out its special tokens, as chat templates do."""
        return self._with_special_tokens.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _with_special_tokens(self) -> Any:
        # A second tokenizer: the flag belongs to the object, and threads share that.
        copy = type(self._tokenizer).from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = False
        return copy

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, without special tokens and negative ids (padding).

        Raises:
            ValueError: An id is not in the vocabulary.
        """
        array = np.asarray(ids, np.int64)
        if array.size and array.max() >= self.vocab_size:
            raise ValueError(
                f"token id {array.max()} is outside the vocabulary of {self.vocab_size}: "
                "decode with the tokenizer that the ids come from"
            )
        return self._tokenizer.decode(array[array >= 0].tolist(), skip_special_tokens=True)

    def id(self, token: str) -> int:
        """The id of a token of the vocabulary; a KeyError for another one."""
        return self._vocabulary[token]

    def to_json(self) -> str:
        """Content of the tokenizer.json."""
        return self._json


def bytes_of_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Number of UTF-8 bytes of each token, int32 `[n]`; they sum to the text's length.

    Args:
        text: Text that was encoded.
        offsets: Index of the first character of each token, and of the one after its last.
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


def byte_level_bpe(
    tokens: Sequence[str],
    merges: Sequence[tuple[str, ...]],
    added: Mapping[str, bool],
    begin: str | None,
    kind: str,
    source: str,
) -> str:
    """The tokenizer.json of a byte-level BPE from its parts, as GGUF metadata lists them.

    Args:
        tokens: Token of each id.
        merges: Pairs of tokens to merge, the earliest merge first.
        added: Tokens that are never split, and whether each is special.
        begin: Token in front of every text, or None.
        kind: Name of the pre-tokenizer, one of `BYTE_LEVEL_KINDS`.
        source: Name of the file in error messages.

    Raises:
        ValueError: The pre-tokenizer is not supported.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    if kind not in BYTE_LEVEL_KINDS:
        known = ", ".join(BYTE_LEVEL_KINDS)
        raise ValueError(
            f"{source}: pre-tokenizer {kind!r} is not one of {known}: load the model's Hugging "
            "Face folder"
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # Llama 3 takes whole words that are tokens, whether merges lead there or not.
    model = models.BPE(vocabulary, list(merges), ignore_merges=kind == "llama-bpe")  # type: ignore
    made = Tokenizer(model)
    words: dict[str, list[Any]] = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "llama-bpe": [pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated")],
        "qwen2": [pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated")],
    }
    cut = words.get(kind, [])
    bytes_only = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=kind not in ("llama-bpe", "qwen2")
    )
    made.pre_tokenizer = pre_tokenizers.Sequence([*cut, bytes_only])
    if kind == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    for token, special in added.items():
        entry = AddedToken(token, normalized=False, special=special)
        made.add_special_tokens([entry]) if special else made.add_tokens([entry])
    if begin is not None:
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])]
        )
    return made.to_str()


def _tokens_by_id(text: str, name: str) -> dict[int | None, str]:
    try:
        parts = json.loads(text)
        found = {entry["id"]: entry["content"] for entry in parts["added_tokens"]}
        vocabulary = parts["model"]["vocab"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} is not a tokenizer.json: copy it again") from error
    if isinstance(vocabulary, dict):  # a Unigram model has a list of pairs
        found |= {index: token for token, index in vocabulary.items() if index not in found}
    return found


def _content(token: Any) -> str | None:
    """A token of tokenizer_config.json, which is a string or an object with one."""
    return token.get("content") if isinstance(token, dict) else token


def _default_template(template: Any) -> str | None:
    if isinstance(template, list):  # several templates, each with a name
        named = {entry.get("name"): entry.get("template") for entry in template}
        return named.get("default")
    return template


def _optional_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: copy it again") from error
    return found if isinstance(found, dict) else {}

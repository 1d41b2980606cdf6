"""The tokenizer of pretrained weights: text to ids and back, end tokens, chat template."""

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
"""Pre-tokenizers that GGUF metadata may name, of those that we know."""


class PretrainedTokenizer:
    """A tokenizer of the `tokenizers` library, with what a model's folder says about its use.

    Args:
        text: the tokenizer.json.
        name: for people, and for errors.
        bos: the token that the model calls its beginning, for chat templates.
        stop_tokens: tokens after which a text is over.
        chat_template: in Jinja, or None.

    Attributes:
        name, chat_template: as given.
        vocab_size: all ids are below it.
        bos, eos: tokens, as templates know them; None where there is none.
        stop_ids: tokens after which a text is over; the separator where no file tells.
        separator: id in front of a document: what the tokenizer itself puts there, or
            `<|endoftext|>`, or the first end.

    Raises:
        ValueError: the text is no tokenizer.json, or a token is not in its vocabulary.
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
        self._vocabulary = vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        unknown = [token for token in (bos, *stop_tokens) if token and token not in vocabulary]
        if unknown:
            raise ValueError(f"{name} has no token {unknown[0]!r}, which the model's files name")
        self.bos, self.eos = bos, next(iter(stop_tokens), None)
        given = [vocabulary[token] for token in stop_tokens]
        before = self._tokenizer.encode("").ids[:1]
        separators = [*before, *(vocabulary[t] for t in [SEPARATOR] if t in vocabulary), *given]
        if not separators:
            raise ValueError(f"{name}: no file of the model names its end token (eos_token)")
        self.separator: int = separators[0]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(given or separators[:1]))

    @property
    def stop_tokens(self) -> list[str]:
        """`stop_ids` as the vocabulary spells them."""
        return [token for id_ in self.stop_ids if (token := self._tokenizer.id_to_token(id_))]

    @classmethod
    def from_folder(cls, folder: Path, config: Mapping[str, Any]) -> "PretrainedTokenizer":
        """From `tokenizer.json` and the files beside it.

        Args:
            folder: Hugging Face's.
            config: its config.json, which may name ids of begin and end.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{folder} has no tokenizer.json: save its fast tokenizer there")
        text = file.read_text(encoding="utf-8")
        told = _optional_json(folder / "tokenizer_config.json")
        generation = _optional_json(folder / "generation_config.json")
        tokens = _tokens_by_id(text, str(file))
        stop_tokens = [_content(told.get("eos_token"))]
        for source in (generation, config):
            found = source.get("eos_token_id")
            ids = found if isinstance(found, list) else [found]
            stop_tokens += [tokens.get(index) for index in ids if index is not None]
        template = folder / "chat_template.jinja"
        return cls(
            text,
            name=str(file),
            bos=_content(told.get("bos_token")) or tokens.get(config.get("bos_token_id")),
            stop_tokens=list(dict.fromkeys(token for token in stop_tokens if token)),
            chat_template=(
                template.read_text(encoding="utf-8")
                if template.is_file()
                else _default_template(told.get("chat_template"))
            ),
        )

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that encode alike."""
        canonical = json.dumps(json.loads(self._json), sort_keys=True)
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [n], bytes int32 [n]): ids of the text, no special ones among them, and the
        UTF-8 bytes that each stands for. The bytes sum to the length of the text unless n is 0."""
        self._tokenizer.encode_special_tokens = True
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32), bytes_of_tokens(text, encoding.offsets)

    def prompt(self, text: str) -> list[int]:
        """Ids of a text to be continued, behind what the tokenizer itself puts in front of one.

        An empty text is the separator alone.
        """
        self._tokenizer.encode_special_tokens = True
        return self._tokenizer.encode(text).ids or [self.separator]

    def rendered(self, text: str) -> list[int]:
        """Ids of a text that spells out its special tokens, as chat templates do."""
        self._tokenizer.encode_special_tokens = False
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; special tokens and negative ids (padding) stand for nothing.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        array = np.asarray(ids, np.int64)
        if array.size and array.max() >= self.vocab_size:
            raise ValueError(
                f"token id {array.max()} is outside the vocabulary of {self.vocab_size}: "
                "decode with the tokenizer that the ids come from"
            )
        return self._tokenizer.decode(array[array >= 0].tolist(), skip_special_tokens=True)

    def id(self, token: str) -> int:
        """The id of a token of the vocabulary."""
        return self._vocabulary[token]

    def to_json(self) -> str:
        """The tokenizer.json."""
        return self._json


def bytes_of_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """UTF-8 bytes that each token stands for, int32 `[n]`; they sum to the text's.

    Args:
        text: what was encoded.
        offsets: the first character and the one after the last of each token.
    """
    if not offsets:
        return np.zeros(0, np.int32)
    # Several tokens may share a character (a part each of an emoji), and some normalizers move
    # characters; the furthest character so far counts every byte exactly once all the same.
    ends = np.maximum.accumulate(np.array(offsets, np.int64)[:, 1])
    ends[-1] = len(text)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    width = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    places = np.concatenate([[0], np.cumsum(width)])
    return np.diff(places[ends], prepend=0).astype(np.int32)


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
        tokens: by id.
        merges: pairs, the earliest first.
        added: tokens that are never split, and whether they are special.
        begin: token in front of every text, or None.
        kind: how text is cut into words, one of `BYTE_LEVEL_KINDS`.
        source: names the file in errors.
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
    """A token of tokenizer_config.json: text, or an object that has it."""
    return token.get("content") if isinstance(token, dict) else token


def _default_template(template: Any) -> str | None:
    if isinstance(template, list):  # several, named
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

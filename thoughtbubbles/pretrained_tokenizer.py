"""The tokenizer of a pretrained model: text to ids and back, stop tokens, chat template."""

import functools
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from thoughtbubbles.encoding import Speller, bytes_of_tokens, encoded, spelling_tokenizer
from thoughtbubbles.fields import Fields, parse_object, read_json, read_text, shown

SEPARATOR = "<|endoftext|>"

_TEXT = 2**32 - 1  # stands for a text among the special tokens around it

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace("{1,3}", "")
BYTE_LEVEL_KINDS = ("gpt-2", "default", "smollm", "llama-bpe", "qwen2")
"""Names, in GGUF metadata, of the supported pre-tokenizers."""


class PretrainedTokenizer:
    """A tokenizer of the `tokenizers` library with the special tokens of a model; thread-safe.

    Args:
        text: Content of the tokenizer.json.
        name: Name of the tokenizer in messages, such as the file's path.
        bos: Beginning-of-sequence (BOS) token, for chat templates; None for a model without BOS.
        stop_tokens: Tokens that end a text, with the end-of-sequence (EOS) token first.
        chat_template: Chat template in Jinja, or None.
        embedding_rows: Number of rows of the embedding; None means one row for each id. Added
            tokens whose ids have no row can be neither encoded nor generated; a warning names such
            special tokens.

    Attributes:
        name: Name of the tokenizer in messages.
        chat_template: Chat template in Jinja, or None.
        vocab_size: Size of the vocabulary, at most `embedding_rows`; usable ids are smaller.
        embedding_rows: Number of rows of the embedding, or None.
        bos: BOS token, or None.
        eos: EOS token: the first stop token that has a row in the embedding, or None.
        stop_ids: Ids that end a text; the separator's id if no stop token is usable.
        separator: Id of the token in front of each document: the first special token that the
            tokenizer adds before a text, else `<|endoftext|>`, else the first stop token.

    Raises:
        ValueError: The text is not a tokenizer.json, `bos` or a stop token is not in its
            vocabulary, no token can be the separator, or a token that is not an added token has no
            row in the embedding.
    """

    def __init__(
        self,
        text: str,
        *,
        name: str = "tokenizer.json",
        bos: str | None = None,
        stop_tokens: Sequence[str] = (),
        chat_template: str | None = None,
        embedding_rows: int | None = None,
    ):
        import tokenizers

        self.name, self.chat_template, self._json = name, chat_template, text
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more precise
            why = (str(error).splitlines() or ["unknown reason"])[0][:200]
            raise ValueError(f"{name} is not a tokenizer.json: {why}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._vocabulary = vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.embedding_rows = embedding_rows
        if embedding_rows is not None and self.vocab_size > embedding_rows:
            own = self._tokenizer.get_vocab(with_added_tokens=False)
            added = self._tokenizer.get_added_tokens_decoder()
            if any(id_ >= embedding_rows and id_ not in added for id_ in own.values()):
                raise ValueError(
                    f"{name}: the tokenizer has {self.vocab_size} ids, the embedding "
                    f"{embedding_rows} rows: they belong to different models"
                )
            self.vocab_size = embedding_rows
        unknown = [token for token in (bos, *stop_tokens) if token and token not in vocabulary]
        if unknown:
            line = f"{name} has no token {shown(unknown[0])}, which the model's files use"
            raise ValueError(line)
        prefix = [self._tokenizer.id_to_token(id_) for id_ in self._tokenizer.encode("").ids]
        special = [token for token in (bos, *stop_tokens, *prefix) if token]
        above = [t for t in dict.fromkeys(special) if vocabulary[t] >= self.vocab_size]
        if above:
            names = ", ".join(f"{shown(token)} (id {vocabulary[token]})" for token in above[:3])
            more = f" and {len(above) - 3} more" if len(above) > 3 else ""
            warnings.warn(
                f"{name}: special tokens above the {self.vocab_size} rows of the embedding are "
                f"passed over: {names}{more}",
                stacklevel=2,
            )
        self.bos = None if bos in above else bos
        known = [token for token in stop_tokens if token not in above]
        self.eos = next(iter(known), None)
        self._control = {token for token in (self.bos, *known) if token}
        # Special tokens that the tokenizer adds around a text are added all, or none of them.
        self._wraps = not set(prefix) & set(above)
        blank = self._tokenizer.encode("", add_special_tokens=False)
        blank.pad(1, pad_id=_TEXT)  # not a letter, because the vocabulary may have none
        around = self._tokenizer.post_process(blank).ids
        self._behind = around[::-1].index(_TEXT) if _TEXT in around else 0
        separators = [*(prefix[:1] if self._wraps else []), SEPARATOR, *known]
        ids = [vocabulary[token] for token in separators if token in vocabulary]
        ids = [id_ for id_ in ids if id_ < self.vocab_size]
        if not ids:
            raise ValueError(f"{name}: no file of the model has an eos_token: add one")
        self.separator: int = ids[0]
        self.stop_ids: tuple[int, ...] = tuple(
            dict.fromkeys([vocabulary[token] for token in known] or ids[:1])
        )

    @property
    def stop_tokens(self) -> list[str]:
        """Tokens whose ids are `stop_ids`."""
        return [token for id_ in self.stop_ids if (token := self._tokenizer.id_to_token(id_))]

    @classmethod
    def from_folder(
        cls, folder: Path, config: Mapping[str, Any], embedding_rows: int | None = None
    ) -> "PretrainedTokenizer":
        """Load the tokenizer of a Hugging Face folder.

        Args:
            folder: Folder with tokenizer.json and, optionally, tokenizer_config.json,
                special_tokens_map.json, generation_config.json and chat_template.jinja.
            config: Content of the folder's config.json, which may hold bos_token_id and
                eos_token_id.
            embedding_rows: Number of rows of the embedding; None means one row for each id.

        Raises:
            ValueError: The folder has no tokenizer.json, a file in it is damaged, or the tokenizer
                does not fit the special tokens or the embedding.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{folder} has no tokenizer.json: save its fast tokenizer there")
        text = read_text(file)
        options, special, generation = (
            _optional_fields(folder / f"{stem}.json")
            for stem in ("tokenizer_config", "special_tokens_map", "generation_config")
        )
        model = Fields(config, str(folder / "config.json"))
        tokens = _tokens_by_id(text, str(file))
        stop_tokens = [options.token("eos_token") or special.token("eos_token")]
        for source in (generation, model):
            for index in source.ids("eos_token_id"):
                stop_tokens.append(tokens.get(index))
                if index not in tokens:
                    line = f"{folder}: eos_token_id={index} names no token and is passed over"
                    warnings.warn(line, stacklevel=2)
        first = next(iter(model.ids("bos_token_id")), None)
        bos = options.token("bos_token") or special.token("bos_token") or tokens.get(first)
        template = folder / "chat_template.jinja"
        return cls(
            text,
            name=str(file),
            bos=bos,
            stop_tokens=list(dict.fromkeys(token for token in stop_tokens if token)),
            chat_template=(
                read_text(template) if template.is_file() else _default_template(options)
            ),
            embedding_rows=embedding_rows,
        )

    @property
    def fingerprint(self) -> str:
        """Hash of the content of the tokenizer.json, which does not depend on the order of keys."""
        canonical = json.dumps(json.loads(self._json), sort_keys=True)
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Encode a text to `n` ids.

        A special token that the text spells out is encoded as plain text, or as the unknown token
        if the vocabulary has no other tokens for it.

        Returns:
            Ids `[n]` int32, and number of UTF-8 bytes of each token `[n]` int32. Unless `n` is 0,
            these numbers sum to the number of bytes of the text.
        """
        encoding = self._encoded(self._plain, text, add_special_tokens=False)
        return np.array(self._known(encoding.ids), np.int32), bytes_of_tokens(
            text, encoding.offsets
        )

    def prompt(self, text: str) -> list[int]:
        """Encode a prompt to ids, with the special tokens that the tokenizer adds before a text.

        Those that it adds behind a text, such as EOS, are left out: they would end the text that is
        to be continued. A prompt without any ids becomes the separator alone.
        """
        ids = self._encoded(self._plain, text, add_special_tokens=self._wraps).ids
        if self._wraps:
            ids = ids[: len(ids) - self._behind]
        return self._known(ids) or [self.separator]

    def rendered(self, text: str, spelled: Mapping[str, str] = MappingProxyType({})) -> list[int]:
        """Encode a text, such as a rendered chat template, whose special tokens are spelled out.

        Args:
            text: Text to encode.
            spelled: Mapping from a sign, one character that the text has for nothing else, to the
                special token that is plain text there.
        """
        return self.rendered_spans(text, spelled)[0]

    def rendered_spans(
        self, text: str, spelled: Mapping[str, str] = MappingProxyType({})
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode a text as `rendered`; also return where each token's text begins and ends."""
        if spelled:
            ids, spans = self._speller.encode(text, spelled, self.name)
            return self._known(ids), spans
        encoding = self._encoded(self._tokenizer, text, add_special_tokens=False)
        return self._known(encoding.ids), encoding.offsets

    def special_tokens(self) -> list[str]:
        """Return the added tokens that are special: those marked so, BOS and stop tokens."""
        found = self._tokenizer.get_added_tokens_decoder().values()
        return [t.content for t in found if t.special or t.content in self._control]

    def added_tokens(self) -> list[str]:
        """Return the added tokens, which are found in a text before it is split into words."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    def splits(self) -> dict[int, str]:
        """Map id to text for the added tokens that are found whatever is around them."""
        found = self._tokenizer.get_added_tokens_decoder().items()
        return {
            id_: token.content
            for id_, token in found
            if not (token.normalized or token.single_word)
        }

    def _encoded(self, tokenizer: Any, text: str, **options: Any) -> Any:
        return encoded(tokenizer, text, self.name, **options)

    def _known(self, ids: list[int]) -> list[int]:
        if self.embedding_rows is not None and max(ids, default=0) >= self.embedding_rows:
            token = self._tokenizer.id_to_token(max(ids))
            raise ValueError(
                f"{self.name}: token {token!r} has id {max(ids)}, the embedding "
                f"{self.embedding_rows} rows: the model can't read it, leave it out"
            )
        return ids

    @functools.cached_property
    def _plain(self) -> Any:
        return spelling_tokenizer(self._tokenizer, self._control)

    @functools.cached_property
    def _speller(self) -> Speller:
        special = {self._vocabulary[token]: token for token in self.special_tokens()}
        return Speller(self._tokenizer, self._plain, special)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decode ids to text, leaving out special tokens and negative ids (padding).

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
        """Return the id of a token; raise a KeyError if it is not in the vocabulary."""
        return self._vocabulary[token]

    def to_json(self) -> str:
        """Return the content of the tokenizer.json."""
        return self._json

    def to_pretrained(self) -> "PretrainedTokenizer":
        """Return this tokenizer itself, as `AnyTokenizer` requires."""
        return self


def byte_level_bpe(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, ...]],
    added: Mapping[str, bool],
    begin: str | None,
    kind: str,
    source: str,
) -> str:
    """Build the tokenizer.json of a byte-level BPE from its parts, as GGUF metadata lists them.

    Args:
        vocabulary: Id of each token.
        merges: Pairs of tokens to merge, in order of priority.
        added: Mapping from added token, which is never split, to whether the token is special.
        begin: Token that the tokenizer adds in front of every text, or None.
        kind: Name of the pre-tokenizer, one of `BYTE_LEVEL_KINDS`.
        source: Name of the file in error messages.

    Raises:
        ValueError: The pre-tokenizer is not supported, or a merge or `begin` names a token that is
            missing.
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
    if begin is not None and begin not in vocabulary:
        raise ValueError(f"{source}: bos {shown(begin)} is a padding token: convert it anew")
    for pair in merges:
        missing = [part for part in (*pair, "".join(pair)) if part not in vocabulary]
        if len(pair) != 2 or missing:
            why = f"names {shown(missing[0])}, no token" if missing else "is no pair"
            raise ValueError(f"{source}: merge {shown(' '.join(pair))} {why}: convert it anew")
    # Llama 3 encodes a word that is a token as this token, even if no merges produce it.
    model = models.BPE(dict(vocabulary), list(merges), ignore_merges=kind == "llama-bpe")  # type: ignore
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
    parts = Fields(parse_object(text, name), name, "it is not a tokenizer.json")
    added = [Fields(entry, f"{name}: added_tokens") for entry in parts.list("added_tokens", dict)]
    found = {entry.integer("id", least=0): entry.text("content") for entry in added}
    vocabulary = parts.object("model").raw("vocab")
    if isinstance(vocabulary, dict):  # a Unigram model has a list of pairs
        wrong = [t for t, index in vocabulary.items() if type(index) is not int or index < 0]
        if wrong:
            Fields(vocabulary, f"{name}: vocab").integer(wrong[0], least=0)
        found |= {index: token for token, index in vocabulary.items() if index not in found}
    return found


def _default_template(options: Fields) -> str | None:
    if not isinstance(options.raw("chat_template"), list):
        return options.text("chat_template", None) or None
    for entry in options.list("chat_template", dict):  # several templates, each with a name
        if entry.get("name") == "default":
            return Fields(entry, "chat_template of tokenizer_config.json").text("template", None)
    return None


def _optional_fields(path: Path) -> Fields:
    return Fields(read_json(path) if path.is_file() else {}, str(path))

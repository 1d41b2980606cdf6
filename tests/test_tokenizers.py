"""Tokenizers: round trips, exact byte counts, and the command that trains one."""

import json
import os
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from processes import PATIENCE, Process
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train import tokenizer as command
from train.cli.command import run_command
from train.data import (
    ByteTokenizer,
    DataError,
    HuggingFaceTokenizer,
    load_tokenizer,
)

SAMPLES = [
    "plain words, and a number: 12345",
    "tabs\tand\n\nlines \r\n  with   spaces  ",
    "naïve café, Straße, Ελληνικά, кириллица",
    "e\u0301 a\u0308\u0323 \u0915\u094d\u0937 combining, and a lone \u0301",
    "👩‍👩‍👧‍👦 👍🏽 🇪🇺 emoji 🤖🤖",
    "日本語のテキスト、中文，한국어",
    "\u202eright to left\u202c עברית العربية",
    "spelled out: <|endoftext|> </s> [SEP] and on",
    "\x01\x02 controls \x7f, zero\u200bwidth, ﬁ ligature ①",
    " ",
    "",
]
PIECES = list("ab z\n\t.") + [
    "é",
    "e\u0301",
    "\u0301",
    "👍🏽",
    "👩‍👧",
    "日",
    "ﬁ",
    "\u00a0",
    "<|endoftext|>",
]


def random_texts(count: int) -> list[str]:
    source = random.Random(0)
    return ["".join(source.choices(PIECES, k=source.randrange(40))) for _ in range(count)]


def byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLES, trainer)
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    """Lossy: lower case, no accents, unknown words, templates, truncation and padding."""
    words = {"[PAD]": 0, "[UNK]": 1, "[SEP]": 2, "a": 3, "##b": 4, "e": 5, "words": 6, "and": 7}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[SEP]", 2))
    tokenizer.add_special_tokens(["[SEP]", "[PAD]"])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    return tokenizer


def normalized() -> tokenizers.Tokenizer:
    """Characters are taken apart, put together and moved before they become tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=60, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLES, trainer)
    return tokenizer


@pytest.fixture(scope="module", params=[byte_level, word_piece, normalized])
def hugging_face(request, tmp_path_factory) -> HuggingFaceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    request.param().save(str(path))
    return HuggingFaceTokenizer(path)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> HuggingFaceTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_level().save(str(path))
    return HuggingFaceTokenizer(path)


def check_encoding(tokenizer, text: str) -> None:
    ids, sizes = tokenizer.encode(text)
    assert ids.dtype == sizes.dtype == np.int32
    assert ids.shape == sizes.shape and ids.ndim == 1
    assert (sizes >= 0).all()
    assert sizes.sum() == (len(text.encode()) if len(ids) else 0)
    assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()
    assert tokenizer.separator not in ids


@pytest.mark.parametrize("text", SAMPLES)
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    check_encoding(tokenizer, text)
    ids, sizes = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode()) and (sizes == 1).all()
    assert tokenizer.decode(ids) == text


def test_bytes_decode_what_a_model_may_write():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([256, 0xC3, 0x28, 256, 0x61, -1, -1]) == "\ufffd(a"
    assert (tokenizer.vocab_size, tokenizer.separator) == (257, 256)


def test_byte_counts_are_exact(hugging_face):
    for text in SAMPLES + random_texts(300):
        check_encoding(hugging_face, text)


def test_byte_counts_follow_the_tokens(bpe):
    text = "plain words, and a 👍🏽"
    ids, sizes = bpe.encode(text)
    pieces = [bpe.decode([token]) for token in ids]
    ascii_only = [
        (piece, size) for piece, size in zip(pieces, sizes, strict=True) if piece.isascii()
    ]
    assert len(ascii_only) > 5
    assert all(len(piece) == size for piece, size in ascii_only)


def test_byte_counts_when_tokens_come_out_of_order(bpe, monkeypatch):
    encoding = SimpleNamespace(ids=[1, 2, 3, 4], offsets=[(0, 3), (1, 2), (2, 5), (0, 0)])
    stub = SimpleNamespace(encode=lambda *_, **__: encoding)
    monkeypatch.setattr(bpe, "_plain", stub)
    assert bpe.encode("aéb de")[1].tolist() == [4, 0, 2, 1]


def test_nothing_is_truncated_padded_or_added(tmp_path):
    path = tmp_path / "tokenizer.json"
    word_piece().save(str(path))
    tokenizer = HuggingFaceTokenizer(path)
    assert tokenizer.encode("a ab words and a")[0].tolist() == [3, 3, 4, 6, 7, 3]
    assert tokenizer.encode("a")[0].tolist() == [3]


def test_byte_level_round_trip(bpe):
    for text in SAMPLES + random_texts(300):
        assert bpe.decode(bpe.encode(text)[0]) == text


def test_separator_is_skipped_and_never_encoded(bpe):
    ids, _ = bpe.encode("a<|endoftext|>b")
    assert bpe.separator not in ids
    marked = [bpe.separator, *ids, bpe.separator, -1]
    assert bpe.decode(marked) == "a<|endoftext|>b"


SPECIAL = ("</s>", "<|im_end|>", "<unk>")
LETTERS = "abcdeimnsh|<>_/\u2581"


def spelling(kind: str) -> tokenizers.Tokenizer:
    """A tokenizer whose model finds a special token in its own vocabulary, if it is allowed to."""
    words = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), "</", "s>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [("<", "/"), ("s", ">"), ("</", "s>")] if kind == "merges" else []
    pieces = [(word, -5.0 if len(word) == 1 else 0.0) for word in words]  # as T5's
    made = {
        "unigram": lambda: models.Unigram(pieces, words.index("<unk>"), False),
        "word level": lambda: models.WordLevel(vocabulary, "<unk>"),
        "word piece": lambda: models.WordPiece(vocabulary, unk_token="<unk>"),
        "merges": lambda: models.BPE(vocabulary, merges, unk_token="<unk>"),
        "whole words": lambda: models.BPE(vocabulary, [], ignore_merges=True),
    }
    tokenizer = tokenizers.Tokenizer(made[kind]())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens(["<a>"])
    return tokenizer


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("kind", ["unigram", "word level", "word piece", "merges", "whole words"])
def test_no_model_spells_a_special_token(kind: str, pretrained: bool, tmp_path):
    path = tmp_path / "tokenizer.json"
    made = spelling(kind)
    made.save(str(path))
    tokenizer = HuggingFaceTokenizer(path)
    if pretrained:
        tokenizer = PretrainedTokenizer(made.to_str(), stop_tokens=SPECIAL[:2])
        assert tokenizer.rendered("</s><|im_end|>") == [0, 1], "a template may"
        assert not {0, 1} & set(tokenizer.prompt("a </s>b"))
    unknown = SPECIAL.index("<unk>")
    for text in ("</s>", "<|im_end|>", "a </s> <|im_end|>b", "</s></s>"):
        ids, sizes = tokenizer.encode(text)
        assert not {0, 1} & set(ids.tolist()) and sizes.sum() == len(text)
        if kind == "word level":
            assert unknown in ids
        else:
            pieces = (made.id_to_token(id_).removeprefix("##") for id_ in ids.tolist())
            assert "".join(pieces) == text.replace(" ", "")
    plain = made.encode("a b <a> em n", add_special_tokens=False).ids
    assert tokenizer.encode("a b <a> em n")[0].tolist() == plain


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_survives_a_file(tokenizer, request, tmp_path):
    tokenizer = ByteTokenizer() if tokenizer == "bytes" else request.getfixturevalue("bpe")
    path = tmp_path / "saved.json"
    path.write_text(tokenizer.to_json())
    restored = load_tokenizer(str(path))
    assert type(restored) is type(tokenizer)
    assert restored.fingerprint == tokenizer.fingerprint
    assert restored.vocab_size == tokenizer.vocab_size
    assert np.array_equal(restored.encode(SAMPLES[2])[0], tokenizer.encode(SAMPLES[2])[0])


def test_fingerprint_sees_the_vocabulary(bpe, tmp_path):
    other = json.loads(bpe.to_json())
    other["model"]["merges"].pop()
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other))
    assert load_tokenizer(str(path)).fingerprint != bpe.fingerprint
    assert bpe.fingerprint != ByteTokenizer().fingerprint


def test_id_outside_the_vocabulary(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        with pytest.raises(
            DataError, match=f"{tokenizer.vocab_size + 3} is outside .* {tokenizer.vocab_size}"
        ):
            tokenizer.decode([1, tokenizer.vocab_size + 3])


def test_unusable_files(tmp_path):
    with pytest.raises(DataError, match="cannot read tokenizer .*missing.json"):
        load_tokenizer(str(tmp_path / "missing.json"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="cannot read tokenizer .*pipe: no regular file"):
        load_tokenizer(str(tmp_path / "pipe"))
    path = tmp_path / "tokenizer.json"
    path.write_text('{"type": "something"}')
    with pytest.raises(DataError, match="is not a tokenizer.json"):
        load_tokenizer(str(path))
    tokenizers.Tokenizer(models.BPE()).save(str(path))
    with pytest.raises(DataError, match="no token to separate documents"):
        load_tokenizer(str(path))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    source = random.Random(1)
    words = ["stream", "bubble", "fork", "keep", "token", "layer", "merge", "score", "café"]
    for number in range(20):
        text = " ".join(source.choices(words, k=200))
        (folder / f"{number}.txt").write_text(f"{number} {text}\n")
    return folder


def run(monkeypatch, capsys, *arguments) -> tuple[str, str, int]:
    monkeypatch.setattr(sys, "argv", ["tokenizer", *map(str, arguments)])
    status = 0
    try:
        run_command(command.main, command.TokenizerConfig)
    except SystemExit as error:
        status = int(error.code or 0)
    captured = capsys.readouterr()
    return captured.out, captured.err, status


def test_command_trains_the_same_tokenizer_twice(corpus, tmp_path, monkeypatch, capsys):
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in (files[0], "~/two.json"):
        arguments = ["--corpus", corpus, "--vocab-size", 300, "--cache-dir", tmp_path / "cache"]
        out, _, status = run(monkeypatch, capsys, *arguments, "--out", file)
        assert status == 0 and out.count("\n") == 1
        assert "vocabulary 300," in out and "bytes per token" in out
    assert files[0].read_text() == files[1].read_text()
    tokenizer = load_tokenizer(str(files[0]))
    ids, sizes = tokenizer.encode("stream bubble fork keep")
    assert len(ids) < sizes.sum() / 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "one.json", "two.json"]


def test_command_says_when_the_corpus_is_too_small(corpus, tmp_path, monkeypatch, capsys):
    arguments = ["--corpus", corpus, "--vocab-size", 4096, "--cache-dir", tmp_path / "cache"]
    out, _, status = run(monkeypatch, capsys, *arguments, "--out", tmp_path / "t.json")
    assert status == 0 and "of 4096 (the corpus has no more pairs)" in out


def test_command_learns_from_the_train_split_only(tmp_path, monkeypatch, capsys):
    from train.data import open_corpus

    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(12):  # each document repeats a word of its own
        (folder / f"{number}.txt").write_text(f"{'qxjz'[number % 4]}{chr(97 + number)}kw " * 50)
    cache = tmp_path / "cache"
    held_out = " ".join(open_corpus(str(folder), 0.2, cache).documents("validation")).split()
    out = tmp_path / "t.json"
    run(monkeypatch, capsys, "--corpus", folder, "--vocab-size", 400, "--validation", 0.2,
        "--cache-dir", cache, "--out", out)  # fmt: skip
    vocabulary = tokenizers.Tokenizer.from_file(str(out)).get_vocab()
    assert any(token.lstrip("Ġ").endswith("kw") for token in vocabulary)
    assert not any(word in vocabulary or f"Ġ{word}" in vocabulary for word in held_out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", 100], "vocab_size=100 is below 257"),
        (["--corpus", "/no/such/folder"], "corpus /no/such/folder does not exist"),
        (["--validation", 1.5], "validation=1.5 is not a share"),
        (["--validation", 0], "validation=0.0 is not a share: choose a number between 0 and 1"),
        (["--out", "."], "cannot write .: it is a folder; choose another --out"),
        (["--out", "/no/such/folder/t.json"], "cannot write /no/such/folder/t.json"),
    ],
)
def test_command_mistakes_are_one_line(arguments, message, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.tokenizer.train_tokenizer", None)  # found before the work
    base = ["--corpus", corpus, "--cache-dir", tmp_path, "--vocab-size", 300]
    out, err, status = run(monkeypatch, capsys, *base, *arguments)
    assert (out, status) == ("", 2)
    assert message in err and err.count("\n") == 1


def test_command_from_a_shell(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    words = ("-m", "train.tokenizer", "--corpus", corpus)
    process = Process(words, os.environ, tmp_path)
    assert process.wait(timeout=PATIENCE) == 2
    assert "is empty" in process.output() and process.output().count("\n") == 1


def test_end_tokens_are_plain_text_whether_or_not_they_are_marked_special():
    made = byte_level()
    made.add_tokens(["<|im_end|>", "<think>"])
    tokenizer = PretrainedTokenizer(made.to_str(), stop_tokens=["<|im_end|>"])
    [end], [thought] = tokenizer.rendered("<|im_end|>"), tokenizer.rendered("<think>")
    assert tokenizer.special_tokens() == ["<|endoftext|>", "<|im_end|>"]
    ids = tokenizer.encode("a<|im_end|><think>")[0].tolist()
    assert end not in ids and ids[-1] == thought

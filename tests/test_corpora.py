"""Corpora: what belongs to one, on which side each document stands, TFDS names, bad files."""

import dataclasses
import errno
import gzip
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from contracts import example

from train.data import (
    SOURCES,
    DataConfig,
    DataError,
    SplitCorpus,
    TrainReader,
    open_corpus,
    prepare,
)
from train.data.sources import Files, StandardLibrary, Tfds, source_from_text
from train.data.splits import digest, divide, document_digest, held_out
from train.data.streams import file_text
from train.data.text import SECTION, is_text, sections
from train.data.text_files import standard_library, walk_files
from train.data.tfds_names import quiet

SHARE = 0.2
WORDS = ["stream", "bubble", "fork", "keep", "token", "café", "流れ", "👍🏽"]


def some_text(source: random.Random, words: int = 40) -> str:
    return " ".join(source.choices(WORDS, k=words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """26 documents, some twice, among files that don't belong to a corpus."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "deep" / "er").mkdir(parents=True)
    source = random.Random(0)
    for number in range(24):
        place = root / "deep" / "er" if number % 3 else root
        (place / f"{number}.txt").write_text(f"document {number}: {some_text(source)}\n")
    (root / "packed.md.gz").write_bytes(gzip.compress(b"# packed\nin a *gzip* file"))
    shutil.copy(root / "0.txt", root / "copy of 0.rst")
    shutil.copy(root / "0.txt", root / "deep" / "zero.txt")
    (root / "empty.txt").write_text(" \n")
    (root / "picture.png").write_bytes(b"\x89PNG\0")
    (root / "page.html").write_text("<p>made from page.md</p>")
    (root / ".hidden.txt").write_text("hidden")
    (root / "link.txt").symlink_to("nowhere")
    with open(os.fsencode(root) + b"/caf\xe9.txt", "w") as file:  # a name that isn't UTF-8
        file.write("a name of another age")
    return root


@pytest.fixture(scope="module")
def corpus(folder, tmp_path_factory):
    return open_corpus(str(folder), SHARE, tmp_path_factory.mktemp("cache"))


def write_corpus(root: Path, count: int = 6) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    source = random.Random(7)
    for number in range(count):
        (root / f"{number}.txt").write_text(f"{number} {some_text(source)}")
    return root


def test_every_document_is_on_one_side(corpus):
    train, validation = (list(corpus.documents(split)) for split in ("train", "validation"))
    assert len(train) + len(validation) == 26 == len(set(train) | set(validation))
    assert (len(train), len(validation)) == (corpus.count("train"), corpus.count("validation"))
    assert validation and any("packed" in document for document in train + validation)
    assert all(held_out(document_digest(document), SHARE) for document in validation)
    assert not any(held_out(document_digest(document), SHARE) for document in train)


def test_split_and_order_follow_content_not_names(folder, corpus, tmp_path):
    source = random.Random(3)
    files = [p for p in folder.rglob("[!.]*") if p.is_file() and is_text(p.name)]
    source.shuffle(files)
    for number, path in enumerate(files):
        suffix = "".join(path.suffixes)
        shutil.copy(path, tmp_path / f"{number:03d}{suffix}")
    moved = open_corpus(str(tmp_path), SHARE, tmp_path / "cache")
    for split in ("train", "validation"):
        assert list(moved.documents(split)) == list(corpus.documents(split))


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Nor is it left out unseen, as `os.walk` does."""
    write_corpus(tmp_path)
    write_corpus(tmp_path / "closed")

    def scandir(path, read=os.scandir):
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return read(path)

    monkeypatch.setattr(os, "scandir", scandir)
    passed = Counter[str]()
    assert len(walk_files(tmp_path, passed)) == len(walk_files(tmp_path, Counter()))
    assert passed["folders that cannot be read"] == 1
    with pytest.raises(DataError, match="cannot read .*closed: Permission denied"):
        walk_files(tmp_path / "closed", passed)


def test_share_of_documents_held_out():
    documents = [digest(str(number)) for number in range(4000)]
    assert len(set(documents)) == 4000
    assert 0.04 < np.mean([held_out(document, 0.05) for document in documents]) < 0.06


def test_no_side_of_a_small_corpus_is_empty():
    documents = [digest(str(number)) for number in range(30)]
    for count in range(2, 30):
        train, validation = divide(set(documents[:count]), 0.001, "small")
        assert len(validation) == 1 and len(train) == count - 1 and not train & validation
        train, validation = divide(set(documents[:count]), 0.999, "small")
        assert len(train) == 1 and len(validation) == count - 1


def test_standard_library_is_found():
    source = standard_library()
    assert {"json/decoder.py", "typing.py", "asyncio/events.py"} <= set(source.files)
    assert 300 < len(source.files) < 2000
    folders = {part for file in source.files for part in file.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "idlelib", "__pycache__"}
    assert sum((source.root / file).stat().st_size for file in source.files) > 5e6


def test_lone_file_is_cut_at_blank_lines(tmp_path):
    source = random.Random(5)
    text = "\n\n".join(some_text(source) for _ in range(400))
    pieces = list(sections([text]))
    assert "".join(pieces) == text and len(pieces) > 5
    assert all(SECTION <= len(piece) <= 2 * SECTION for piece in pieces[:-1])
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])
    path = tmp_path / "book.log"
    path.write_text(text)
    book = open_corpus(str(path), 0.3, tmp_path / "cache")
    documents = [d for split in ("train", "validation") for d in book.documents(split)]
    assert sorted(documents) == sorted(pieces)


def test_repeated_sections_of_a_lone_file_are_kept_once(tmp_path):
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / "book.txt"
    first, second = ("one " * SECTION)[:SECTION] + "\n\n", ("two " * SECTION)[:SECTION] + "\n\n"
    path.write_text(first + second + first)
    book = open_corpus(str(path), SHARE, tmp_path)
    documents = [d for split in ("train", "validation") for d in book.documents(split)]
    assert sorted(documents) == [first, second]
    with pytest.raises(DataError, match="has 1 distinct document"):  # the folder isn't the file
        list(open_corpus(str(path.parent), SHARE, tmp_path).documents("train"))


@pytest.mark.parametrize(
    "text", ["", "short", "x" * 3 * SECTION, "line\n" * SECTION, "\n" * 9 * SECTION]
)
def test_sections_lose_nothing(text):
    assert "".join(sections([text])) == text
    assert "" not in sections([text])


def test_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "marked.txt"
    path.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\n")
    assert list(file_text(path)) == ["café\r\n"]


# TFDS names


def store(monkeypatch, name: str, data_dir: Path, splits: dict[str, list[str]], field: str) -> None:
    """Puts documents on disk as the real builder of `name` would."""
    base = name.split("/")[0]
    __import__(f"tensorflow_datasets.text.{base}")
    builder_class = tfds.builder_cls(base)

    def generators(self, *_):
        def examples(documents):
            for number, document in enumerate(documents):
                fields = self.info.features.items()
                empty = {
                    key: "" if np.dtype(field.np_dtype).kind == "O" else 0 for key, field in fields
                }
                yield number, empty | {field: document}

        return {split: examples(documents) for split, documents in splits.items()}

    with monkeypatch.context() as patch, quiet():
        patch.setattr(builder_class, "_split_generators", generators)
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()


@pytest.mark.parametrize(
    ("name", "field", "held_out_split"),
    [
        ("lm1b", "text", "test"),
        ("c4/en", "text", "validation"),
        ("wiki40b/en", "text", "validation"),
        ("pg19", "book_text", "validation"),
        ("tiny_shakespeare", "text", "validation"),
        ("lambada", "passage", None),
    ],
)
def test_tfds_names(name, field, held_out_split, tmp_path, monkeypatch):
    documents = [f"naïve document {number}" for number in range(40)]
    splits = {"train": documents[:30] + [" "]} | (
        {held_out_split: documents[30:]} if held_out_split else {}
    )
    store(monkeypatch, name, tmp_path / "tfds", splits, field)
    corpus = open_corpus(f"tfds:{name}", 0.3, tmp_path)
    train, validation = (sorted(corpus.documents(s)) for s in ("train", "validation"))
    if held_out_split:
        assert (train, validation) == (sorted(documents[:30]), sorted(documents[30:]))
    else:
        assert sorted(train + validation) == sorted(documents[:30])
        assert validation == sorted(d for d in documents[:30] if held_out(document_digest(d), 0.3))
    config = DataConfig(f"tfds:{name}", seq_len=8, validation=0.3, cache_dir=str(tmp_path))
    assert prepare(config).statistics["train"]["documents"] == len(train)


def test_tfds_data_in_a_format_of_tensorflow(tmp_path, monkeypatch):
    store(monkeypatch, "lm1b", tmp_path / "tfds", {"train": ["a b c"], "test": ["d e f"]}, "text")
    folder = tmp_path / "tfds" / "lm1b" / "1.1.0"
    for path in folder.iterdir():
        if path.name == "dataset_info.json":
            path.write_text(path.read_text().replace("array_record", "tfrecord"))
        path.rename(folder / path.name.replace("array_record", "tfrecord"))
    message = f"tfds:lm1b is stored as tfrecord, .*: delete {folder} and run python -c .*lm1b"
    with pytest.raises(DataError, match=message):
        open_corpus("tfds:lm1b", 0.1, tmp_path)


def test_tfds_data_are_found_where_tfds_keeps_them(tmp_path, monkeypatch):
    store(monkeypatch, "lm1b", tmp_path / "home", {"train": ["a b c"], "test": ["d e f"]}, "text")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "home"))
    assert list(open_corpus("tfds:lm1b", 0.1, tmp_path / "cache").documents("train")) == ["a b c"]


# Sources: what each promises

WRITTEN = {"files": "files(path='FOLDER')", "tfds": "tfds(name='lambada')"}
"""How a source is written that has no default for some option."""


@pytest.mark.parametrize("name", SOURCES)
def test_batches_of_every_source_depend_on_the_step_alone(name, tmp_path, monkeypatch):
    """Not on the number of hosts, on a resume, or on what the cache holds."""
    documents = [f"{number} {some_text(random.Random(number))}" for number in range(30)]
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, document in enumerate(documents):
        (folder / f"{number}.py").write_text(document)
    if name == "stdlib":
        monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(folder)})
    if name == "tfds":
        store(monkeypatch, "lambada", tmp_path, {"train": documents}, "passage")
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    written = WRITTEN.get(name, "").replace("FOLDER", str(folder))
    text = written or example(name, SOURCES[name])
    config, other = (
        DataConfig(text, seq_len=8, validation=0.3, cache_dir=str(tmp_path / cache))
        for cache in ("first", "second")
    )
    data, again = prepare(config), prepare(other)
    assert data.fingerprint == again.fingerprint == prepare(config).fingerprint
    corpus = open_corpus(text, 0.3, config.cache)
    sides = [list(corpus.documents(split)) for split in ("train", "validation")]
    assert all(sides) and not set(sides[0]) & set(sides[1])
    assert all(document.strip() for side in sides for document in side)
    assert sides[0] == list(corpus.documents("train")) and corpus.count("train") >= len(sides[0])

    whole = TrainReader(data.train, 8, seed=3)
    for hosts in (1, 2, 4):
        local = np.arange(8).reshape(hosts, -1)
        readers = [TrainReader(again.train, 8, 3, local_rows=rows) for rows in local]
        for step in (0, 7):
            parts = [reader.batch(step)["tokens"] for reader in readers]
            assert np.array_equal(np.concatenate(parts), whole.batch(step)["tokens"])
        resumed = readers[-1].iterate(start_step=7)
        assert np.array_equal(next(resumed)["tokens"], parts[-1])
        resumed.close()


@dataclasses.dataclass(frozen=True)
class Counting:
    """A source of a user's own."""

    count: int = 20

    def open(self, validation, cache):
        texts = lambda: (f"document {number}" for number in range(self.count))  # noqa: E731
        return SplitCorpus(f"counting to {self.count}", texts, validation)


def test_a_source_of_your_own_has_options(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "counting", Counting)
    short, long = (open_corpus(f"counting{n}", 0.3, tmp_path) for n in ("", "(count=30)"))
    assert short.name == "counting to 20" and short.fingerprint != long.fingerprint
    assert long.count("train") + long.count("validation") == 30
    assert set(short.documents("train")) < set(long.documents("train"))
    assert open_corpus("counting", 0.4, tmp_path).fingerprint != short.fingerprint
    with pytest.raises(DataError, match=r"corpus 'counting\(9\)': write counting\(count=20\)"):
        open_corpus("counting(9)", 0.3, tmp_path)


def test_short_spellings_of_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("files", "stdlib", "no_source(a=1)"):
        write_corpus(tmp_path / name, 2)
    assert source_from_text("stdlib") == source_from_text("stdlib()") == StandardLibrary()
    assert source_from_text("tfds:c4/en") == source_from_text("tfds(name='c4/en')") == Tfds("c4/en")
    for path in ("files", "./stdlib", "no_source(a=1)", "~/texts", "/no/such (yet)"):
        assert source_from_text(path) == Files(path)
    assert source_from_text("files(path='a')") == Files("a")
    named = [open_corpus(text, 0.3, tmp_path) for text in ("files", "files(path='files')")]
    assert named[0].fingerprint == named[1].fingerprint and named[0].name == named[1].name


def test_an_unknown_source_names_the_known_ones():
    message = r"unknown corpus 'stdlb' \(perhaps stdlib\?\): choose one of stdlib, files, tfds, "
    with pytest.raises(DataError, match=message + ".*or import the module that registers"):
        source_from_text("stdlb()")


# Mistakes


def spoil(root: Path, how: str) -> None:
    if how == "binary":
        (root / "bad.txt").write_bytes(b"some\0thing")
    elif how == "latin":
        (root / "bad.txt").write_bytes("café".encode("latin-1"))
    elif how == "gzip":
        (root / "bad.txt.gz").write_bytes(gzip.compress(b"some text" * 100)[:-9])
    else:
        for path in list(root.iterdir())[how == "single" :]:
            path.unlink()
        (root / "picture.png").write_bytes(b"\x89PNG\0")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("binary", r"bad.txt is not UTF-8 text \(line 1: NUL byte\): convert it .*or leave it out"),
        ("latin", r"bad.txt is not UTF-8 text \(line 1: .*0xe9.*\): convert it .*or leave it out"),
        ("gzip", "cannot read .*bad.txt.gz: .*; repair it or leave it out"),
        ("empty", r"is empty: no text file \(.txt .md .*\) in "),
        ("single", "has 1 distinct document, and one must be held out"),
    ],
)
def test_unusable_folders(how, message, tmp_path):
    root = write_corpus(tmp_path / "corpus")
    spoil(root, how)
    with pytest.raises(DataError, match=message) as error:
        prepare(DataConfig(str(root), seq_len=8, cache_dir=str(tmp_path / "cache")))
    assert "\n" not in str(error.value)


def test_corpus_that_does_not_exist(tmp_path):
    with pytest.raises(DataError, match="corpus /no/such does not exist: give a folder"):
        prepare(DataConfig("/no/such", cache_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_data_set", "cannot open tfds:no_such_data_set: .*not found"),
        ("c4/no_such_config", "cannot open tfds:c4/no_such_config: .*not found"),
        ("lm1b:9.9.9", "cannot open tfds:lm1b:9.9.9: .*cannot be loaded at version 9.9.9"),
        ("not a name", "is not a TFDS name: write tfds:NAME"),
        (
            "c4/en",
            r"is not in /no/where: fetch it once with python -c .*text\.c4.*'c4/en'.*'/no/where'",
        ),
        ("gsm8k", r"no field of running text \(text, .*\) but question, answer"),
    ],
)
def test_tfds_mistakes(name, message, tmp_path, monkeypatch, capfd):
    if name == "gsm8k":
        store(monkeypatch, name, tmp_path / "tfds", {"train": ["one"]}, "question")
    monkeypatch.setenv("TFDS_DATA_DIR", "/no/where")
    capfd.readouterr()
    with pytest.raises(DataError, match=message) as error:
        open_corpus(f"tfds:{name}", 0.1, tmp_path)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")

"""Files as people have them: packed, encoded, of records, in folders of other things."""

import bz2
import codecs
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from train.data import DataConfig, DataError, open_corpus, prepare
from train.data import streams as streams_module
from train.data.splits import document_digest
from train.data.streams import file_lines
from train.data.text import SECTION, WHOLE, sections
from train.data.text_files import find_text_files
from train.tokenizer import TokenizerConfig
from train.tokenizer import run as train_tokenizer

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = [f'{n}: a café, 流れ and\u2028a {{brace}} "quoted"\n' for n in range(40)]
LINES = "".join(
    json.dumps({"id": n, "text": t}, ensure_ascii=n % 2 == 0) + "\n" for n, t in enumerate(TEXTS)
)


def zstd(content: bytes) -> bytes:
    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


def table(texts=TEXTS, name="text"):
    return pyarrow.table({"id": list(range(len(texts))), name: texts})


def sides(path, folder: Path) -> list[list[str]]:
    corpus = open_corpus(str(path), 0.2, folder / "cache")
    return [list(corpus.documents(split)) for split in ("train", "validation")]


def documents(path, folder: Path) -> list[str]:
    return sorted(sum(sides(path, folder), []))


CONTAINERS = {
    "a.jsonl": lambda text: text.encode(),
    "a.ndjson": lambda text: codecs.BOM_UTF8 + text.encode(),
    "windows.jsonl": lambda text: text.replace("\n", "\r\n").encode(),
    "old mac.jsonl": lambda text: text.replace("\n", "\r").encode(),
    "utf16.jsonl": lambda text: text.encode("utf-16"),
    "utf32.jsonl": lambda text: codecs.BOM_UTF32_BE + text.encode("utf-32-be"),
    "a.jsonl.gz": lambda text: b"".join(
        gzip.compress(part.encode()) for part in (text[:999], text[999:])
    ),
    "a.json.gz": lambda text: gzip.compress(text.encode()),  # C4's name for JSON Lines
    "a.json": lambda text: f"[{','.join(text.splitlines())}]".encode(),
    "a.jsonl.bz2": lambda text: bz2.compress(text.encode()),
    "a.JSONL.XZ": lambda text: lzma.compress(text.encode()),
    "a.jsonl.zst": lambda text: zstd(text[:999].encode()) + zstd(text[999:].encode()),
}  # fmt: skip


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize("name", CONTAINERS)
def test_records_in_every_container(name, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(streams_module, "CHUNK", chunk)
    lines = LINES.replace("\u2028", " ") if name == "a.json" else LINES  # splitlines
    (tmp_path / name).write_bytes(CONTAINERS[name](lines))
    found = documents(tmp_path / name, tmp_path)
    assert found == sorted(json.loads(line)["text"] for line in lines.split("\n") if line)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "file.arrow"])
def test_columns_of_arrow(name, kind, tmp_path):
    if (name, kind) == ("a.parquet", "string_view"):
        pytest.skip("Parquet has no such type")
    of = {
        "string": pyarrow.string(), "large_string": pyarrow.large_string(),
        "string_view": pyarrow.string_view(),
        "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    }[kind]  # fmt: skip
    data = pyarrow.table({"n": range(40), "text": pyarrow.array(TEXTS).cast(of)})
    path = tmp_path / name
    if name == "a.parquet":
        parquet.write_table(data, path, row_group_size=7)
    else:
        new = pyarrow.ipc.new_stream if name == "a.arrow" else pyarrow.ipc.new_file
        with new(str(path), data.schema) as writer:
            writer.write_table(data, max_chunksize=9)
    assert documents(path, tmp_path) == sorted(TEXTS)


def test_a_folder_as_the_hub_has_it(tmp_path):
    """Its own held-out split is held out; its test split and what is said of it are not read."""
    root = tmp_path / "set"
    (root / "data").mkdir(parents=True)
    (root / "README.md").write_text("---\nconfigs: []\n---\n# A data set")
    (root / "dataset_infos.json").write_text("{}")
    (root / ".gitattributes").write_text("*.parquet")
    splits = {"train-00000": TEXTS[:20], "train-00001": TEXTS[10:30]}
    splits |= {"validation-00000": TEXTS[29:35], "test-00000": TEXTS[35:]}
    for name, texts in splits.items():
        parquet.write_table(table(texts), root / "data" / f"{name}-of-00002.parquet")
    train, validation = sides(root, tmp_path)
    assert sorted(train) == sorted(TEXTS[:29]) and sorted(validation) == sorted(TEXTS[29:35])
    data = prepare(DataConfig(str(root), seq_len=8, cache_dir=str(tmp_path / "cache")))
    assert data.summary.endswith(
        "; 3 files read, 4 passed over: 1 .json, 1 .md beside records, 1 hidden, 1 of the test "
        "split, 11 repeated documents left out"
    )
    (root / "data" / "validation-00000-of-00002.parquet").unlink()
    train, test = sides(root, tmp_path)  # without a validation split the test split is held out
    assert sorted(test) == sorted(TEXTS[35:]) and not set(train) & set(test)
    with pytest.raises(DataError, match=r'test-0.*: the column "body" is missing: .* are text'):
        documents(f"files(path={str(root)!r}, field='body')", tmp_path)


def test_options_choose_files_field_and_encoding(tmp_path):
    root = tmp_path / "mixed"
    root.mkdir()
    (root / "a.jsonl").write_text(json.dumps({"body": "one", "n": 1}) + '\n{"body": "two"}')
    for name in ("b.txt", "c.txt"):
        (root / name).write_bytes(f"café in {name}".encode("latin-1"))
    files = f"files(path={str(root)!r}, "
    assert documents(files + "field='body')", tmp_path) == ["one", "two"]
    found = documents(files + "suffixes='.txt', encoding='latin-1')", tmp_path)
    assert found == ["café in b.txt", "café in c.txt"]
    with pytest.raises(DataError, match='"text" is missing: name another, files.*text are body'):
        documents(root, tmp_path)
    with pytest.raises(DataError, match="b.txt is not UTF-8 text .line 1: byte 0xe9"):
        documents(files + "suffixes='.txt')", tmp_path)
    with pytest.raises(DataError, match="unknown encoding 'latin-0'"):
        documents(files + "encoding='latin-0')", tmp_path)
    with pytest.raises(
        DataError, match=r"is empty: no text file \(.csv\) in .*3 passed over: 2 .t"
    ):
        documents(files + "suffixes='.csv')", tmp_path)


def test_links_are_followed_once(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    (root / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    for folder in (root, elsewhere):
        (folder / "a.txt").write_text(f"text of {folder.name}")
    (root / "linked").symlink_to(elsewhere)
    (root / "deep" / "circle").symlink_to(root)
    (root / "blob.txt").symlink_to(elsewhere / "a.txt")
    (root / "gone.txt").symlink_to("nowhere")
    os.mkfifo(root / "pipe.txt")
    found = find_text_files(str(root))
    assert found.files == ("a.txt", "blob.txt", "linked/a.txt")
    assert found.note == (
        "3 files read, 3 passed over: 1 broken links, 1 folders linked twice, 1 no regular files"
    )
    assert documents(root, tmp_path) == ["text of elsewhere", "text of root"]
    with pytest.raises(DataError, match="pipe.txt is no regular file"):
        documents(root / "pipe.txt", tmp_path)


def test_twins_are_one_document(tmp_path):
    """Copies that differ in line ends, Unicode form or trailing space are never on both sides."""
    root = tmp_path / "twins"
    root.mkdir()
    originals = [f"# {n}\n\ncafé {random.Random(n).random()}\nend\n" for n in range(30)]
    changes = (
        lambda t: t,
        lambda t: t.replace("\n", "\r\n"),
        lambda t: t.replace("\n", "\r"),
        lambda t: unicodedata.normalize("NFD", t),
        lambda t: t.replace("\n", " \t\n"),
        lambda t: t + "\n\n",
        str.rstrip,
    )
    for number, text in enumerate(originals):
        assert len({document_digest(change(text)) for change in changes}) == 1
        for copy, change in enumerate(changes):
            (root / f"{number}-{copy}.txt").write_bytes(change(text).encode())
    assert documents(root, tmp_path) == sorted(originals)
    assert len({document_digest(text) for text in ("a b", "a  b", " a b", "a\nb", "A b")}) == 5


def test_one_long_line_and_bare_returns(tmp_path):
    """Each is read right, and in pieces: memory does not grow with a file."""
    long = "x" * 10_000_000
    pieces = list(sections(long[start : start + 999_999] for start in range(0, len(long), 999_999)))
    assert "".join(pieces) == long and max(map(len, pieces)) == WHOLE
    old = ("line\r" * 99 + "\r") * 400
    pieces = list(sections(old[start : start + 10_001] for start in range(0, len(old), 10_001)))
    assert "".join(pieces) == old and all(piece.endswith("\r\r") for piece in pieces)
    assert pieces == list(sections([old])) and max(map(len, pieces)) <= 2 * SECTION
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": long}) + '\n{"text": "short"}')
    assert documents(path, tmp_path) == sorted([long, "short"])
    assert [len(line) for line in file_lines(path)] == [len(long) + 12, 17]


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_lines_end_where_they_end_in_every_chunk(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(streams_module, "CHUNK", chunk)
    (tmp_path / "a").write_bytes("é\r\n\r\nb\rc\n\n\u2028d\r\n".encode())
    assert list(file_lines(tmp_path / "a")) == ["é", "", "b", "c", "", "\u2028d"]


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(streams_module, "LONGEST_LINE", 100)
    monkeypatch.setattr(streams_module, "CHUNK", 64)
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n" + "9" * 200)
    with pytest.raises(DataError, match=r"a.jsonl, line 2: longer than 100 characters: cut it"):
        list(file_lines(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": null}', 'line 2: the field "text" is null'),
        ("a.jsonl", b'{"text": "\\ud800"}', 'line 1: the field "text" holds half a character'),
        ("a.jsonl", b'{"text": "a"', "line 1: not JSON"),
        ("a.jsonl", '{"text": "e"}'.encode("utf-16")[2:], "is not UTF-8 text .line 1: NUL byte"),
        ("a.jsonl", '{"text": "é"}'.encode("utf-16")[:-1], "is not utf-16 text .line 1: byte"),
        ("a.jsonl.zst", zstd(b'{"text": "a"}')[:-3], "cannot read .*Truncated.*; repair it"),
        ("a.jsonl.xz", b"no such thing", "cannot read .*; repair it or leave it out"),
        ("a.parquet", b"PAR1 no more of it", "cannot read .*a.parquet: .*; repair it or leave it"),
        ("a.arrow", b"no such thing at all", "cannot read .*a.arrow: .*; repair it or leave it"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a "}', "has 1 distinct document, and one must be"),
        ("a.jsonl", b"", "has 0 distinct documents, and one must be held out"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        documents(tmp_path / name, tmp_path)
    assert "\n" not in str(error.value)
    assert "a." in str(error.value) and not list((tmp_path / "cache" / "corpora").glob("*.partial"))


def test_columns_that_are_no_text(tmp_path):
    path = tmp_path / "a.parquet"
    for data, message in (
        (pyarrow.table({"text": [1, 2], "body": ["a", "b"]}), '"text" is int64: .* text are body'),
        (pyarrow.table({"text": ["a", None]}), 'row 2: the column "text" is null'),
    ):
        parquet.write_table(data, path)
        with pytest.raises(DataError, match=message):
            documents(path, tmp_path)


PREPARE = """
import re, sys, time
from pathlib import Path
from train.data import DataConfig, prepare

def kilobytes(name):
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\\s+(\\d+)", status)[1])

import grain, tokenizers
from array_record.python import array_record_data_source, array_record_module
before, start = kilobytes("VmRSS"), time.process_time()
corpus, cache, tokenizer = sys.argv[1:]
config = DataConfig(corpus, tokenizer=tokenizer, seq_len=1024, cache_dir=cache)
documents = sum(prepare(config).statistics[split]["documents"] for split in ("train", "validation"))
print(time.process_time() - start, kilobytes("VmHWM") - before, before, documents)
"""


@pytest.mark.experiment
@pytest.mark.parametrize(("size", "tokenizer", "least"), [(300, "bytes", 20), (12, "bpe", 1)])
def test_a_large_corpus(size: int, tokenizer: str, least: float, tmp_path: Path):
    """In MB: its size, and the least speed of one CPU."""
    source, corpus = random.Random(0), tmp_path / "big.jsonl"
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(source.choices(letters, k=source.randrange(2, 10))) for _ in range(3000)]
    with corpus.open("w") as file:
        number = 0
        while file.tell() < size * 1e6:
            text = " ".join(source.choices(words, k=source.randrange(50, 700)))
            record = {"id": number, "text": text, "url": f"https://example.org/{number}"}
            number += 1
            file.write(json.dumps(record) + "\n")
    if tokenizer == "bpe":
        config = TokenizerConfig(str(corpus), 3317, tmp_path / "bpe.json", 0.05, str(tmp_path))
        print(train_tokenizer(config))
        tokenizer = str(tmp_path / "bpe.json")
    command = [sys.executable, "-c", PREPARE, str(corpus), str(tmp_path / "cache"), tokenizer]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, memory, before, documents = map(float, done.stdout.split())
    print(
        f"{size} MB, {documents:.0f} documents: {size / seconds:.1f} MB/s, {memory / 1e3:.0f} MB "
        f"above {before / 1e3:.0f} MB"
    )
    assert documents == number
    assert size / seconds >= least
    assert memory * 1024 <= 150e6 + 16 * documents

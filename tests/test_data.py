"""Packed rows and the reader: nothing lost, nothing half-written, every batch known by its step."""

import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grain
import numpy as np
import pytest
from processes import PATIENCE, Process

from train.data import (
    ByteTokenizer,
    DataConfig,
    DataError,
    TrainReader,
    evaluation_batches,
    open_corpus,
    prepare,
)
from train.data.packing import PackedRows, record_dtype, write_rows
from train.data.storage import build_once

SEQ_LEN = 16
WORDS = ["stream", "bubble", "fork", "keep", "token", "café", "流れ", "👍🏽"]


def some_text(source: random.Random, words: int = 40) -> str:
    return " ".join(source.choices(WORDS, k=words))


def write_corpus(root: Path, count: int = 6) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    source = random.Random(7)
    for number in range(count):
        (root / f"{number}.txt").write_text(f"{number} {some_text(source)}")
    return root


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    root = tmp_path_factory.mktemp("data")
    folder = write_corpus(root / "corpus", 25)
    return DataConfig(str(folder), seq_len=SEQ_LEN, validation=0.2, cache_dir=str(root / "cache"))


@pytest.fixture(scope="module")
def data(config):
    return prepare(config)


@pytest.fixture(scope="module")
def corpus(config):
    return open_corpus(config.corpus, config.validation, config.cache)


def stream_of(rows: PackedRows) -> np.ndarray:
    """The first token and all targets, without padding."""
    tokens, _ = rows.read(range(len(rows)))
    return np.concatenate([tokens[0, :1], tokens[:, 1:].ravel()])[: (tokens[:, 1:] >= 0).sum() + 1]


# Packed rows


@pytest.mark.parametrize("split", ["train", "validation"])
def test_targets_are_the_corpus(split, data, corpus):
    rows = getattr(data, split)
    documents = [list(document.encode()) for document in corpus.documents(split)]
    expected = [token for document in documents for token in [256, *document]]
    counts = data.statistics[split]
    assert counts["tokens"] == len(expected) and counts["documents"] == len(documents)
    packed = stream_of(rows).tolist()
    if split == "train":
        assert len(expected) - SEQ_LEN <= len(packed) <= len(expected)
        assert packed == expected[: len(packed)]
        assert rows.read(range(len(rows)))[0].min() >= 0
    else:
        assert packed == expected


def test_bytes_are_those_of_the_targets(data, corpus):
    tokens, sizes = data.validation.read(range(len(data.validation)))
    targets = tokens[:, 1:]
    assert sizes.tolist() == ((targets >= 0) & (targets != 256)).sum(axis=1).tolist()
    total = sum(len(document.encode()) for document in corpus.documents("validation"))
    assert sizes.sum() == total == data.statistics["validation"]["bytes"]


def test_rows_one_by_one_and_together(data):
    rows = data.train
    assert len(rows) == data.statistics["train"]["rows"]
    picked = [5, 0, len(rows) - 1, 5]
    tokens, sizes = rows.read(picked)
    assert tokens.shape == (4, SEQ_LEN + 1) and tokens.dtype == sizes.dtype == np.int32
    for index, row, size in zip(picked, tokens, sizes, strict=True):
        single, single_size = rows[index]
        assert single.dtype == np.int32 and np.array_equal(single, row) and single_size == size
    batch = grain.MapDataset.source(rows).batch(3)[0]
    assert np.array_equal(batch[0], rows.read([0, 1, 2])[0])
    for outside in (-1, len(rows)):
        with pytest.raises(IndexError, match=f"row {outside} of {len(rows)}"):
            rows[outside]


class Wide(ByteTokenizer):
    """Bytes with ids that need 32 bits, and a document that its normalizer would swallow."""

    vocab_size = 200_257
    separator = 200_256

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids, sizes = super().encode(text.replace("nothing", ""))
        return ids + 200_000, sizes


@pytest.mark.parametrize("length", [3, 4, 5, 8, 9])
def test_every_length_of_the_tail(length, tmp_path):
    document = "abcdefghi"[: length - 1]  # length tokens with the separator
    for keep_tail in (True, False):
        path = tmp_path / f"{keep_tail}.array_record"
        counts = write_rows(
            [document, "nothing"], Wide(), 4, path, keep_tail=keep_tail
        )  # fmt: skip
        assert counts["documents"] == 1 and counts["tokens"] == length
        rows = PackedRows(path, 4, Wide.vocab_size)
        assert len(rows) == counts["rows"] == (length - 1 + 3 * keep_tail) // 4
        if len(rows):
            expected = [200_256, *(200_000 + byte for byte in document.encode())]
            whole = length if keep_tail else (length - 1) // 4 * 4 + 1
            assert stream_of(rows).tolist() == expected[:whole]


def test_blocks_do_not_show(tmp_path, monkeypatch):
    source = random.Random(2)
    documents = [some_text(source, words=source.randrange(1, 30)) for _ in range(50)]
    written = []
    for number, block in enumerate((1, 100, 1 << 20)):
        monkeypatch.setattr("train.data.packing._BLOCK", block)
        path = tmp_path / str(number)
        write_rows(documents, ByteTokenizer(), 7, path, keep_tail=True)
        rows = PackedRows(path, 7, 257)
        written.append(rows.read(range(len(rows))))
    for tokens, sizes in written[1:]:
        assert np.array_equal(tokens, written[0][0]) and np.array_equal(sizes, written[0][1])


def test_tokens_take_16_bits_where_they_fit():
    assert record_dtype(10, 65_535).itemsize == 4 + 2 * 11
    assert record_dtype(10, 65_536).itemsize == 4 + 4 * 11


# Preparing once


def test_prepared_data_are_reused_and_edited_folders_are_not(tmp_path, monkeypatch, capsys):
    root = write_corpus(tmp_path / "corpus")
    config = DataConfig(str(root), seq_len=8, cache_dir=str(tmp_path / "cache"))
    first = prepare(config)

    def fail(*_):
        raise AssertionError("prepared again")

    with monkeypatch.context() as patch:
        patch.setattr("train.data.prepared.pack", fail)
        patch.setattr("train.data.local.write_documents", fail)
        again = prepare(config)
    assert again.fingerprint == first.fingerprint and again.statistics == first.statistics
    assert capsys.readouterr() == ("", "")  # a library says nothing
    (root / "0.txt").write_text("an edited document")
    assert prepare(config).fingerprint != first.fingerprint


def test_files_that_change_while_they_are_read_are_not_kept(tmp_path):
    """Else the fingerprint of the old files would name the new ones for ever."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"document {number}")
    corpus = open_corpus(str(folder), 0.2, tmp_path)
    (folder / "1.txt").write_text("edited")
    with pytest.raises(DataError, match="corpus changed while they were read"):
        corpus.documents("train")
    (folder / "1.txt").write_text("document 1")
    corpus = open_corpus(str(folder), 0.2, tmp_path)
    found = [*corpus.documents("train"), *corpus.documents("validation")]
    assert sorted(found) == [f"document {number}" for number in range(5)]


def test_fingerprint_sees_every_choice(data, config):
    same = prepare(replace(config, seed=7))
    others = [prepare(replace(config, seq_len=8)), prepare(replace(config, validation=0.5))]
    assert same.fingerprint == data.fingerprint
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_default_cache_follows_xdg(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert DataConfig().cache == Path("/somewhere/thoughtbubbles/data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert DataConfig().cache == Path.home() / ".cache/thoughtbubbles/data"


def test_an_exception_leaves_nothing_behind(tmp_path, monkeypatch):
    root = write_corpus(tmp_path / "corpus")
    config = DataConfig(str(root), seq_len=8, cache_dir=str(tmp_path / "cache"))
    encode = ByteTokenizer.encode
    seen = []

    def interrupted(self, text):
        seen.append(text)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return encode(self, text)

    with monkeypatch.context() as patch:
        patch.setattr(ByteTokenizer, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    left = [path for path in (config.cache / "rows").iterdir() if path.suffix != ".lock"]
    assert left == []
    assert len(prepare(config).train) > 0


def test_a_killed_process_leaves_nothing_usable(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from train.data.storage import build_once
def build(folder):
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
build_once(Path({str(tmp_path)!r}) / "made", build)
"""
    process = Process(("-c", script), os.environ, tmp_path / "said")
    assert process.wait(timeout=PATIENCE) == -signal.SIGKILL
    made = tmp_path / "made"
    assert not made.exists() and (tmp_path / "made.partial" / "half").exists()
    build_once(made, lambda folder: (folder / "whole").touch())
    assert [path.name for path in made.iterdir()] == ["whole"]
    assert not (tmp_path / "made.partial").exists()


def test_two_at_once_make_it_once(tmp_path):
    built = []

    def build(folder: Path) -> None:
        time.sleep(0.2)
        built.append((folder / "whole").write_text("whole"))

    made = tmp_path / "made"
    with ThreadPoolExecutor(3) as threads:
        made_it = list(threads.map(lambda _: build_once(made, build), range(3)))
    assert sorted(made_it) == [False, False, True]
    assert len(built) == 1 and (made / "whole").exists()


@pytest.mark.parametrize("limit", [100, 6000])  # while documents are written; rows
def test_full_disk(limit, tmp_path):
    root = write_corpus(tmp_path / "corpus", 40)
    config = DataConfig(str(root), seq_len=8, cache_dir=str(tmp_path / "cache"))
    if limit == 6000:
        list(open_corpus(config.corpus, config.validation, config.cache).documents("train"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(DataError, match="cannot prepare data in .*choose another cache_dir"):
            prepare(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(prepare(config).train) > 0


@pytest.mark.parametrize("damage", ["empty", "other"])
def test_damaged_rows_are_noticed(damage, tmp_path):
    root = write_corpus(tmp_path / "corpus")
    config = DataConfig(str(root), seq_len=8, cache_dir=str(tmp_path / "cache"))
    prepare(config)
    (file,) = config.cache.glob("rows/*/train.array_record")
    other = file.with_name("validation.array_record").read_bytes()
    file.write_bytes(other if damage == "other" else b"")
    with pytest.raises(DataError, match="are damaged: delete that folder"):
        prepare(config)
    shutil.rmtree(file.parent)
    assert len(prepare(config).train) > 0


@pytest.mark.parametrize("stored", ["rows", "corpora"])
def test_a_flipped_bit_of_prepared_data_is_noticed(stored, tmp_path):
    """Of packed rows, and of the documents that they are packed from."""
    config = DataConfig(str(write_corpus(tmp_path / "corpus")), seq_len=8, cache_dir=str(tmp_path))

    def read() -> np.ndarray:
        if stored == "corpora":  # rows are then packed again
            shutil.rmtree(tmp_path / "rows")
        rows = prepare(config).train
        return rows.read(range(len(rows)))[0]

    prepare(config)
    whole = read()
    (file,) = config.cache.glob(f"{stored}/*/train.array_record")
    content, source, noticed = file.read_bytes(), random.Random(0), 0
    written = np.flatnonzero(np.frombuffer(content, np.uint8))  # the rest of a block is zeros
    for index in source.sample(list(written), 30):
        flipped = bytearray(content)
        flipped[index] ^= 1 << source.randrange(8)
        file.write_bytes(flipped)
        try:
            found = read()
        except DataError as error:
            assert "are damaged: delete that folder" in str(error), error
            noticed += 1
        else:
            assert np.array_equal(found, whole)
    assert noticed > 20
    metadata = next(path for path in file.parent.iterdir() if path.suffix == ".json")
    metadata.write_text(metadata.read_text().replace('"train":', '"trail":'))
    file.write_bytes(content)
    with pytest.raises(DataError, match="are damaged: delete that folder"):
        read()


# The reader


def equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[k], right[k]) for k in left)


def test_a_batch_is_a_function_of_its_step(data, config):
    reader = TrainReader(data.train, 6, seed=3)
    seventh = reader.batch(7)
    assert seventh["tokens"].shape == (6, SEQ_LEN + 1) and seventh["tokens"].dtype == np.int32
    assert seventh["rows"].shape == (6,) and seventh["rows"].dtype == np.int64
    assert np.array_equal(data.train.read(seventh["rows"])[0], seventh["tokens"])
    batches = reader.iterate(5)
    assert all(equal(next(batches), reader.batch(step)) for step in range(5, 12))
    batches.close()
    assert equal(reader.batch(7), seventh)
    assert equal(TrainReader(prepare(config).train, 6, seed=3).batch(7), seventh)


@pytest.mark.parametrize(
    "held", [[range(8)], [range(4), range(4, 8)], [(0, 3), (1, 2, 5), (4, 6, 7)]]
)
def test_hosts_hold_rows_of_the_same_batch(held, data):
    whole = TrainReader(data.train, 8, seed=1)
    parts = [TrainReader(data.train, 8, 1, np.array(rows)) for rows in held]
    places = np.concatenate([np.array(rows) for rows in held])
    for step in (0, 1, 50):  # the last one is some epochs on
        batches = [part.batch(step) for part in parts]
        joined = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
        assert equal(joined, {k: rows[places] for k, rows in whole.batch(step).items()})
        for part, batch in zip(parts, batches, strict=True):
            iterator = part.iterate(step)
            assert equal(next(iterator), batch)
            iterator.close()


def test_each_epoch_is_another_order_of_all_rows(data):
    size = len(data.train)
    orders = {}
    for seed in (0, 1, 2):
        reader = TrainReader(data.train, 10, seed)  # epochs end within a batch
        batches = [reader.batch(step)["rows"] for step in range(-(-3 * size // 10))]
        epochs = np.concatenate(batches)[: 3 * size].reshape(3, size)
        for epoch, rows in enumerate(epochs.tolist()):
            assert sorted(rows) == list(range(size))
            orders[seed, epoch] = tuple(rows)
    assert len(set(orders.values())) == len(orders) and tuple(range(size)) not in orders.values()


@pytest.mark.parametrize("size", [1, 2, 6])
def test_a_batch_may_be_one_row_or_more_than_the_corpus(size, tmp_path):
    path = tmp_path / "rows"
    write_rows(["abcdefgh"], ByteTokenizer(), 4, path, keep_tail=False)
    reader = TrainReader(PackedRows(path, 4, 257), size, seed=0)
    batches = [reader.batch(step) for step in range(6 // size)]
    assert np.bincount(np.concatenate([b["rows"] for b in batches])).tolist() == [3, 3]


def test_reading_ahead_ends_with_the_iterator(data):
    def threads():
        return [t.name for t in threading.enumerate() if t.name.startswith("grain")]

    reader = TrainReader(data.train, 4, seed=0)
    closed, dropped, unused = reader.iterate(), reader.iterate(), reader.iterate()
    next(closed), next(dropped)
    assert threads()
    closed.close()
    del dropped, unused
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == []
    with pytest.raises(StopIteration):
        next(closed)


@pytest.mark.parametrize("limit", [None, 1, 5, 10**6])
def test_evaluation_reads_each_row_once(limit, data):
    rows = data.validation
    count = len(rows) if limit is None else min(limit, len(rows))
    batches = list(evaluation_batches(rows, 4, limit))
    assert len(batches) == -(-count // 4)
    assert all(batch["tokens"].shape == (4, SEQ_LEN + 1) for batch in batches)
    assert all(batch["tokens"].dtype == batch["bytes"].dtype == np.int32 for batch in batches)
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    sizes = np.concatenate([batch["bytes"] for batch in batches])
    spread = [len(rows) * i // count for i in range(count)]  # not the first document alone
    expected_tokens, expected_sizes = rows.read(spread)
    assert np.array_equal(tokens[:count], expected_tokens) and (tokens[count:] == -1).all()
    assert np.array_equal(sizes[:count], expected_sizes) and not sizes[count:].any()


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 0}, "seq_len=0: a row needs at least 1 target"),
        ({"validation": 0.0}, "validation=0.0 is not a share"),
        ({"validation": 1.0}, "validation=1.0 is not a share"),
        ({"seed": -1}, "seed=-1 is negative"),
    ],
)
def test_impossible_choices(arguments, message):
    with pytest.raises(DataError, match=message):
        DataConfig(**arguments)


def test_a_batch_holds_at_least_one_row(data):
    for read in (
        lambda: TrainReader(data.train, 0, 0),
        lambda: next(evaluation_batches(data.train, 0)),
    ):
        with pytest.raises(DataError, match="a batch of 0 rows: choose at least 1"):
            read()


def test_corpus_shorter_than_a_row(tmp_path):
    root = write_corpus(tmp_path / "corpus", 2)
    with pytest.raises(DataError, match=r"train split of .* has \d\d\d tokens, a row needs 9001 "):
        prepare(DataConfig(str(root), seq_len=9000, cache_dir=str(tmp_path / "cache")))


def test_text_files_need_no_tensorflow_datasets(tmp_path, monkeypatch, capfd):
    """Nor do imports: `test_importing_everything_stays_light`."""
    for name in ("tensorflow_datasets", "tensorflow"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an error
    root = write_corpus(tmp_path / "corpus")
    data = prepare(DataConfig(str(root), seq_len=8, cache_dir=str(tmp_path / "cache")))
    with contextlib.closing(TrainReader(data.train, 4, seed=0).iterate()) as batches:
        next(batches)
    assert capfd.readouterr() == ("", "")

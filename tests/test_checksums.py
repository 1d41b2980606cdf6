"""Damage of one bit, anywhere in a checkpoint, is one line that names file, array and way out."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.runs import checksums
from train.runs.checkpoint import Checkpointer, CheckpointError, load_meta, load_params

# Written by orbax when the checksums are complete, and never read.
UNREAD = {"_CHECKPOINT_METADATA", "commit_success.txt"}


def state() -> tuple[Any, Any]:
    noise = np.random.default_rng(0).normal(size=(96, 32)).astype(np.float32)
    params = {"embed": jnp.asarray(noise), "scale": jnp.ones(3)}
    return params, {"opt": {"mu": params}, "key": jax.random.key(1), "step": jnp.int32(2)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with Checkpointer(folder, save_interval=1) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, *state(), {"config": {"a": 1}})
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def flip(path: Path, at: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def refused(read: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_flipped_bit_is_refused_by_all_that_reads_it(run: Path):
    step, chance = run / "2", random.Random(0)
    files = [path for path in sorted(step.rglob("*")) if path.is_file()]
    read = [path for path in files if path.parent != step or path.name not in UNREAD]
    assert len(read) > 20
    with Checkpointer(run, save_interval=1) as checkpointer:
        for path in read:
            name, size = str(path.relative_to(step)), path.stat().st_size
            readers: list[Callable[[], Any]] = [lambda: checkpointer.restore(*state())]
            if not name.startswith("train"):
                readers.append(lambda: load_params(run))
            if name.startswith("meta") or name == checksums.NAME:
                readers.append(lambda: load_meta(run))
            for at in {0, size - 1, *(chance.randrange(size) for _ in range(6))}:
                bit = chance.randrange(8)
                flip(path, at, bit)
                for reader in readers:
                    message = refused(reader)
                    assert f"{step} is damaged ({name} " in message and "step 1 is int" in message
                flip(path, at, bit)
        for path in set(files) - set(read):  # nothing that it says is used
            for bit in range(8):
                flip(path, path.stat().st_size // 2, bit)
                restored = checkpointer.restore(*state())[1:3]
                assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), restored, state()))


@pytest.mark.parametrize("harm", ["delete", "cut", "append", "folder", "pipe"])
def test_other_damage_of_any_file(run: Path, harm: str):
    step = run / "2"
    listed = [name for name in checksums._read(step) if not name.startswith("train")]
    for name in listed:
        path = step / name
        content = path.read_bytes()
        if harm in ("delete", "folder", "pipe"):
            path.unlink()
        if harm == "folder":
            path.mkdir()
        elif harm == "pipe":  # which a reader would wait at for ever
            os.mkfifo(path)
        elif harm != "delete":
            path.write_bytes(content[:-1] if harm == "cut" else content + b"\0")
        assert f"damaged ({name}" in refused(lambda: load_params(run))
        if harm == "folder":
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(content)
    load_params(run)
    if harm == "pipe":
        (step / checksums.NAME).unlink()
        os.mkfifo(step / checksums.NAME)
        assert f"{checksums.NAME} is no regular file" in refused(lambda: load_params(run))


def test_the_array_whose_bytes_differ_is_named(run: Path):
    step = run / "2"
    (name, pieces), *others = [
        (name, pieces)
        for name, pieces in checksums._read(step).items()
        if name.startswith("params/ocdbt.process_0/d/") and pieces[0][1] > 8000
    ]
    assert not others and pieces[0][3] == ["embed"]
    flip(step / name, 5000, 3)
    message = refused(lambda: load_params(run))
    assert f"({name} is not as it was written: array embed)" in message
    shutil.rmtree(run / "1" / "params" / "d")
    assert "no other step here is intact" in refused(lambda: load_params(run))


def test_pieces_cover_every_file_and_every_array(run: Path):
    step = run / "2"
    found = checksums._read(step)
    files = {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}
    assert files == found.keys() | UNREAD | {checksums.NAME}
    for name, pieces in found.items():
        starts = [start for start, *_ in pieces]
        ends = [start + size for start, size, *_ in pieces]
        assert starts == [0, *ends[:-1]] and ends[-1] == (step / name).stat().st_size
    for item, arrays in (("params", {"embed", "scale"}), ("train", {"opt/mu/embed", "key"})):
        inside = [piece[3] for name in found if name.startswith(item) for piece in found[name]]
        assert arrays <= {array for names in inside for array in names}


def test_long_pieces_are_folded_as_fletcher_has_it(tmp_path: Path):
    data = np.random.default_rng(0).integers(0, 256, (1 << 20) + 70_001, np.uint8).tobytes()
    vectors = np.frombuffer(data + bytes(-len(data) % 65536), np.uint64).reshape(-1, 8192)
    totals = np.zeros(8192, np.uint64)
    positions = np.zeros(8192, np.uint64)
    for vector in vectors:
        totals += vector
        positions += totals
    expected = zlib.crc32(totals.tobytes() + positions.tobytes())

    def checksum(content: bytes) -> int:
        (tmp_path / "file").write_bytes(content)
        with open(tmp_path / "file", "rb") as stream:
            return checksums._checksum(stream, len(data))

    assert checksum(data) == expected
    assert checksum(data[:-1]) != expected
    swapped = data[65536:131072] + data[:65536] + data[131072:]
    assert checksum(swapped) != expected
    assert checksum(data[: 1 << 19]) != expected
    assert checksum(bytes(len(data))) != expected


def test_a_format_of_a_newer_version_is_one_line_of_any_length(run: Path):
    file = run / "2/meta/metadata"
    for version in (2, 10**4000):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"format": version}))
        checksums.write(run / "2")
        said = refused(lambda: load_meta(run))
        assert "install a newer one" in said and "has format " in said and len(said) < 500


def test_without_checksums_a_checkpoint_is_refused_until_they_are_written(run: Path):
    (run / "2" / checksums.NAME).unlink()
    for read in (load_params, load_meta):
        message = refused(lambda read=read: read(run))
        assert f"{run / '2'} has no file checksums" in message
    script = message[message.index('"') + 1 : -1]
    subprocess.run([sys.executable, "-c", script], check=True)
    assert load_params(run)[0] == {"config": {"a": 1}}


def test_a_run_folder_named_as_a_step_is_no_checkpoint(run: Path, tmp_path: Path):
    """The advice to write checksums would have put a file into a run."""
    shutil.copytree(run, tmp_path / "runs" / "7")
    message = refused(lambda: load_meta(tmp_path / "runs"))
    assert "perhaps another run's folder); no other step here is intact" in message


@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_a_run_that_deletes_the_step_that_is_read(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
):
    """Its newest step is read in its place; a step that was asked for by name is gone."""
    verify, seen = checksums.verify, []

    def beside_a_run(folder: Path, *args: Any) -> None:
        seen.append(folder.name)
        if when == "after":
            verify(folder, *args)
        if folder.name == "2":
            shutil.copytree(folder, tmp_path / "3")
            if when == "half":
                (folder / "meta" / "metadata").unlink()
            else:
                shutil.rmtree(folder)
            (tmp_path / "3").rename(run / "3")
        if when != "after":
            verify(folder, *args)

    monkeypatch.setattr(checksums, "verify", beside_a_run)
    for read in (lambda: load_params(run)[0], lambda: load_meta(run)):
        assert read() == {"config": {"a": 1}}
        # The other step is only looked at for the message that nobody sees.
        assert [name for name in seen if name in ("2", "3")] in (["2", "3"], ["2", "3", "3"])
        shutil.rmtree(run / "2", ignore_errors=True)
        (run / "3").rename(run / "2")
        seen.clear()
    message = refused(lambda: load_params(run / "2"))
    assert ("step 2 was deleted" in message and "[1, 3]" in message) or when == "half"


def test_a_disk_that_refuses_is_no_damage(run: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(error: int) -> Callable[..., Any]:
        def raises(*_: Any) -> Any:
            raise OSError(error, os.strerror(error), "the file")

        return raises

    with monkeypatch.context() as patch:
        patch.setattr(checksums, "_checksum", refuse(errno.EIO))
        assert f"{run / '2'} can't be read: Input/output error (the file)" in refused(
            lambda: load_params(run)
        )
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse(errno.EACCES))
        for read in (load_params, load_meta):
            assert "can't be read: Permission denied" in refused(lambda read=read: read(run))
    (run / "2" / checksums.NAME).unlink()
    (run / "2" / checksums.NAME).mkdir()
    assert "is damaged (checksums: Is a directory); step 1 is in" in refused(
        lambda: load_params(run)
    )


def test_a_step_that_cannot_be_read_is_not_called_intact(run: Path):
    file = run / "1" / "meta" / "metadata"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    checksums.write(run / "1")
    flip(run / "2" / "meta" / "metadata", 5, 1)
    assert "no other step here is intact" in refused(lambda: load_params(run))


def test_checksums_are_on_the_disk_before_the_step_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    synced, fsync = [], os.fsync

    def recorded(handle: int) -> None:
        fsync(handle)
        name = os.readlink(f"/proc/self/fd/{handle}")
        synced.append((Path(name).name, (tmp_path / "7").exists()))

    monkeypatch.setattr(os, "fsync", recorded)
    with Checkpointer(tmp_path, save_interval=1) as checkpointer:
        checkpointer.save(7, *state(), {})
    assert (checksums.NAME, False) in synced

"""Build folders atomically, by one process at a time, and write files of records."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from train.data.config import DataError


def build_once(folder: Path, build: Callable[[Path], None]) -> bool:
    """Make a folder atomically, unless it exists.

    The folder is filled under a temporary name next to its final path and then renamed. A second
    process that needs the same folder waits for the first process. Files that a killed process
    left are removed.

    Args:
        folder: Folder to make.
        build: Function that fills the empty folder at the path that it is given.

    Returns:
        Whether this call made the folder.

    Raises:
        DataError: The file system refuses (no space, no permission, no locks).
    """
    if folder.exists():
        return False
    partial = folder.with_name(folder.name + ".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(folder.name + ".lock"), "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it when the process dies
            if folder.exists():
                return False
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                build(partial)
                os.rename(partial, folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise DataError(
            f"cannot prepare data in {folder.parent}: {error}; "
            "free space there or choose another cache_dir"
        ) from error
    return True


@contextlib.contextmanager
def record_writer(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Context manager that opens a new ArrayRecord file, which has random access to its records.

    Yields:
        Function that appends a record to the file.

    Raises:
        OSError: The file cannot be written.
    """
    # Here: what needs no packed rows runs without array_record.
    from array_record.python.array_record_module import ArrayRecordWriter

    # Uncompressed: tokens take 2 bytes each, and reading is twice as fast.
    writer = ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")
    try:
        yield writer.write
    finally:
        try:
            writer.close()
        except RuntimeError as error:  # array_record reports a full disk here
            raise OSError(str(error)) from error

"""Folders that appear whole or not at all, whatever is killed and whoever else is at it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from train.data.config import DataError


def build_once(folder: Path, build: Callable[[Path], None]) -> bool:
    """Makes `folder` by calling `build` on an empty neighbour and renaming that; whether it did.

    A second process that wants the same folder waits, then finds it made. What a killed process
    left behind is swept away by the next one.

    Raises:
        DataError: the file system refuses (no space, no permission, no locks).
    """
    if folder.exists():
        return False
    partial = folder.with_name(folder.name + ".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(folder.name + ".lock"), "w") as lock:
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

"""Write files atomically, check output paths before work begins, and shorten error messages."""

import errno
import os
import tempfile
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a crash or a full disk leaves either the old or the new content.

    Args:
        path: File to write, in a folder that exists.
        content: Text, written as UTF-8, or bytes.

    Raises:
        OSError: The file cannot be written; an existing file is left as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    handle, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    try:
        with open(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())  # else a power cut may leave the new name without content
        os.chmod(unfinished, 0o644)  # mkstemp makes the file private
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def reason_of(error: BaseException) -> str:
    """Shorten an error to the operating system's message in it, or else to its first line."""
    text = str(error)
    for code in errno.errorcode:
        if os.strerror(code) in text:
            return os.strerror(code)
    line = (text.splitlines() or [""])[0] or type(error).__name__
    return line if len(line) <= 120 else line[:117] + "..."


def check_regular(path: Path) -> None:
    """Raise a ValueError if the path is a pipe or a device, from which reading may block forever.

    Args:
        path: Path to check, which need not exist.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is no regular file: remove it, or copy the folder again")


def check_new_file(path: Path) -> None:
    """Check that an output file does not exist yet and can be created, before the work begins.

    Args:
        path: File to write; its folder need not exist yet.

    Raises:
        ValueError: The file exists, or its nearest existing parent is not a folder.
    """
    if path.exists():
        raise ValueError(f"{path} exists: choose another file, or delete it")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise ValueError(f"{path} can't be made, {nearest} is no folder: choose another place")


def new_folder(out: str) -> Path:
    """Check that a folder does not exist or is empty, and return its path.

    Args:
        out: Name of the folder; ~ is the user's home.

    Raises:
        ValueError: The folder is not empty, or is a file.
    """
    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{out} exists and is not empty: choose another --out")
    return folder

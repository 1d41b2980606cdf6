"""Files that are written whole or not at all, and why one could not be."""

import errno
import os
import tempfile
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file so that a kill or a full disk leaves the old content or the new one.

    Args:
        path: File to write, in a folder that exists.
        content: Text, written as UTF-8, or bytes.

    Raises:
        OSError: The file cannot be written; the old one is left as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    handle, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    try:
        with open(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())  # else a power cut may leave the new name without content
        os.chmod(unfinished, 0o644)  # a temporary file is private
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def reason_of(error: BaseException) -> str:
    """The operating system's message if the error has one in it; else its first line, cut."""
    text = str(error)
    for code in errno.errorcode:
        if os.strerror(code) in text:
            return os.strerror(code)
    line = (text.splitlines() or [""])[0] or type(error).__name__
    return line if len(line) <= 120 else line[:117] + "..."


def check_regular(path: Path) -> None:
    """Raise a ValueError for a pipe or a device, at which a reader may wait for ever."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is no regular file: remove it, or copy the folder again")


def check_new_file(path: Path) -> None:
    """Check a file that is written once work is done, before the work.

    Args:
        path: File to write; its folder is made later.

    Raises:
        ValueError: There is such a file, or something above it is no folder.
    """
    if path.exists():
        raise ValueError(f"{path} exists: choose another file, or delete it")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise ValueError(f"{path} can't be made, {nearest} is no folder: choose another place")


def new_folder(out: str) -> Path:
    """The folder of that name, which is empty or not there.

    Args:
        out: Name of the folder; ~ is the user's home.

    Raises:
        ValueError: It holds something, or is a file.
    """
    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{out} exists and is not empty: choose another --out")
    return folder

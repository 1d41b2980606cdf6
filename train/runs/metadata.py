"""Read the metadata of a run's checkpoint, and check the types of the metadata's fields."""

import os
import platform
import re
from collections.abc import Mapping
from typing import Any

from thoughtbubbles.fields import Fields
from train.data.mixture import is_mixture, parse_mixture
from train.runs.checkpoint import load_meta

EDITED = "it was edited, or another version of this library wrote it"
"""End of the error message for a field of a run's metadata that is missing or wrong."""


def load_run_meta(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read and check the metadata of the newest checkpoint; None if there is no checkpoint.

    Args:
        path: Run folder.

    Raises:
        ValueError: The metadata are damaged, or a field is missing or has another type.
    """
    meta = load_meta(path)
    return None if meta is None else checked_meta(meta, path)


def checked_meta(meta: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Check the fields of a run's metadata, and return the metadata unchanged.

    Args:
        meta: Metadata as read from the checkpoint.
        path: Run folder, for error messages.

    Raises:
        ValueError: A field is missing or has another type.
    """
    fields = Fields(meta, f"the metadata of {path}", EDITED, EDITED)
    for name in ("data_fingerprint", "tokenizer"):
        fields.text(name)
    fields.integer("step", least=0)
    for name in ("base", "python"):
        fields.text(name, None)
    for name in ("config", "resolved"):
        if meta.get(name) is None:
            fields.text(name)  # says that it is missing
        fields.object(name)
    for name in ("chat", "model", "rl", "sources"):
        if name in meta:
            fields.object(name)
    sources = Fields(meta.get("sources") or {}, f"the metadata of {path}: sources", EDITED, EDITED)
    for name in sources.names():
        sources.text(name)
    if chat := meta.get("chat"):
        _check_chat(Fields(chat, f"the metadata of {path}: chat", EDITED, EDITED))
    if rl := meta.get("rl"):
        Fields(rl, f"the metadata of {path}: rl", EDITED, EDITED).integer("step", least=0)
    return meta


_LIBRARY = re.compile(r"\s*([^()=]+=)?stdlib(\(\s*\))?\s*")
_STDLIB = re.compile(r"(?<![\w/.~-])stdlib(?![\w/.-])")


def rows_of_other_python(meta: Mapping[str, Any] | None) -> dict[str, str]:
    """Find the prepared rows of a run that were made from another Python's standard library.

    Args:
        meta: Metadata of the run's checkpoint; None if there is none.

    Returns:
        Mapping from the corpus, or from the names of a mixture's sources, to the fingerprints of
        these rows. Empty if the run was trained under this Python version.
    """
    if meta is None or meta.get("python") == platform.python_version():
        return {}
    corpus = str((meta["config"].get("data") or {}).get("corpus", ""))
    if not is_mixture(corpus):
        return {corpus: meta["data_fingerprint"]} if _LIBRARY.fullmatch(corpus) else {}
    texts, found = parse_mixture(corpus).sources, meta.get("sources") or {}
    return {name: found[name] for name, text in texts.items()
            if name in found and _LIBRARY.fullmatch(text)}  # fmt: skip


def why_other_data(meta: Mapping[str, Any]) -> str:
    """Return a hint, for an error message, that a run's corpus depends on the Python version.

    The corpus differs if it contains Python's standard library and the run used another version.

    Args:
        meta: Metadata of the run's checkpoint.

    Returns:
        Text of the hint; "" if the corpus does not contain the standard library, or if the run was
        trained under this Python version.
    """
    corpus = (meta["config"].get("data") or {}).get("corpus", "")
    now = platform.python_version()
    if not _STDLIB.search(str(corpus)) or meta.get("python") == now:
        return ""
    rows = list((meta.get("sources") or {}).values())
    if not rows and not is_mixture(str(corpus)):
        rows = [meta["data_fingerprint"]]
    folders = " and ".join(f"rows/{fingerprint}" for fingerprint in rows)
    copied = f", or copy the rows that it prepared, {folders} of its data cache"
    then = f"Python {meta['python']}" if meta.get("python") else "an interpreter it doesn't name"
    return (
        f" (stdlib is the library of the Python that runs: the run was trained under {then}, this "
        f"is Python {now}: take that one{copied if rows else ''})"
    )


def _check_chat(fields: Fields) -> None:
    known = {"name", "bos", "stop_tokens", "chat_template", "embedding_rows"}
    if unknown := sorted(set(fields.names()) - known):
        raise ValueError(f"{fields.source} has a field {unknown[0]!r}: {EDITED}")
    fields.text("name")
    fields.text("bos", None)
    fields.list("stop_tokens", str)
    fields.text("chat_template", None)
    fields.integer("embedding_rows", None)

"""Corpora of TensorFlow Datasets by name, read from disk and never downloaded."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data import splits
from train.data.config import DataError

_TEXT_FIELDS = ("text", "book_text", "passage", "article", "document", "content", "body")
_CHUNK = 64  # documents per read
_NAME = re.compile(r"(?P<name>\w+)(/[\w.\-]+)?(:\d+\.\d+\.\d+)?")


class TfdsCorpus:
    """Corpus of a data set of TensorFlow Datasets (TFDS), in its stored order.

    The data set's validation split is held out; without one its test split; without either a
    fraction of the training documents, chosen by a hash of their content.

    Args:
        spec: Name of the data set, as tfds:NAME[/CONFIG][:VERSION].
        validation: Fraction of the documents to hold out, if the data set has neither split.
        cache: Cache folder, whose subfolder `tfds` is searched first for the data set.

    Raises:
        DataError: The data set is unknown, not on disk, needs TensorFlow, or has no text field.
    """

    note = ""

    def __init__(self, spec: str, validation: float, cache: Path):
        self.name = spec
        self._builder: Any = _open(spec, cache)
        info = self._builder.info
        self._field = _text_field(spec, info.features)
        own = [name for name in ("validation", "test") if name in info.splits]
        self._held_out = own[0] if own else None
        self._validation = validation
        stored = sorted((s.name, s.num_examples, s.num_bytes) for s in info.splits.values())
        identity = f"{info.full_name} {stored} {self._field} {self._held_out or validation}"
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    def documents(self, split: str) -> Iterator[str]:
        for document in self._texts(self._stored(split)):
            side = split if self._held_out else splits.split_of(document, self._validation)
            if side == split and document.strip():
                yield document

    def count(self, split: str) -> int:
        return self._builder.info.splits[self._stored(split)].num_examples

    def _texts(self, stored: str) -> Iterator[str]:
        source = self._builder.as_data_source(stored)
        for start in range(0, len(source), _CHUNK):
            keys = range(start, min(start + _CHUNK, len(source)))
            for example in source.__getitems__(list(keys)):
                value = example[self._field]
                yield value.decode() if isinstance(value, bytes) else str(value)

    def _stored(self, split: str) -> str:
        return self._held_out if split == "validation" and self._held_out else "train"


def _open(spec: str, cache: Path):
    """Open the builder of a prepared data set, in cache/tfds or where TFDS keeps its data."""
    import tensorflow_datasets as tfds

    name = spec.removeprefix("tfds:")
    match = _NAME.fullmatch(name)
    if match is None:
        raise DataError(f"corpus {spec} is not a TFDS name: write tfds:NAME[/CONFIG][:VERSION]")
    # Without TensorFlow, TFDS doesn't look for names in this package: some of it needs TensorFlow.
    module = f"tensorflow_datasets.text.{match['name']}"
    with contextlib.suppress(ImportError):
        importlib.import_module(module)
    home = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    data_dir = next((d for d in (cache / "tfds", home) if (d / match["name"]).is_dir()), home)
    try:
        with quiet():
            builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].split('}": ')[-1].rstrip(".: ")
        raise DataError(
            f"cannot open {spec}: {reason}; names: https://www.tensorflow.org/datasets/catalog"
        ) from error
    imports = f"{module}, " if module in sys.modules else ""
    fetch = (
        f'python -c "import {imports}tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record')"
        '.download_and_prepare()"'
    )
    if "train" not in builder.info.splits:
        raise DataError(f"{spec} is not in {data_dir}: fetch it once with {fetch}")
    formats = sorted(stored.value for stored in builder.info.available_file_formats())
    if not {"array_record", "parquet"} & set(formats):
        raise DataError(
            f"{spec} is stored as {' '.join(formats)}, which needs TensorFlow: delete "
            f"{builder.data_path} and run {fetch}"
        )
    return builder


def _text_field(spec: str, features) -> str:
    for field in _TEXT_FIELDS:
        if field in features:
            return field
    raise DataError(
        f"{spec} has no field of running text ({', '.join(_TEXT_FIELDS)}) but "
        f"{', '.join(features)}: choose a corpus for language modelling"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context manager that keeps TFDS from printing to stdout and drawing progress bars."""
    import tensorflow_datasets as tfds

    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)

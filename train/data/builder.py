"""Local text as a TFDS data set, written and read without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from train.data import splits
from train.data.text_files import TextFiles

_CHUNK = 64  # documents per read


class LocalText(tfds.core.GeneratorBasedBuilder):
    """One example per document, which TFDS orders by a hash of its key, the content's digest."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, files: TextFiles, validation: float, **kwargs):
        self._files = files
        self._validation = validation
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        # dataset_info_from_configs, the usual way, looks for files beside the builder's module.
        features = tfds.features.FeaturesDict(
            {"text": tfds.features.Text(), "path": tfds.features.Text()}
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        owner: dict[bytes, str] = {}  # digest → first file that holds the document
        for file in tqdm(self._files.files, "reading", unit="file", leave=False, disable=None):
            for document in self._files.documents(file):
                owner.setdefault(splits.digest(document), file)
        train, validation = splits.divide(set(owner), self._validation, self._files.name)
        return {
            name: self._generate_examples({key: owner[key] for key in sorted(side)})
            for name, side in (("train", train), ("validation", validation))
        }

    def _generate_examples(self, owner: dict[bytes, str]):
        for file in sorted(set(owner.values())):
            for document in self._files.documents(file):
                key = splits.digest(document)
                if key in owner:
                    del owner[key]  # a lone file may repeat a section
                    path = os.fsencode(file).decode(errors="replace")  # names needn't be UTF-8
                    yield key.hex(), {"text": document, "path": path}


def prepare_text(files: TextFiles, validation: float, folder: Path) -> None:
    """Write the documents of text files as a TFDS data set (ArrayRecord).

    Args:
        files: Text files of the corpus.
        validation: Share of the documents to hold out, between 0 and 1.
        folder: Folder that the data set is written to.

    Raises:
        DataError: A file is not text, or there are fewer than two documents.
        OSError: The data cannot be written.
    """
    builder = LocalText(files, validation, data_dir=folder, file_format="array_record")
    with quiet():
        try:
            builder.download_and_prepare()
        except RuntimeError as error:  # what array_record raises when the disk is full
            raise OSError(str(error)) from error


class StoredText:
    """A text data set that `prepare_text` has written to a folder."""

    def __init__(self, folder: Path):
        self._builder = tfds.builder_from_directory(
            folder / LocalText.name / str(LocalText.VERSION)
        )

    def documents(self, split: str) -> Iterator[str]:
        return texts(self._builder, split, "text")

    def count(self, split: str) -> int:
        return self._builder.info.splits[split].num_examples


def texts(builder: Any, split: str, field: str) -> Iterator[str]:
    """Texts of a prepared TFDS split, in stored order.

    Args:
        builder: Builder of the data set.
        split: Name of the split.
        field: Name of the field that holds the text.
    """
    source = builder.as_data_source(split)
    for start in range(0, len(source), _CHUNK):
        keys = range(start, min(start + _CHUNK, len(source)))
        for example in source.__getitems__(list(keys)):
            value = example[field]
            yield value.decode() if isinstance(value, bytes) else str(value)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence TFDS, which announces a download on stdout and draws progress bars."""
    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)

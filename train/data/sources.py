"""Registry of text sources, and the parser of the text in `--data.corpus` that names a source."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Protocol

from thoughtbubbles.registry import Registry
from train.cli.calls import from_text, required_options
from train.data.config import DataError
from train.data.corpus import Corpus
from train.data.local import LocalCorpus
from train.data.text_files import find_text_files, standard_library
from train.data.tfds_names import TfdsCorpus


class Source(Protocol):
    """A source of text: a frozen dataclass whose fields are the options of the source."""

    def open(self, validation: float, cache: Path) -> Corpus:
        """Open the corpus of this source.

        Args:
            validation: Fraction of the documents to hold out, if the source has no split of its
                own.
            cache: Folder that prepared corpora are kept in.

        Raises:
            DataError: The corpus does not exist, or is empty.
        """
        ...


@dataclasses.dataclass(frozen=True)
class StandardLibrary:
    """The source text of Python's standard library, found on every machine with Python."""

    def open(self, validation: float, cache: Path) -> Corpus:
        return LocalCorpus(standard_library(), validation, cache)


@dataclasses.dataclass(frozen=True)
class Files:
    """Files on disk: text, or records with a field of text (JSON Lines, Parquet, Arrow).

    Attributes:
        path: Folder of files, or one file.
        field: Name of the record field that holds the text.
        suffixes: Suffixes of the files to read in a folder, separated by spaces; "" reads records
            if the folder has any, else text (`text_files.find_text_files`).
        encoding: Encoding of files without a byte order mark.
    """

    path: str
    field: str = "text"
    suffixes: str = ""
    encoding: str = "utf-8"

    def open(self, validation: float, cache: Path) -> Corpus:
        files = find_text_files(self.path, self.field, self.suffixes, self.encoding)
        return LocalCorpus(files, validation, cache)


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A data set that TensorFlow Datasets has prepared on disk; TensorFlow is not imported.

    Attributes:
        name: Name of the data set, as NAME[/CONFIG][:VERSION].
    """

    name: str

    def open(self, validation: float, cache: Path) -> Corpus:
        return TfdsCorpus(f"tfds:{self.name}", validation, cache)


SOURCES = Registry[Any]("corpus", {"stdlib": StandardLibrary, "files": Files, "tfds": Tfds})
"""Mapping from a source's name on the command line to its class; a `--plugin` may add sources."""


def source_from_text(text: str) -> Source:
    """Parse the text of `DataConfig.corpus` as a source.

    Args:
        text: Name in `SOURCES`, with options in brackets if it has any: "stdlib",
            "tfds(name='lm1b')"; or, for short, "tfds:lm1b" or the path of a folder or file. A
            folder with the same name as a source without required options is written "./name".

    Raises:
        DataError: The text is a mixture, or names an unknown source or option, or a value has the
            wrong type.
    """
    if re.match(r"mix\s*\(", text):
        raise DataError(f"{text} is a mixture, which pretraining alone takes: name one source")
    if text.startswith("tfds:"):
        return Tfds(text.removeprefix("tfds:"))
    name = text.partition("(")[0]
    is_call = re.fullmatch(r"\w+\(.*\)", text) is not None
    if text in SOURCES:
        by_name = not required_options(SOURCES[text])
    else:
        by_name = is_call and (name in SOURCES or not Path(text).exists())
    if not by_name:
        return Files(text)
    try:
        return from_text(text, SOURCES, "corpus")
    except ValueError as error:
        raise DataError(str(error)) from None


def open_corpus(text: str, validation: float, cache: Path) -> Corpus:
    """Open the corpus that `DataConfig.corpus` names.

    Args:
        text: Source of the corpus, as `source_from_text` reads it.
        validation: Fraction of the documents to hold out, if the source has no split of its own.
        cache: Folder that prepared corpora are kept in.

    Raises:
        DataError: The source is unknown, or its corpus does not exist or is empty.
    """
    return source_from_text(text).open(validation, cache)

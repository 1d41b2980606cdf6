"""Data pipeline: corpora, tokenizers, sequence packing, and readers of batches by step number.

`prepare(config)` tokenises and packs a corpus once, or each source of a mixture of corpora
(`train.data.mixture`). `TrainReader`, `MixtureReader` and `evaluation_batches` read packed rows.
`prepare_chat(config, tokenizer)` turns conversations into rows, which `ChatReader` reads.
A user's mistake raises a `DataError`.
"""

from train.data.chat_data import (
    ChatData,
    ChatDataConfig,
    ChatReader,
    ChatRows,
    prepare_chat,
    segment_mask,
)
from train.data.config import DataConfig, DataError
from train.data.corpus import Corpus, SplitCorpus
from train.data.mixture import Mixture, MixtureData, MixtureReader, mix, parse_mixture, prepare
from train.data.packing import PackedRows
from train.data.prepared import PackedData, stored_rows
from train.data.reader import Batch, TrainReader, evaluation_batches
from train.data.schedule import interpolate
from train.data.sources import SOURCES, Source, open_corpus
from train.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "SOURCES",
    "Batch",
    "ByteTokenizer",
    "ChatData",
    "ChatDataConfig",
    "ChatReader",
    "ChatRows",
    "Corpus",
    "DataConfig",
    "DataError",
    "HuggingFaceTokenizer",
    "Mixture",
    "MixtureData",
    "MixtureReader",
    "PackedData",
    "PackedRows",
    "Source",
    "SplitCorpus",
    "Tokenizer",
    "TrainReader",
    "evaluation_batches",
    "interpolate",
    "load_tokenizer",
    "mix",
    "open_corpus",
    "parse_mixture",
    "prepare",
    "prepare_chat",
    "segment_mask",
    "stored_rows",
]

"""Text to batches: corpora, tokenizers, packing, and a reader whose position is the step number.

`prepare(config)` tokenises and packs a corpus once; `TrainReader` and `evaluation_batches` read it.
`prepare_chat(config, tokenizer)` does so with conversations, which `ChatReader` reads.
A user's mistake is a `DataError`.
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
from train.data.packing import PackedRows
from train.data.prepared import PackedData, prepare
from train.data.reader import Batch, TrainReader, evaluation_batches
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
    "PackedData",
    "PackedRows",
    "Source",
    "SplitCorpus",
    "Tokenizer",
    "TrainReader",
    "evaluation_batches",
    "load_tokenizer",
    "open_corpus",
    "prepare",
    "prepare_chat",
    "segment_mask",
]

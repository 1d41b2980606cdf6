"""Train a byte-level BPE tokenizer on a corpus."""

import sys
from typing import TYPE_CHECKING

from train.data.config import DataError
from train.data.corpus import Corpus
from train.data.tokenizers import SEPARATORS

if TYPE_CHECKING:
    import tokenizers

SMALLEST = 256 + 1  # every byte, and the separator


def train_tokenizer(corpus: Corpus, vocab_size: int) -> "tokenizers.Tokenizer":
    """Train a byte-level BPE tokenizer; equal corpora give equal tokenizers.

    Args:
        corpus: Corpus on whose training split the tokenizer is trained.
        vocab_size: Maximum size of the vocabulary; a small corpus gives fewer tokens.

    Raises:
        DataError: `vocab_size` is below 257, the number of bytes and the separator.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST:
        raise DataError(
            f"vocab_size={vocab_size} is below {SMALLEST} (256 bytes and a separator): "
            f"choose {SMALLEST} or more"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATORS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    documents = corpus.documents("train")
    tokenizer.train_from_iterator(documents, trainer, length=corpus.count("train"))
    return tokenizer

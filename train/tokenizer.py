"""Train a byte-level BPE tokenizer on the training split of a corpus.

python -m train.tokenizer --corpus stdlib --vocab-size 4096 --out tokenizer.json
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from train.cli.command import run_command
from train.cli.numbers import check_least
from train.data import DataConfig, DataError, HuggingFaceTokenizer, open_corpus
from train.data.bpe import SMALLEST, train_tokenizer
from train.data.config import check_rows
from train.runs.files import write_atomically


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Train a byte-level BPE tokenizer on the training split of a corpus."""

    corpus: str = DataConfig.corpus
    """Source of the text: "stdlib", the path of a folder or file, or "tfds:NAME[/CONFIG]"."""

    vocab_size: int = 4096
    """Number of tokens of the vocabulary, including the 256 bytes and the separator."""

    out: Path = Path("tokenizer.json")
    """File to write; an existing file is replaced."""

    validation: float = DataConfig.validation
    """Fraction of the documents that is held out; runs with the tokenizer should use the same."""

    cache_dir: str | None = None
    """Folder of prepared data; ${XDG_CACHE_HOME:-~/.cache}/thoughtbubbles/data by default."""

    def __post_init__(self):
        check_least(self, vocab_size=SMALLEST)
        check_rows(DataConfig.seq_len, self.validation, DataConfig.seed)
        object.__setattr__(self, "out", self.out.expanduser())


def run(config: TokenizerConfig) -> str:
    """Train a tokenizer, save it, and measure it on held-out documents.

    Returns:
        Line of text with the vocabulary size, and the bytes per token of held-out documents.

    Raises:
        DataError: The corpus cannot be used, or the file cannot be written.
    """
    data = DataConfig(
        corpus=config.corpus, validation=config.validation, cache_dir=config.cache_dir
    )
    if config.out.is_dir() or not config.out.absolute().parent.is_dir():  # before hours of training
        why = "it is a folder" if config.out.is_dir() else "its folder does not exist"
        raise DataError(f"cannot write {config.out}: {why}; choose another --out")
    corpus = open_corpus(data.corpus, data.validation, data.cache)
    trained = train_tokenizer(corpus, config.vocab_size).to_str(pretty=True)
    try:
        write_atomically(config.out, trained)
    except OSError as error:
        raise DataError(f"cannot write {config.out}: {error}; choose another --out") from error
    tokenizer = HuggingFaceTokenizer(config.out)
    tokens = sizes = 0
    for document in corpus.documents("validation"):
        ids, lengths = tokenizer.encode(document)
        tokens += len(ids)
        sizes += int(lengths.sum())
    short = f" of {config.vocab_size} (the corpus has no more pairs)"
    return (
        f"{config.out}: vocabulary {tokenizer.vocab_size}"
        f"{short if tokenizer.vocab_size < config.vocab_size else ''}, "
        f"{sizes / max(tokens, 1):.2f} bytes per token on the validation split of {corpus.name}"
    )


def main(config: TokenizerConfig) -> None:
    print(run(config))


def command() -> None:
    run_command(main, TokenizerConfig)


if __name__ == "__main__":
    command()

"""Retrieval: passages of local text for the weaver to read when it writes a memory."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Retriever(Protocol):
    """Finds snippets for a batch of queries, on the host, in fixed shapes.

    Equal queries get equal answers, whatever else is in the batch: generation calls it from
    within a compiled loop and counts on that.

    Attributes:
        max_tokens: `Lc`, the longest answer.
    """

    @property
    def max_tokens(self) -> int: ...

    def __call__(
        self, ids: np.ndarray, length: np.ndarray, asks: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Snippets for the text so far of each row.

        Args:
            ids: `[B, T]` int32 tokens, padded on the right.
            length: `[B]` int32 real tokens of each row.
            asks: `[B]` bool, rows that want an answer; the others get length 0.

        Returns:
            Tokens `[B, Lc]` int32, 0 beyond the length, and lengths `[B]` int32; 0 says that
            nothing fits.
        """
        ...


def retrieve(
    retriever: Retriever, ids: jax.Array, length: jax.Array, asks: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Ask a retriever from compiled code; arguments and results as in `Retriever.__call__`."""
    batch, size = ids.shape[0], retriever.max_tokens

    def on_host(ids, length, asks) -> tuple[np.ndarray, np.ndarray]:
        # Arrays of jax come in; work on them in here could wait for the program that waits for us.
        found, found_length = retriever(np.asarray(ids), np.asarray(length), np.asarray(asks))
        return np.asarray(found, np.int32), np.asarray(found_length, np.int32)

    shapes = (
        jax.ShapeDtypeStruct((batch, size), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    return jax.pure_callback(on_host, shapes, ids, length, asks)


class BM25Retriever:
    """The passages that share the rarest words with the text so far (BM25). Needs bm25s.

    A snippet is the beginning of its passage; snippets follow one another, best first. A passage
    without a word in common is never one, so there may be fewer than `top`, or none.

    Args:
        passages: texts to choose from.
        encode: text to token ids.
        decode: token ids to text.
        top: P, snippets of an answer.
        max_snippet_tokens: a longer snippet is cut there.

    Attributes:
        passages, top, max_snippet_tokens: as given.

    Raises:
        ValueError: no passage holds a word, `top` or `max_snippet_tokens` is below 1, or bm25s is
            missing.
    """

    def __init__(
        self,
        passages: Sequence[str],
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[Sequence[int]], str],
        *,
        top: int = 3,
        max_snippet_tokens: int = 64,
    ):
        if top < 1:
            raise ValueError(f"top={top}: choose 1 passage or more")
        if max_snippet_tokens < 1:
            raise ValueError(f"max_snippet_tokens={max_snippet_tokens}: choose 1 or more")
        try:
            import bm25s
        except ImportError as error:
            raise ValueError(
                'BM25Retriever needs bm25s: pip install "thoughtbubbles[memgen]"'
            ) from error
        words = [_words(passage) for passage in passages]
        if not any(words):
            raise ValueError(f"{len(passages)} passages without a word: give some text")
        self.passages, self.top, self.max_snippet_tokens = tuple(passages), top, max_snippet_tokens
        self._encode, self._decode = encode, decode
        self._index = bm25s.BM25()
        self._index.index(words, show_progress=False)
        self._known = frozenset(word for passage in words for word in passage)

    @classmethod
    def from_files(
        cls,
        paths: Sequence[str | Path],
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[Sequence[int]], str],
        *,
        passage_words: int = 100,
        top: int = 3,
        max_snippet_tokens: int = 64,
    ) -> "BM25Retriever":
        """From text files, and from .jsonl files with one object with a `text` in each line.

        Args:
            paths: files of UTF-8 text; each, or each line of a .jsonl file, is one document.
            passage_words: documents are cut into passages of so many words.

        Raises:
            ValueError: a file cannot be read, or a reason of the constructor.
        """
        if passage_words < 1:
            raise ValueError(f"passage_words={passage_words}: choose 1 or more")
        passages = [
            passage
            for path in paths
            for document in _documents(Path(path))
            for passage in _cut(document, passage_words)
        ]
        if not passages:
            names = ", ".join(map(str, paths)) or "no files"
            raise ValueError(f"no passages in {names}: give files with text")
        return cls(passages, encode, decode, top=top, max_snippet_tokens=max_snippet_tokens)

    @property
    def max_tokens(self) -> int:
        return self.top * self.max_snippet_tokens

    def best(self, query: str) -> list[int]:
        """Indices of at most `top` passages that share a word with the query, best first."""
        words = [word for word in _words(query) if word in self._known]
        if not words:
            return []
        scores = self._index.get_scores(words)
        order = np.argsort(-scores, kind="stable")  # of equal ones the first in the files
        return [int(index) for index in order[: self.top] if scores[index] > 0]

    def __call__(
        self, ids: np.ndarray, length: np.ndarray, asks: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `Retriever.__call__`."""
        found = np.zeros((len(ids), self.max_tokens), np.int32)
        found_length = np.zeros(len(ids), np.int32)
        for row in np.flatnonzero(asks):
            tokens: list[int] = []
            for index in self.best(self._decode(ids[row, : length[row]].tolist())):
                tokens += list(self._encode(self.passages[index]))[: self.max_snippet_tokens]
            found[row, : len(tokens)] = tokens
            found_length[row] = len(tokens)
        return found, found_length


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _cut(document: str, words: int) -> Iterator[str]:
    """Passages of so many words (the last may be shorter), with the white space between them."""
    spans = [match.span() for match in re.finditer(r"\S+", document)]
    for start in range(0, len(spans), words):
        yield document[spans[start][0] : spans[min(start + words, len(spans)) - 1][1]]


def _documents(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}; give files of UTF-8 text") from error
    if path.suffix != ".jsonl":
        return [text]
    documents = []
    # Not splitlines: JSON may hold other line ends, such as U+2028, unescaped.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f'{path} line {number} is no object with a "text": {line[:40]!r}'
            ) from error
        if not isinstance(document, str):
            raise ValueError(f'{path} line {number}: "text" is {document!r}, give a string')
        documents.append(document)
    return documents

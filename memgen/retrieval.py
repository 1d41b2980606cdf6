"""Retrieval: passages of local text that are added to the weaver's context at an event."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Retriever(Protocol):
    """Finds snippets for a batch of queries, on the host, in fixed shapes.

    A snippet must depend on its query alone, not on the rest of the batch: generation queries from
    within a compiled loop and relies on that. A retriever must be hashable, because it is a static
    part of the compiled program.

    Attributes:
        max_snippet_tokens: Largest number `Lc` of tokens of a snippet.
    """

    @property
    def max_snippet_tokens(self) -> int: ...

    def retrieve(
        self, ids: np.ndarray, length: np.ndarray, queried: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Snippets for the text so far of each row.

        Args:
            ids: `[B, T]` int32 token ids, padded on the right. All three arrays may be JAX arrays:
                convert them to NumPy first, since JAX may wait for the running program, which
                waits for this call.
            length: `[B]` int32, number of real tokens of each row.
            queried: `[B]` bool, rows that need a snippet; the others get length 0.

        Returns:
            Snippets `[B, Lc]` int32, padded on the right by 0, and their lengths `[B]` int32; 0
            where nothing was found.
        """
        ...


class BM25Retriever:
    """The passages that share the rarest words with the text so far (BM25). Needs bm25s.

    A snippet is the best passages, best first, cut at `max_snippet_tokens`. Passages without a word
    of the text are left out, so there may be fewer than `top`, or none.

    Args:
        passages: Texts to choose from.
        encode: Function from text to token ids.
        decode: Function from token ids to text.
        top: Number P of passages of a snippet.
        max_snippet_tokens: Largest number of tokens of a snippet.

    Attributes:
        passages: Texts to choose from.
        top: Number P of passages of a snippet.
        max_snippet_tokens: Largest number of tokens of a snippet.

    Raises:
        ValueError: No passage holds a word, `top` or `max_snippet_tokens` is below 1, or bm25s is
            missing.
    """

    def __init__(
        self,
        passages: Sequence[str],
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[Sequence[int]], str],
        *,
        top: int = 3,
        max_snippet_tokens: int = 256,
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
        passage_words: int = 64,
        top: int = 3,
        max_snippet_tokens: int = 256,
    ) -> "BM25Retriever":
        """A retriever of text files and of .jsonl files with a `text` in the object of each line.

        Args:
            paths: Files of UTF-8 text; a text file, or a line of a .jsonl file, is one document.
            encode: Function from text to token ids.
            decode: Function from token ids to text.
            passage_words: Number of words of a passage; documents are cut into passages.
            top: Number P of passages of a snippet.
            max_snippet_tokens: Largest number of tokens of a snippet.

        Raises:
            ValueError: A file cannot be read, or a reason of the constructor.
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

    def best(self, query: str) -> list[int]:
        """Indices of at most `top` passages that share a word with the query, best first."""
        words = [word for word in _words(query) if word in self._known]
        if not words:
            return []
        scores = self._index.get_scores(words)
        order = np.argsort(-scores, kind="stable")  # ties go to the earlier passage
        return [int(index) for index in order[: self.top] if scores[index] > 0]

    def retrieve(
        self, ids: np.ndarray, length: np.ndarray, queried: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Snippets for the text so far of each row (`Retriever.retrieve`)."""
        ids, length = np.asarray(ids), np.asarray(length)
        found = np.zeros((len(ids), self.max_snippet_tokens), np.int32)
        found_length = np.zeros(len(ids), np.int32)
        for row in np.flatnonzero(np.asarray(queried)):
            tokens: list[int] = []
            for index in self.best(self._decode(ids[row, : length[row]].tolist())):
                tokens += self._encode(self.passages[index])
            tokens = tokens[: self.max_snippet_tokens]
            found[row, : len(tokens)] = tokens
            found_length[row] = len(tokens)
        return found, found_length


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _cut(document: str, words: int) -> Iterator[str]:
    """Passages of `words` words, the last may be shorter, with the white space between words."""
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
    # splitlines would also split at other line ends, such as U+2028, which JSON may hold.
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

"""Retrieval of passages from local text, which are added to the weaver's context at an event."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Retriever(Protocol):
    """Interface of retrievers, which find a snippet of text for each row of a batch, on the host.

    A row's snippet must depend on the row's text alone, not on other rows of the batch, because
    generation queries the retriever from within a compiled loop. A retriever must be hashable,
    because the retriever is a static part of the compiled program.

    Attributes:
        max_snippet_tokens: Maximum number `Lc` of tokens of a snippet.
    """

    @property
    def max_snippet_tokens(self) -> int: ...

    def retrieve(
        self, ids: np.ndarray, length: np.ndarray, queried: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find a snippet for each queried row, given the row's text so far.

        All three arguments may be JAX arrays. An implementation must convert them to NumPy first: a
        JAX operation may wait for the running program, which waits for this call.

        Args:
            ids: `[B, T]` int32 token ids of each row's text so far (prompt, responses, and tokens
                from outside), padded on the right.
            length: `[B]` int32, number of real tokens in each row.
            queried: `[B]` bool, True for rows that need a snippet. A row that waits to weave (see
                `memgen.decoding`) may be queried several times with the same text.

        Returns:
            Token ids of the snippets, `[B, Lc]` int32, padded on the right with 0, and the number
            of tokens of each snippet, `[B]` int32: 0 for rows that were not queried or for which
            nothing was found.
        """
        ...


class BM25Retriever:
    """Retriever that ranks passages by BM25, a score of the words that a passage and a text share.

    In the score, rare words count more. A snippet is the concatenation of the `top` passages, best
    first, truncated to `max_snippet_tokens`. Passages that share no word with the text are left
    out, so a snippet may have fewer than `top` passages, or none. Needs bm25s.

    Args:
        passages: Texts to choose from.
        encode: Function from text to token ids.
        decode: Function from token ids to text.
        top: Maximum number of passages of a snippet (P).
        max_snippet_tokens: Maximum number of tokens of a snippet.

    Attributes:
        passages: Texts to choose from.
        top: Maximum number of passages of a snippet (P).
        max_snippet_tokens: Maximum number of tokens of a snippet.

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
        if isinstance(passages, str):
            raise ValueError("passages are one str: give a list of texts, such as [text]")
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
        """Make a retriever over the documents of some files.

        Args:
            paths: Paths of UTF-8 files. In a .jsonl file, each line is a JSON object whose string
                `text` is a document. Any other file is one document.
            encode: Function from text to token ids.
            decode: Function from token ids to text.
            passage_words: Number of words of the passages into which documents are split.
            top: Maximum number of passages of a snippet (P).
            max_snippet_tokens: Maximum number of tokens of a snippet.

        Raises:
            ValueError: A file cannot be read or parsed, the files hold no text, `passage_words` is
                below 1, or the constructor raises a ValueError.
        """
        if isinstance(paths, str | Path):
            raise ValueError(
                f"paths={str(paths)!r}: give a list of paths, such as [{str(paths)!r}]"
            )
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
        """Return indices of up to `top` passages that share a word with the query, best first."""
        words = [word for word in _words(query) if word in self._known]
        if not words:
            return []
        scores = self._index.get_scores(words)
        order = np.argsort(-scores, kind="stable")  # ties go to the earlier passage
        return [int(index) for index in order[: self.top] if scores[index] > 0]

    def retrieve(
        self, ids: np.ndarray, length: np.ndarray, queried: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find a snippet for each queried row, as specified by `Retriever.retrieve`."""
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
    """Split a document into passages of `words` words (fewer in the last), with all spaces kept."""
    spans = [match.span() for match in re.finditer(r"\S+", document)]
    for start in range(0, len(spans), words):
        yield document[spans[start][0] : spans[min(start + words, len(spans)) - 1][1]]


def _documents(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # without the mark of its byte order
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

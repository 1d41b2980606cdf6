"""Passages by BM25, in plain Python: an index that an episode's search tool asks."""

import collections
import math
import re
from collections.abc import Sequence


class BM25Index:
    """Ranks passages by the words that they share with a query.

    The score of a passage is the sum over the query's words of `idf · tf (k1 + 1) / (tf + k1 (1 - b
    + b · length / mean length))`, `idf = ln(1 + (N - df + 0.5) / (df + 0.5))`.

    Args:
        passages: Texts to choose from.
        k1: Saturation of the number of times that a word occurs.
        b: Share of the normalisation by length.

    Attributes:
        passages: Texts to choose from.

    Raises:
        ValueError: No passage holds a word.
    """

    def __init__(self, passages: Sequence[str], k1: float = 1.5, b: float = 0.75):
        self.passages = tuple(passages)
        words = [words_of(passage) for passage in passages]
        if not any(words):
            raise ValueError(f"{len(passages)} passages without a word: give some text")
        mean = sum(map(len, words)) / len(words)
        self._postings: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
        for index, found in enumerate(words):
            norm = k1 * (1 - b + b * len(found) / mean)
            for word, count in collections.Counter(found).items():
                self._postings[word].append((index, count * (k1 + 1) / (count + norm)))

    def scores(self, query: str) -> dict[int, float]:
        """Score of each passage that shares a word with the query, by its index."""
        found: dict[int, float] = collections.defaultdict(float)
        for word in words_of(query):
            postings = self._postings.get(word, [])
            rest = len(self.passages) - len(postings)
            for index, weight in postings:
                found[index] += weight * math.log(1 + (rest + 0.5) / (len(postings) + 0.5))
        return found

    def search(self, query: str, top: int = 1) -> list[str]:
        """The best passages, best first, the earlier first of equal ones; none without a word."""
        found = self.scores(query)
        best = sorted(found, key=lambda index: (-found[index], index))[:top]
        return [self.passages[index] for index in best]


def words_of(text: str) -> list[str]:
    """Words of a text in lower case."""
    return re.findall(r"\w+", text.lower())

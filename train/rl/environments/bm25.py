"""BM25 ranking of passages in plain Python, for the search tool of an environment."""

import collections
import math
import re
from collections.abc import Sequence


class BM25Index:
    """Index that ranks passages by the words that they share with a query.

    The score of a passage is the sum over the query's words of `idf · tf (k1 + 1) / (tf + k1 (1 - b
    + b · length / mean length))`, where `idf = ln(1 + (N - df + 0.5) / (df + 0.5))`, `tf` is how
    often the word occurs in the passage, `df` is the number of passages that contain the word, and
    `N` is the number of all passages.

    Args:
        passages: Texts to rank.
        k1: Saturation of `tf`: with a larger value, repetitions of a word count for more.
        b: Strength of the normalisation by length, from 0 (none) to 1 (full).

    Attributes:
        passages: Texts to rank.

    Raises:
        ValueError: No passage contains a word.
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
        """Score the passages for a query.

        Returns:
            A dict from the index of a passage to its score. Passages that share no word with the
            query are left out.
        """
        found: dict[int, float] = collections.defaultdict(float)
        for word in words_of(query):
            postings = self._postings.get(word, [])
            rest = len(self.passages) - len(postings)
            for index, weight in postings:
                found[index] += weight * math.log(1 + (rest + 0.5) / (len(postings) + 0.5))
        return found

    def search(self, query: str, top: int = 1) -> list[str]:
        """Return up to `top` passages with the highest scores, the best first.

        Passages that share no word with the query are never returned. Passages of equal score keep
        their order in `passages`.
        """
        found = self.scores(query)
        best = sorted(found, key=lambda index: (-found[index], index))[:top]
        return [self.passages[index] for index in best]


def words_of(text: str) -> list[str]:
    """Split a text into its words, in lower case and without punctuation."""
    return re.findall(r"\w+", text.lower())

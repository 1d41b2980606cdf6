"""Label text segments cheaply: by rules, or by a small classifier trained on labelled segments."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from train.data.config import DataError
from train.data.json_lines import read_json_lines
from train.data.splits import held_out as is_held_out
from train.data.text_files import standard_library

SEGMENT = 1024
"""Number of characters per segment."""

_BUCKETS = 1 << 12
_PENALTY = 1e-3
_WORD = re.compile(r"\w+|[^\w\s]")

RULES: Mapping[str, tuple[str, float]] = {
    "code": (r"[=(){}\[\];]|\b(?:def|return|import|self|None|int|void)\b", 0.12),
    "prose": (r"\b(?:the|of|and|is|to|that|which|with|are|be)\b", 0.08),
    "reasoning": (
        r"\b(?:because|therefore|thus|hence|if|then|else|so|since|implies|assume|suppose|let|proof"
        r"|prove|follows|return|while|for)\b|[=<>+*/]",
        0.08,
    ),
    "visual": (
        r"\b(?:red|green|blue|white|black|yellow|brown|gr[ea]y|dark|bright|light|colou?r|round|square"
        r"|tall|long|left|right|above|below|behind|beside|look\w*|see[ns]?|saw|eyes?|face|sky|shape"
        r"|shadow|shin\w+|gl[eo]am\w*)\b",
        0.03,
    ),
}
"""Pattern and threshold of each label. A segment has the label if the pattern matches at least
threshold x n times, where n is the number of words and punctuation marks of the segment."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """A piece of text and its labels.

    Attributes:
        text: The text.
        labels: Names of the labels that the text has.
    """

    text: str
    labels: frozenset[str]


def segments(documents: Iterable[str], size: int = SEGMENT) -> Iterator[str]:
    """Cut documents into segments of equal size; short documents are joined to fill a segment.

    Args:
        documents: Documents in any order. Documents shorter than half a segment are joined, with
            an empty line between them, and text beyond a full segment is dropped.
        size: Number of characters per segment. The last segment of a document may be shorter; a
            segment of less than half of `size` is dropped.
    """
    short = ""
    for document in documents:
        if len(document) >= size // 2:
            yield from _pieces(document, size)
        elif document.strip():
            short = f"{short}\n\n{document}" if short else document
            if len(short) >= size:
                yield short[:size]
                short = ""
    yield from _pieces(short, size)


def _pieces(text: str, size: int) -> Iterator[str]:
    for start in range(0, len(text), size):
        piece = text[start : start + size]
        if len(piece) >= size // 2 and piece.strip():
            yield piece


def by_rules(text: str, label: str) -> bool:
    """Whether a segment has a label by its rule in `RULES`."""
    pattern, share = RULES[label]
    words = max(len(_WORD.findall(text)), 1)
    return len(re.findall(pattern, text, re.IGNORECASE)) >= share * words


class Classifier:
    """Logistic regression for each label, on hashed words and pairs of neighbouring words.

    Args:
        examples: Labelled segments.
        labels: Names of the labels.
    """

    def __init__(self, examples: Sequence[Segment], labels: Sequence[str]):
        self.labels = tuple(labels)
        features = np.stack([_features(example.text) for example in examples])
        has = [[label in example.labels for label in labels] for example in examples]
        self._weights = [_fit(features, column) for column in np.array(has, np.float64).T]

    def __call__(self, text: str) -> frozenset[str]:
        """Predict the labels of a segment."""
        features = _features(text)
        both = zip(self.labels, self._weights, strict=True)
        return frozenset(label for label, weights in both if features @ weights > 0)


def _features(text: str) -> np.ndarray:
    """Compute log(1 + count) of hashed words and pairs, with L2 norm 1, and a 1 for the bias."""
    words = _WORD.findall(text.lower())
    counts = np.zeros(_BUCKETS + 1)
    for gram in (*words, *map(" ".join, zip(words, words[1:], strict=False))):
        digest = hashlib.blake2b(gram.encode("utf-8", "replace"), digest_size=4).digest()
        counts[int.from_bytes(digest) % _BUCKETS] += 1
    counts = np.log1p(counts)
    counts /= max(float(np.linalg.norm(counts)), 1e-9)
    counts[-1] = 1
    return counts


def _fit(features: np.ndarray, has: np.ndarray) -> np.ndarray:
    """Fit weights that minimise the logistic loss with an L2 penalty."""
    from scipy.optimize import minimize

    sign = 2 * has - 1

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (features @ weights)
        value = np.logaddexp(0, -margin).mean() + _PENALTY * (weights[:-1] @ weights[:-1]) / 2
        slope = features.T @ (-sign * np.exp(-np.logaddexp(0, margin))) / len(sign)
        slope[:-1] += _PENALTY * weights[:-1]
        return float(value), slope

    return minimize(loss, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B").x


@dataclasses.dataclass(frozen=True)
class Score:
    """Quality of the predictions of one label.

    Attributes:
        accuracy: Fraction of segments whose prediction is correct.
        f1: Harmonic mean of precision and recall; 0 if there are no true positives.
    """

    accuracy: float
    f1: float


def score(found: Sequence[bool], has: Sequence[bool]) -> Score:
    """Compute accuracy and F1 of the predictions of a label.

    Args:
        found: Whether each segment is predicted to have the label.
        has: Whether each segment has the label.
    """
    given, true = np.array(found, bool), np.array(has, bool)
    both = given.sum() + true.sum()
    return Score(float((given == true).mean()), float(2 * (given & true).sum() / max(both, 1)))


def divided(examples: Iterable[Segment], share: float = 0.3) -> tuple[list[Segment], list[Segment]]:
    """Divide segments into training and held-out segments by a hash of their text.

    Args:
        examples: Labelled segments.
        share: Fraction of segments that is held out.

    Returns:
        List of the training segments, and list of the held-out segments.

    Raises:
        DataError: One of the two lists is empty.
    """
    parts: tuple[list[Segment], list[Segment]] = ([], [])
    for example in examples:
        key = hashlib.blake2b(example.text.encode("utf-8", "replace"), digest_size=8).digest()
        parts[is_held_out(key, share)].append(example)
    if not all(parts):
        count = sum(map(len, parts))
        raise DataError(f"{count} labelled segments cannot be divided in two: give some dozens")
    return parts


def read_labelled(path: Path) -> list[Segment]:
    """Read labelled segments from a JSON Lines file of objects with "text" and "labels".

    Raises:
        DataError: The file cannot be read, or an object has no list of labels.
    """
    found = []
    for line in read_json_lines(path, ["text"]):
        labels = line.fields.get("labels")
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise DataError(f'{line.where}: the field "labels" is {labels!r}: give a list of names')
        found.append(Segment(line.fields["text"], frozenset(labels)))
    return found


def standard_library_segments(limit: int, of_file: int = 5) -> list[Segment]:
    """Label segments of Python's standard library as "prose" or "code", by Python's tokenizer.

    A segment is prose if at least half of its characters, white space not counted, are in comments
    and multi-line strings; all other segments are code.

    Args:
        limit: Maximum number of segments.
        of_file: Maximum number of segments of one file, spread over the file.
    """
    source = standard_library()
    found: list[Segment] = []
    for file in sorted(source.files, key=lambda file: hashlib.md5(file.encode()).digest()):
        if len(found) >= limit:
            break
        text = (source.root / file).read_text(encoding="utf-8", errors="replace")
        try:
            is_prose = prose_characters(text)
        except (tokenize.TokenError, SyntaxError):  # syntax of another Python version
            continue
        starts = range(0, len(text) - SEGMENT, SEGMENT)
        for start in starts[:: max(1, -(-len(starts) // of_file))]:
            part = slice(start, start + SEGMENT)
            both = zip(text[part], is_prose[part], strict=True)
            ink = [prose for sign, prose in both if not sign.isspace()]
            label = "prose" if 2 * sum(ink) >= len(ink) else "code"
            found.append(Segment(text[part], frozenset([label])))
    return found[:limit]


def prose_characters(text: str) -> list[bool]:
    """Whether each character of a Python file is in a comment or a multi-line string.

    Raises:
        SyntaxError: The text is not Python.
        tokenize.TokenError: The text ends inside a statement or a string.
    """
    starts = [0]
    for line in io.StringIO(text):  # as the tokenizer reads it
        starts.append(starts[-1] + len(line))
    found = [False] * len(text)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        long = token.type == tokenize.STRING and token.start[0] < token.end[0]
        if long or token.type == tokenize.COMMENT:
            begin = starts[token.start[0] - 1] + token.start[1]
            end = starts[token.end[0] - 1] + token.end[1]
            found[begin:end] = [True] * (end - begin)
    return found

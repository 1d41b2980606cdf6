"""Mixtures: several sources with weights that may change over training, as one corpus.

    mix({"stdlib": 0.6, "books=~/texts": 0.3, "tfds:lm1b": 0.1})
    mix({0: {"stdlib": 0.9, "~/texts": 0.1}, 1000000: {"~/texts": 1.0}}, schedule="linear")

Weights are fractions of the training sequences. Each source is split, packed and cached on its own,
so each sequence comes from one source, and new weights need no new packing. The source of sequence
n, and its index within the source, follow from n alone (`train.data.assignment`).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import numpy as np

from thoughtbubbles.fields import shown
from train.data.assignment import Assignment
from train.data.config import DataConfig, DataError
from train.data.packing import PackedRows
from train.data.prepared import PackedData, prepare_corpus
from train.data.reader import Batch, TrainReader, check_size, shuffled
from train.data.schedule import Kind, Piece, schedule, without

Exhausted = Literal["repeat", "stop", "renormalise"]

FORMAT = 1  # increased when a mixture's order changes
REPEATS = 4
"""Number of epochs of a source above which `MixtureData.outlook` warns of repeats."""

_WRITE = (
    'write mix({"stdlib": 0.6, "~/texts": 0.4}), or knots over tokens mix({0: {...}, 1000000: '
    '{...}}, schedule="linear", exhausted="repeat")'
)
_LIMIT = 2
"""Maximum difference between a source's count and its weight's integral (`Assignment.bound`)."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture of S sources as `mix(...)` describes it.

    Attributes:
        sources: Mapping from each source's name to its text (see `sources.source_from_text`).
        pieces: Pieces of the weight schedule.
        exhausted: What happens when all rows of a source have been read: "repeat" reads them again
            in another order, "stop" ends the run, "renormalise" divides the source's weight among
            the other sources.
    """

    sources: Mapping[str, str]
    pieces: Sequence[Piece]
    exhausted: Exhausted = "repeat"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sources [S]."""
        return tuple(self.sources)

    @property
    def last_weights(self) -> list[float]:
        """Weight of each source at the end of the schedule [S]."""
        return [float(weight) for weight in self.pieces[-1].first]


def is_mixture(corpus: str) -> bool:
    """Whether the text of a corpus describes a mixture: whether it begins with `mix(`."""
    return re.match(r"mix\s*\(", corpus.strip()) is not None


def parse_mixture(text: str) -> Mixture:
    """Parse the mixture that `DataConfig.corpus` describes, without opening its sources.

    Args:
        text: Text `mix({...}, schedule=..., exhausted=...)`. The dictionary maps sources to their
            weights, or maps the tokens before each knot of the schedule to such a dictionary. A
            source may have a name in front, as in "books=~/texts"; otherwise its text is its name.

    Raises:
        DataError: The text has another form, weights do not sum to 1, a source is named twice or is
            a mixture, or the knots are not in increasing order from token 0.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or len(call.args) != 1 or ast.unparse(call.func) != "mix":
            raise TypeError
        table = _pairs(call.args[0])
        options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        knots = [(0, table)]
        if table and not isinstance(table[0][0], str):
            knots = [(_tokens(tokens), _pairs(weights)) for tokens, weights in table]
        named = [(t, [(_str(s), ast.literal_eval(w)) for s, w in pairs]) for t, pairs in knots]
    except (SyntaxError, TypeError, ValueError, OverflowError, RecursionError, MemoryError):
        raise DataError(f"corpus {shown(text, 200)}: {_WRITE}") from None
    kind, exhausted = options.pop("schedule", "constant"), options.pop("exhausted", "repeat")
    for option, value, choices in (
        ("schedule", kind, get_args(Kind)),
        ("exhausted", exhausted, get_args(Exhausted)),
    ):
        if value not in choices:
            raise DataError(f"mix: {option}={value!r}: choose one of {', '.join(choices)}")
    if options:
        raise DataError(f"mix: unknown option {next(iter(options))}: {_WRITE}")
    sources = _sources(named)
    weights = [(t, [dict(pairs).get(text, 0) for text in sources.values()]) for t, pairs in named]
    written = {name: _without_name(text) for name, text in sources.items()}
    return Mixture(written, schedule(weights, tuple(sources), kind), exhausted)


def _sources(knots: Sequence[tuple[int, Sequence[tuple[str, Any]]]]) -> dict[str, str]:
    """Return the mapping from each source's name to its text as written, with the name in front.

    Raises:
        DataError: There is no source, or a source is named twice or is a mixture.
    """
    found: dict[str, str] = {}
    for tokens, pairs in knots:
        texts = [text for text, _ in pairs]
        if not texts:
            raise DataError(f"mix: no source at token {tokens}: {_WRITE}")
        if twice := [text for text, times in Counter(texts).items() if times > 1]:
            raise DataError(f'mix: "{twice[0]}" is named twice: add its weights up')
        for text in texts:
            source = _without_name(text)
            if is_mixture(source):
                raise DataError(f"mix: {source} is a mixture within one: name its sources here")
            name = text.partition("=")[0] if source != text else text
            if found.setdefault(name, text) != text:
                raise DataError(f'mix: "{found[name]}" and "{text}" share a name: choose another')
    paths: dict[str, str] = {}
    for text in found.values():
        source = _without_name(text).rstrip("/")
        if paths.setdefault(source, text) != text:
            raise DataError(
                f'mix: "{paths[source]}" and "{text}" are one source: add their weights up'
            )
    return found


def _without_name(text: str) -> str:
    match = re.fullmatch(r"\w+=(.+)", text)
    return match[1] if match else text


def _pairs(node: ast.AST) -> list[tuple[Any, Any]]:
    """Return the keys and the unevaluated values of a dictionary, with repeated keys."""
    if not isinstance(node, ast.Dict) or None in node.keys:
        raise TypeError
    keys = [ast.literal_eval(cast(ast.expr, key)) for key in node.keys]
    return list(zip(keys, node.values, strict=True))


def _tokens(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise TypeError
    return int(value)


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


class JoinedRows(PackedRows):
    """Rows of several sources as one sequence of rows, source after source.

    Args:
        parts: Mapping from each source's name to its rows; all rows have the same length.
        weights: Weight of each source in evaluation metrics, which are means over the sources.
    """

    def __init__(self, parts: Mapping[str, PackedRows], weights: Sequence[float]):
        self.parts, self.weights = dict(parts), tuple(weights)
        self.seq_len = next(iter(parts.values())).seq_len
        self._ends = np.cumsum([len(rows) for rows in parts.values()])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.asarray(indices, np.int64)
        for index in rows[(rows < 0) | (rows >= len(self))]:
            raise IndexError(f"row {index} of {len(self)}")
        source = np.searchsorted(self._ends, rows, side="right")
        index = rows - np.concatenate([[0], self._ends[:-1]])[source]
        return self.read_from(source, index)

    def read_from(self, source: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read n rows, each given by the number of its source and its index within that source.

        Returns:
            Tokens [n, seq_len + 1] and bytes of text [n], as `PackedRows.read` returns them.
        """
        tokens = np.empty((len(source), self.seq_len + 1), np.int32)
        sizes = np.empty(len(source), np.int32)
        for number, rows in enumerate(self.parts.values()):
            of_source = source == number
            if of_source.any():
                tokens[of_source], sizes[of_source] = rows.read(index[of_source])
        return tokens, sizes


@dataclasses.dataclass(frozen=True)
class MixtureData(PackedData):
    """Packed rows of a mixture's sources, and the order in which they are read.

    Attributes:
        train: Training rows of all sources.
        validation: Held-out rows of all sources, weighted as at the end of the schedule.
        mixture: Names, weights and options of the sources.
        parts: Mapping from each source's name to its packed rows.
        pieces: Pieces of the weight schedule; with "renormalise", exhausted sources have weight 0.
        end: Number of training sequences after which the mixture ends; None if it never ends.
        statistics: "corpus" is "mix"; "sources" is a mapping from source name to statistics.
    """

    mixture: Mixture = dataclasses.field(kw_only=True)
    parts: Mapping[str, PackedData] = dataclasses.field(kw_only=True)
    pieces: Sequence[Piece] = dataclasses.field(kw_only=True)
    end: int | None = dataclasses.field(kw_only=True)

    @functools.cached_property
    def assignment(self) -> Assignment:
        """Assignment of each sequence to a source."""
        return Assignment(self.pieces, self.train.seq_len)

    @property
    def sizes(self) -> list[int]:
        """Number of training rows of each source [S]."""
        return [len(part.train) for part in self.parts.values()]

    @property
    def sources(self) -> dict[str, str]:
        """Mapping from each source's name to the fingerprint of its rows."""
        return {name: part.fingerprint for name, part in self.parts.items()}

    @property
    def summary(self) -> str:
        lines = [f"  {name}: {part.summary}" for name, part in self.parts.items()]
        return "\n".join([f"mixture of {len(lines)} sources", *lines])

    def progress(self, sequences: int) -> dict[str, tuple[float, float]]:
        """Map source names to (fraction of the first `sequences`, number of epochs in them)."""
        counts = self.assignment.counts(min(sequences, self.end or sequences))
        both = zip(self.parts, counts, self.sizes, strict=True)
        return {
            name: (count / max(sum(counts), 1), count / rows if count else 0.0)
            for name, count, rows in both
        }

    def outlook(self, sequences: int) -> list[str]:
        """Describe for the user what a run of `sequences` sequences reads, with warnings."""
        seen = self.progress(sequences)
        shares = [f"{name} {s:.1%} ({epochs:.2f} epochs)" for name, (s, epochs) in seen.items()]
        lines = [f"{min(sequences, self.end or sequences):,} sequences: {', '.join(shares)}"]
        lines += [
            f"warning: {name} is read {epochs:.1f} times over, more than {REPEATS}: lower its "
            'weight, or choose exhausted="renormalise"'
            for name, (_, epochs) in seen.items()
            if epochs > REPEATS
        ]
        if self.end is not None and sequences > self.end:
            lines.append(
                f"warning: after {self.end:,} of {sequences:,} sequences a source has no new row "
                f'(exhausted="{self.mixture.exhausted}"): the run ends there'
            )
        return lines


def prepare(config: DataConfig, stored: Mapping[str, str] = MappingProxyType({})) -> PackedData:
    """Open the packed rows of a corpus or of a mixture's sources, after packing what is missing.

    Args:
        config: Corpus, tokenizer and row length.
        stored: Mapping from the text of the corpus, or from the names of sources, to fingerprints
            of rows that were packed earlier (see `prepare_corpus`).

    Returns:
        Packed rows of both splits; a `MixtureData` for a mixture.

    Raises:
        DataError: The corpus, a source or the tokenizer cannot be used, or a source is too small.
    """
    if not is_mixture(config.corpus):
        return prepare_corpus(config, stored.get(config.corpus, ""))
    mixture = parse_mixture(config.corpus)
    sources = mixture.sources.items()
    replaced = {name: dataclasses.replace(config, corpus=text) for name, text in sources}
    parts = {name: prepare_corpus(part, stored.get(name, "")) for name, part in replaced.items()}
    return mix(mixture, parts)


def mix(mixture: Mixture, parts: Mapping[str, PackedData]) -> MixtureData:
    """Combine packed corpora into a mixture.

    Args:
        mixture: Weights and names of the sources.
        parts: Mapping from each source's name to its packed rows, in the order of `mixture`.

    Raises:
        DataError: Two sources have equal rows or different vocabularies or row lengths, a source
            has too few rows, or counts may differ too much from the weights (`check_bound`).
    """
    (first, one), *others = parts.items()
    for name, part in others:
        if part.tokenizer.fingerprint != one.tokenizer.fingerprint:
            raise DataError(
                f"mix: {first} and {name} have different vocabularies ({one.tokenizer.name} of "
                f"{one.tokenizer.vocab_size:,} ids, {part.tokenizer.name} of "
                f"{part.tokenizer.vocab_size:,}): pack them with one tokenizer"
            )
        if part.train.seq_len != one.train.seq_len:
            raise DataError(
                f"mix: rows of {first} have {one.train.seq_len} targets, those of {name} "
                f"{part.train.seq_len}: pack them with one seq_len"
            )
    contents: dict[str, str] = {}
    for name, part in parts.items():
        if contents.setdefault(part.fingerprint, name) != name:
            raise DataError(
                f"mix: {contents[part.fingerprint]} and {name} hold the same text: add their "
                "weights up"
            )
    sizes = {name: len(part.train) for name, part in parts.items()}
    pieces, end = _exhausted(mixture, sizes, one.train.seq_len)
    order = [str(piece) for piece in pieces]
    identity = [FORMAT, order, end, {name: part.fingerprint for name, part in parts.items()}]
    return MixtureData(
        JoinedRows({name: part.train for name, part in parts.items()}, mixture.last_weights),
        JoinedRows({name: part.validation for name, part in parts.items()}, mixture.last_weights),
        one.tokenizer,
        hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest(),
        {"corpus": "mix", "sources": {name: part.statistics for name, part in parts.items()}},
        mixture=mixture,
        parts=parts,
        pieces=pieces,
        end=end,
    )


def _exhausted(
    mixture: Mixture, sizes: Mapping[str, int], seq_len: int
) -> tuple[Sequence[Piece], int | None]:
    """Compute the schedule and the end, in sequences, of a mixture of sources with `sizes` rows."""
    limits, pieces = list(sizes.values()), mixture.pieces
    check_bound(pieces, seq_len)
    if mixture.exhausted == "repeat":
        return pieces, None
    if mixture.exhausted == "stop":
        return pieces, Assignment(pieces, seq_len).last_within(limits)
    # A count exceeds its integral by at most _LIMIT, so the weight is 0 before the rows run out.
    for name, rows in sizes.items():
        if rows <= _LIMIT:
            raise DataError(
                f'mix: {name} has {rows} rows: exhausted="renormalise" needs {_LIMIT + 1} at least'
            )
    given, limit = set(), None
    while limit is None:
        integrals = Assignment(pieces, seq_len).integrals
        full = {
            source: integral.last_below((rows - _LIMIT) * integral.scale)
            for source, (integral, rows) in enumerate(zip(integrals, limits, strict=True))
            if source not in given
        }
        ends = [(n, source) for source, n in full.items() if n is not None]
        if not ends:
            return pieces, None
        n, source = min(ends)
        given.add(source)
        pieces, limit = without(pieces, source, n * seq_len)
        check_bound(pieces, seq_len)
    assignment = Assignment(pieces, seq_len)
    return pieces, min(limit // seq_len, assignment.last_within(limits))


def check_bound(pieces: Sequence[Piece], seq_len: int) -> None:
    """Raise a DataError if a source's number of sequences may differ by over 2 from its share."""
    bound = Assignment(pieces, seq_len).bound
    if bound > _LIMIT:
        raise DataError(
            f"mix: under this schedule counts of its {len(pieces[0].first)} sources may stray "
            f"{float(bound):.1f} sequences from their weights, {_LIMIT} are allowed: put some of "
            "them into one folder (up to 16 sources, or weights that never change, always fit; "
            'exhausted="renormalise" changes them)'
        )


class MixtureReader(TrainReader):
    """Reader of a mixture: the global batch of step s is sequences s·B to (s + 1)·B - 1.

    The rows of a source are read in an order that is shuffled anew in each epoch. The order depends
    only on the seed and the source's rows, not on the weights.

    Args:
        data: Packed rows of the mixture.
        global_batch: Number of rows per batch over all processes, B.
        seed: Seed of the shuffle within each source.
        local_rows: Indices, from 0 to B - 1, of the rows of a batch that this process reads; None
            reads all of them.

    Raises:
        DataError: The batch size is less than 1, or the mixture ends before the first batch does.
    """

    def __init__(
        self,
        data: MixtureData,
        global_batch: int,
        seed: int,
        local_rows: np.ndarray | None = None,
    ):
        check_size(global_batch)
        self._assignment, self._size = data.assignment, global_batch
        self._joined, self._local_rows = cast(JoinedRows, data.train), local_rows
        self._orders = [
            shuffled(len(part.train), seed, int(part.fingerprint[:8], 16))
            for part in data.parts.values()
        ]
        self.end = None if data.end is None else data.end // global_batch
        if self.end == 0:
            raise DataError(
                f"mix: its sources have rows for {data.end} sequences, a batch has {global_batch}: "
                'lower the batch size, or choose exhausted="repeat"'
            )
        import grain  # here: what reads no packed rows runs without it

        self._batches = grain.MapDataset.range(self.end or 1 << 62).map(self._read_step)

    def _read_step(self, step: int) -> Batch:
        start = int(step) * self._size
        source, index = self._assignment.sequences(start, start + self._size)
        if self._local_rows is not None:
            source, index = source[self._local_rows], index[self._local_rows]
        order: list[Callable[[int], Any]] = [order.__getitem__ for order in self._orders]
        pairs = zip(source.tolist(), index.tolist(), strict=True)
        rows = np.array([order[s](i) for s, i in pairs], np.int64)
        tokens, _ = self._joined.read_from(source, rows)
        return {"tokens": tokens, "rows": rows, "source": source.astype(np.int32)}

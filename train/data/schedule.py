"""Schedule of a mixture's weights over training, and exact integrals of the weights."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal

from train.data.config import DataError

Kind = Literal["constant", "linear"]
_DENOMINATOR = 10**9  # of weights with more than nine decimals
_LARGEST = 10**9  # bound on a weight before the sum of weights is checked
TOLERANCE = Fraction(1, 10**6)
"""Maximum difference of a sum of weights from 1 that counts as a rounding error; the weights are
then divided by their sum."""


def interpolate(w0: Mapping[str, float], w1: Mapping[str, float], alpha: float) -> dict[str, float]:
    """Interpolate between the weights of two mixtures: (1 - α)·w0 + α·w1.

    Args:
        w0: Mapping from source name to weight at α = 0; a missing source has weight 0.
        w1: Mapping from source name to weight at α = 1.
        alpha: Interpolation coefficient α, from 0 to 1.

    Returns:
        Mapping from each source of either mixture to its weight.

    Raises:
        DataError: `alpha` is not from 0 to 1.
    """
    if not 0 <= alpha <= 1:
        raise DataError(f"alpha={alpha} is not between two mixtures: choose 0 to 1")
    names = dict.fromkeys((*w0, *w1))
    return {name: (1 - alpha) * w0.get(name, 0) + alpha * w1.get(name, 0) for name in names}


@dataclasses.dataclass(frozen=True)
class Piece:
    """An interval of training over which the weights of all S sources are linear in the tokens.

    Attributes:
        start: Number of training tokens before the interval.
        stop: Number of training tokens before the next interval; None for the last interval, in
            which the weights are constant.
        first: Weights at the start of the interval [S].
        last: Weights at the end of the interval [S].
    """

    start: int
    stop: int | None
    first: tuple[Fraction, ...]
    last: tuple[Fraction, ...]

    def at(self, tokens: int) -> tuple[Fraction, ...]:
        """Compute the weights [S] after `tokens` training tokens."""
        if self.stop is None:
            return self.first
        alpha = Fraction(tokens - self.start, self.stop - self.start)
        return tuple(a + alpha * (b - a) for a, b in zip(self.first, self.last, strict=True))


def schedule(
    knots: Sequence[tuple[int, Sequence[float]]], names: Sequence[str], kind: Kind
) -> list[Piece]:
    """Build the pieces of a weight schedule of S sources from its knots.

    Args:
        knots: Number of training tokens and weights [S] at each knot, in increasing order of tokens
            from token 0.
        names: Names of the sources [S], for error messages.
        kind: Whether weights are "constant" up to the next knot, or "linear" between knots. After
            the last knot, all weights are constant.

    Raises:
        DataError: A weight is not a number of 0 or more, the weights of a knot do not sum to 1, the
            knots are not in increasing order from token 0, or a source has weight 0 at every knot.
    """
    weights = [normalised(values, names, tokens) for tokens, values in knots]
    times = [tokens for tokens, _ in knots]
    if times[0] != 0:
        raise DataError(f"mix: the schedule begins at token {times[0]}: its first knot is token 0")
    for before, after in itertools.pairwise(times):
        if after <= before:
            raise DataError(
                f"mix: the schedule goes back from token {before} to token {after}: write its "
                "knots in ascending order"
            )
    for source, name in enumerate(names):
        if not any(values[source] for values in weights):
            raise DataError(f'mix: "{name}" has weight 0 at every knot: leave it out')
    ends = [*times[1:], None]
    following = [*weights[1:], weights[-1]] if kind == "linear" else weights
    return [Piece(*piece) for piece in zip(times, ends, weights, following, strict=True)]


def normalised(values: Sequence[float], names: Sequence[str], tokens: int) -> tuple[Fraction, ...]:
    """Convert the weights of a knot to exact fractions [S] that sum to 1.

    Weights with up to nine decimals are kept exactly. Other weights are rounded to nine decimals,
    so that schedules of many computed knots have one denominator. No weight above 0 becomes 0.

    Args:
        values: Weights [S]; a float stands for the decimal number that it prints as.
        names: Names of the sources [S].
        tokens: Number of training tokens at the knot, for error messages.

    Raises:
        DataError: A weight is not a number of 0 or more, or the weights do not sum to 1.
    """
    for name, value in zip(names, values, strict=True):
        number = isinstance(value, (int, float, Fraction)) and not isinstance(value, bool)
        if not number or not 0 <= value < _LARGEST:
            shown = value if isinstance(value, float) else repr(value)[:20]
            raise DataError(f'mix: the weight of "{name}" is {shown}: choose a number from 0 to 1')
    exact = [Fraction(str(value)) for value in values]
    total = sum(exact, Fraction())
    if abs(total - 1) > TOLERANCE:
        listed = ", ".join(f'"{name}" {float(v):g}' for name, v in zip(names, values, strict=True))
        way_out = f"divide each by {float(total):g}" if total else "give one of them a weight"
        raise DataError(
            f"mix: the weights sum to {float(total):g}, not to 1, at token {tokens} ({listed}): "
            f"{way_out}"
        )
    shares = [value / total for value in exact]
    if all(_DENOMINATOR % share.denominator == 0 for share in shares):
        return tuple(shares)
    parts = [max(int(share * _DENOMINATOR), int(share > 0)) for share in shares]
    lost = [share * _DENOMINATOR - part for share, part in zip(shares, parts, strict=True)]
    largest = parts.index(max(parts))
    left = _DENOMINATOR - sum(parts)
    for source in sorted(range(len(parts)), key=lambda source: -lost[source])[: max(left, 0)]:
        parts[source] += 1
    parts[largest] += min(left, 0)
    return tuple(Fraction(part, _DENOMINATOR) for part in parts)


def without(pieces: Sequence[Piece], source: int, tokens: int) -> tuple[list[Piece], int | None]:
    """Change a schedule so that a source has weight 0 after some number of tokens.

    From then on, the weights of the other sources are divided by their sum at the start and the
    end of each piece, and are linear in between. A piece in which all other sources have weight 0
    takes the weights of the next piece in which another source has a positive weight.

    Args:
        pieces: Pieces of the schedule.
        source: Index of the source.
        tokens: Number of tokens after which the source has weight 0.

    Returns:
        Pieces of the new schedule, and the number of tokens after which all other sources have
        weight 0, or None if that never happens. Weights after this number of tokens are
        meaningless.
    """
    found: list[Piece] = []
    for number, piece in enumerate(pieces):
        if piece.stop is not None and piece.stop <= tokens:
            found.append(piece)
            continue
        start = max(piece.start, tokens)
        if piece.start < tokens:
            found.append(Piece(piece.start, tokens, piece.first, piece.at(tokens)))
        first, last = (_others(w, source) for w in (piece.at(start), piece.last))
        if first is None and last is None:
            knots = (weights for later in pieces[number:] for weights in (later.first, later.last))
            first = last = next(filter(None, (_others(w, source) for w in knots)), None)
        if first is None and last is None:
            return [*found, Piece(start, None, piece.first, piece.first)], start
        # If the source has all the weight at one end, the other end has the limit of the others.
        first, last = first or last, last or first
        assert first is not None and last is not None
        found.append(Piece(start, piece.stop, first, last))
    return found, None


def _others(weights: Sequence[Fraction], source: int) -> tuple[Fraction, ...] | None:
    rest = 1 - weights[source]
    if not rest:
        return None
    return tuple(Fraction() if i == source else w / rest for i, w in enumerate(weights))


class Integral:
    """Exact integral W(n) of a source's weight over the first n training sequences.

    W(n) is the number of sequences that the source should have among the first n sequences.

    Args:
        starts: First integer n of each piece, in increasing order.
        coefficients: Integers c0, c1, c2 of each piece, with scale·W(n) = c0 + c1·n + c2·n².
        scale: Common denominator of the coefficients.
    """

    def __init__(
        self, starts: Sequence[int], coefficients: Sequence[tuple[int, int, int]], scale: int
    ):
        self.starts, self.coefficients, self.scale = tuple(starts), tuple(coefficients), scale
        self._values = [self.scaled(start) for start in starts]

    def __add__(self, other: Integral) -> Integral:
        pairs = zip(self.coefficients, other.coefficients, strict=True)
        added = [(a + d, b + e, c + f) for (a, b, c), (d, e, f) in pairs]
        return Integral(self.starts, added, self.scale)

    @property
    def constant(self) -> int | None:
        """Weight times `scale` if the weight never changes, else None."""
        same = {c[1:] for c in self.coefficients} == {(self.coefficients[0][1], 0)}
        return self.coefficients[0][1] if same and not self.coefficients[0][0] else None

    def scaled(self, n: int) -> int:
        """Compute scale·W(n) for an integer n."""
        c0, c1, c2 = self.coefficients[bisect.bisect_right(self.starts, n) - 1]
        return c0 + n * (c1 + n * c2)

    def last_below(self, value: int) -> int | None:
        """Find the largest integer n with scale·W(n) <= value; None if all n satisfy this."""
        piece = bisect.bisect_right(self._values, value) - 1
        c0, c1, c2 = self.coefficients[piece]
        left = value - c0
        if c2 == 0:
            n = left // c1 if c1 else None
        else:
            root = c1 * c1 + 4 * c2 * left
            if root < 0:  # the weight sinks to 0 before
                n = None
            elif c2 > 0:
                n = (math.isqrt(root) - c1) // (2 * c2)
            else:
                n = (c1 - (math.isqrt(root - 1) + 1 if root else 0)) // (-2 * c2)
        if piece + 1 == len(self.starts):
            return n
        end = self.starts[piece + 1] - 1
        return end if n is None else min(n, end)

    def last_growth(self) -> int:
        """Find the integer n from which on W is constant; the last piece must have weight 0."""
        growing = [i for i, c in enumerate(self.coefficients) if c[1:] != (0, 0)]
        return self.starts[growing[-1] + 1]


def integrals(pieces: Sequence[Piece], seq_len: int) -> list[Integral]:
    """Compute the integral of the weight of each of S sources over the number of sequences.

    `Assignment` keeps the number of sequences of each source near this integral.

    Args:
        pieces: Pieces of the weight schedule, whose ends are counted in tokens.
        seq_len: Number of tokens per sequence, which converts tokens to sequences.

    Returns:
        Integral W(n) of each source [S], as a function of the number of sequences n.
    """
    exact: list[list[tuple[Fraction, Fraction, Fraction]]] = []
    for source in range(len(pieces[0].first)):
        before, of_source = Fraction(), []
        for piece in pieces:
            start, first = piece.start, piece.first[source]
            slope = Fraction()  # for each token
            if piece.stop is not None:
                slope = (piece.last[source] - first) / (piece.stop - start)
            # W(n) = before + (first·x + slope·x²/2) / seq_len with x = n·seq_len - start
            c0 = before + (slope * start * start / 2 - first * start) / seq_len
            of_source.append((c0, first - slope * start, slope * seq_len / 2))
            if piece.stop is not None:
                x = piece.stop - start
                before += (first * x + slope * x * x / 2) / seq_len
        exact.append(of_source)
    scale = math.lcm(*(c.denominator for cs in exact for poly in cs for c in poly))
    starts = [-(-piece.start // seq_len) for piece in pieces]
    return [
        Integral(starts, [tuple(int(c * scale) for c in poly) for poly in cs], scale)  # pyright: ignore[reportArgumentType]
        for cs in exact
    ]

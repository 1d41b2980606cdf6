"""Assign each sequence of a mixture to a source, so that every prefix has the right proportions.

The sources are the leaves of a binary tree, and the weight of a node is the sum of the weights of
its leaves. A node passes each of its sequences on to its left or its right child. Let W_node(n) and
W_L(n) be the integrals of the weights of the node and of its left child over the first n sequences
of the mixture. Among the first m sequences of the node, the left child gets

    left(m) = ⌊W_L(τ) + 1/2⌋ where W_node(τ) = m.

As W_L never grows faster than W_node, left(m + 1) - left(m) is 0 or 1. So the source of sequence n,
and its index within the source, follow from n alone in one descent of the tree.

Why counts stay near their integrals in every prefix: suppose that a node's count m after n
sequences is within e of W_node(n). Between n and τ, W_L moves by at most p·|W_node(n) - m| <= p·e,
where p is the largest ratio of the child's weight to the node's in the schedule; rounding adds 1/2.
The same holds for the right child, which gets the node's other sequences. So the count of a leaf
whose path from the root has ratios p_1 ... p_d is within

    1/2·(1 + p_d + p_d·p_{d-1} + ... + p_d···p_2)

of the integral of its weight. With constant weights the tree is Huffman's: there a node weighs no
more than its parent's sibling, hence no more than half of its grandparent, any two consecutive
ratios have a product of at most 1/2, and the sum is below 1/2·2·(1 + 1/2 + 1/4 + ...) = 2 for any
number of sources. Under a schedule no ratio exceeds 1, so that a balanced tree stays within 2 for
up to 16 sources. Of several candidate trees, the tree with the lowest bound is used
(`Assignment.bound`).
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from train.data.schedule import Integral, Piece, integrals

_INT64 = 1 << 62
Shape = int | tuple["Shape", "Shape"]
"""Shape of a tree: the index of a source for a leaf, or the pair of subtrees of a node."""


class Assignment:
    """Map from the number of a training sequence to its source and its index within the source.

    Args:
        pieces: Pieces of the weight schedule of S sources.
        seq_len: Number of tokens per sequence.

    Attributes:
        bound: Upper bound, over all prefixes and all sources, on the difference between a source's
            number of sequences and the integral of its weight.
    """

    def __init__(self, pieces: Sequence[Piece], seq_len: int):
        self.integrals = integrals(pieces, seq_len)
        bound, shape = min(
            ((max(_bounds(tree, pieces).values()), tree) for tree in _trees(pieces)),
            key=lambda found: found[0],
        )
        self.bound: Fraction = bound
        self._root = _node(shape, self.integrals)

    def counts(self, n: int) -> list[int]:
        """Count how many of the first n sequences come from each source, `[S]`."""
        found = [0] * len(self.integrals)
        left = [(self._root, n)]
        while left:
            node, m = left.pop()
            if isinstance(node, int):
                found[node] = m
            else:
                count = node.left_count(m)
                left += [(node.left, count), (node.right, m - count)]
        return found

    def sequences(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the source and the index of each sequence from `start` to `stop - 1`.

        Args:
            start: Number of the first sequence, from 0.
            stop: Number of the sequence after the last one.

        Returns:
            Source of each sequence, and its index within the source, both `[stop - start]` int64.
        """
        source, index = np.zeros((2, stop - start), np.int64)
        left: list[tuple[Node | int, int, np.ndarray]] = [
            (self._root, start, np.arange(stop - start))
        ]
        while left:
            node, first, slots = left.pop()
            if isinstance(node, int):
                source[slots], index[slots] = node, first + np.arange(len(slots))
            elif len(slots):
                counts = node.left_counts(first, first + len(slots))
                goes_left = np.diff(counts) == 1
                begin = int(counts[0])
                left.append((node.left, begin, slots[goes_left]))
                left.append((node.right, first - begin, slots[~goes_left]))
        return source, index

    def last_within(self, limits: Sequence[int]) -> int:
        """Find the length of the longest prefix in which no source exceeds its limit.

        Args:
            limits: Maximum number of sequences of each source `[S]`.
        """
        low, high = 0, sum(limits)
        while low < high:
            middle = (low + high + 1) // 2
            fits = all(c <= limit for c, limit in zip(self.counts(middle), limits, strict=True))
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


@dataclasses.dataclass(frozen=True)
class Node:
    """A node of the tree and its two subtrees.

    Attributes:
        left: Left subtree, or the index of a source if the left child is a leaf.
        right: Right subtree, or the index of a source if the right child is a leaf.
        own: Integral W_node of the node's weight.
        of_left: Integral W_L of the left child's weight.
    """

    left: Node | int
    right: Node | int
    own: Integral
    of_left: Integral

    def left_count(self, m: int) -> int:
        """Count how many of the node's first m sequences go to its left child."""
        own, part, scale = self.own.constant, self.of_left.constant, self.own.scale
        if own is not None and part is not None:
            return (2 * m * part + own) // (2 * own) if own else 0
        n = self.own.last_below(m * scale)
        if n is None:  # m is all of the integral, rounded up
            n = self.own.last_growth() - 1
        before, after = self.own.scaled(n), self.own.scaled(n + 1)
        left, grown = self.of_left.scaled(n), after - before
        # Linear between n and n + 1; rounded to the nearest.
        exact = left * grown + (self.of_left.scaled(n + 1) - left) * (m * scale - before)
        return (2 * exact + scale * grown) // (2 * scale * grown)

    def left_counts(self, start: int, stop: int) -> np.ndarray:
        """Compute `left_count` of start, start + 1, ..., stop, `[stop - start + 1]` int64."""
        own, part = self.own.constant, self.of_left.constant
        if own and part is not None and 2 * (stop + 1) * own < _INT64:
            return (2 * np.arange(start, stop + 1) * part + own) // (2 * own)
        return np.array([self.left_count(m) for m in range(start, stop + 1)], np.int64)


def _node(shape: Shape, leaves: Sequence[Integral]) -> Node | int:
    def build(shape: Shape) -> tuple[Node | int, Integral]:
        if isinstance(shape, int):
            return shape, leaves[shape]
        (left, of_left), (right, of_right) = map(build, shape)
        own = of_left + of_right
        return Node(left, right, own, of_left), own

    return build(shape)[0]


def _trees(pieces: Sequence[Piece]) -> list[Shape]:
    """List candidates: a balanced tree, and Huffman trees of several weights.

    The weights are those at each knot of the schedule, their mean, and their maxima.
    """
    weights = list(dict.fromkeys(w for piece in pieces for w in (piece.first, piece.last)))
    mean = tuple(sum(values, Fraction()) for values in zip(*weights, strict=True))
    most = tuple(map(max, zip(*weights, strict=True)))
    order = sorted(range(len(most)), key=lambda source: (most[source], source))
    return [*map(_huffman, dict.fromkeys((mean, most, *weights))), _balanced(order)]


def _huffman(weights: Sequence[Fraction]) -> Shape:
    number = itertools.count()
    heap: list[tuple[Fraction, int, Shape]] = [
        (weight, next(number), source) for source, weight in enumerate(weights)
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, _, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (a + b, next(number), (left, right)))
    return heap[0][2]


def _balanced(order: Sequence[int]) -> Shape:
    middle = len(order) // 2
    return (_balanced(order[:middle]), _balanced(order[middle:])) if middle else order[0]


def _bounds(shape: Shape, pieces: Sequence[Piece]) -> dict[int, Fraction]:
    """Bound the difference between each source's count and integral (see the module's docstring).

    The ratio of two linear weights is monotone, so it is largest at an end of a piece; where both
    are 0 at one end it is constant over the piece.
    """
    ends = list(dict.fromkeys(w for piece in pieces for w in (piece.first, piece.last)))
    found: dict[int, Fraction] = {}

    def weigh(shape: Shape) -> list[Fraction]:
        if isinstance(shape, int):
            return [weights[shape] for weights in ends]
        return [a + b for a, b in zip(*map(weighed, shape), strict=True)]

    weighed = functools.cache(weigh)

    def descend(shape: Shape, bound: Fraction) -> None:
        if isinstance(shape, int):
            found[shape] = bound
            return
        for child in shape:
            both = zip(weighed(child), weighed(shape), strict=True)
            ratio = max((part / whole for part, whole in both if whole), default=Fraction())
            descend(child, Fraction(1, 2) + ratio * bound)

    descend(shape, Fraction())
    return found

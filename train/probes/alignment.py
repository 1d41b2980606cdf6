"""Mutual nearest neighbours: how alike two representations of the same things are."""

from typing import NamedTuple

import numpy as np


class Alignment(NamedTuple):
    """Alignment of two representations beside that of things that are paired by lot.

    Attributes:
        value: Mutual k-NN alignment, from 0 to 1.
        chance: Its expectation where pairs are drawn by lot, k / (N - 1).
        permuted: Mean over permutations of the second representation.
        p_value: Share of these permutations, and the identity, that align at least as well.
    """

    value: float
    chance: float
    permuted: float
    p_value: float


SAME = 9  # digits to which the cosines of equally near points agree


def nearest(features: np.ndarray, k: int, seed: int | tuple[int, ...] = 0) -> np.ndarray:
    """The k nearest other points of each point by cosine; which of equally near ones, by lot.

    Two representations that are compared need lots of their own: an order that both share, such as
    that of the points, makes ties agree.

    Args:
        features: One vector for each point, `[N, F]`.
        k: Number of neighbours, from 1 to N - 1.
        seed: Seed of the lots.

    Returns:
        Whether each point (axis 1) is a neighbour of another one (axis 0), `[N, N]` bool.

    Raises:
        ValueError: The features are no finite matrix, or there are not `k` other points.
    """
    points = np.asarray(features, np.float64)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise ValueError(
            f"features of shape {points.shape} are no finite matrix: give one vector of finite "
            "numbers for each point"
        )
    if not 1 <= k <= len(points) - 1:
        raise ValueError(
            f"k={k} neighbours among {len(points)} points: choose from 1 to {len(points) - 1}"
        )
    size = np.linalg.norm(points, axis=1, keepdims=True)
    points = points / np.where(size > 0, size, 1)
    cosine = np.round(points @ points.T, SAME)
    np.fill_diagonal(cosine, -np.inf)
    lots = np.random.default_rng(seed).random(cosine.shape)
    chosen = np.lexsort((lots, -cosine), axis=1)[:, :k]
    found = np.zeros(cosine.shape, bool)
    np.put_along_axis(found, chosen, True, axis=1)
    return found


def mutual_knn(first: np.ndarray, second: np.ndarray, k: int, seed: int = 0) -> float:
    """Mean overlap of the k nearest neighbours of each point, |S₁(i) ∩ S₂(i)| / k.

    As in "The Platonic Representation Hypothesis" (arXiv 2405.07987).

    Args:
        first: One representation of the points, `[N, F]`.
        second: Another one of the same points, `[N, G]`.
        k: Number of neighbours, from 1 to N - 1.
        seed: Seed of the lots that decide between equally near neighbours.

    Raises:
        ValueError: The two have different numbers of points, or not `k` other points.
    """
    return _overlap(*_both(first, second, k, seed), k)


def alignment(
    first: np.ndarray, second: np.ndarray, k: int, permutations: int = 200, seed: int = 0
) -> Alignment:
    """`mutual_knn` and what it is where points are paired by lot.

    Args:
        first: One representation of the points, `[N, F]`.
        second: Another one of the same points, `[N, G]`.
        k: Number of neighbours, from 1 to N - 1.
        permutations: Number of permutations of the points of `second`, 1 or more.
        seed: Seed of the permutations, and of the lots between equally near neighbours.

    Raises:
        ValueError: The two have different numbers of points, or not `k` other points.
    """
    if permutations < 1:
        raise ValueError(f"permutations={permutations}: choose 1 or more")
    ours, theirs = _both(first, second, k, seed)
    value, rng = _overlap(ours, theirs, k), np.random.default_rng(seed)
    shuffled = []
    for _ in range(permutations):
        order = rng.permutation(len(theirs))
        shuffled.append(_overlap(ours, theirs[np.ix_(order, order)], k))
    as_good = 1 + sum(other >= value for other in shuffled)
    return Alignment(
        value, k / (len(ours) - 1), float(np.mean(shuffled)), as_good / (1 + permutations)
    )


def _both(
    first: np.ndarray, second: np.ndarray, k: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    if len(first) != len(second):
        raise ValueError(
            f"{len(first)} points beside {len(second)}: give two representations of the same points"
        )
    return nearest(first, k, (seed, 0)), nearest(second, k, (seed, 1))


def _overlap(ours: np.ndarray, theirs: np.ndarray, k: int) -> float:
    return int((ours & theirs).sum()) / (len(ours) * k)

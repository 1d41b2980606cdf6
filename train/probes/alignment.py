"""Mutual k-NN alignment, a measure of how similar two representations of the same points are."""

from typing import NamedTuple

import numpy as np


class Alignment(NamedTuple):
    """Alignment of two representations of N points, with a permutation test.

    Attributes:
        value: Mutual k-NN alignment, from 0 to 1.
        chance: Expected alignment if points are paired at random, k / (N - 1).
        permuted: Mean alignment over random permutations of the second representation.
        p_value: Fraction of permutations whose alignment is at least `value`, among the sampled
            permutations and the identity.
    """

    value: float
    chance: float
    permuted: float
    p_value: float


SAME = 9  # decimal digits to which cosines are rounded, so that equal cosines are ties


def nearest(features: np.ndarray, k: int, seed: int | tuple[int, ...] = 0) -> np.ndarray:
    """Find the k nearest neighbours of each point by cosine; ties are broken at random.

    Two representations that are compared need different seeds: if both broke ties in the same
    order, their ties would agree.

    Args:
        features: Vectors `[N, F]` of N points, with F features each.
        k: Number of neighbours, from 1 to N - 1.
        seed: Seed of the order in which ties are broken.

    Returns:
        Mask `[N, N]` bool, true at (i, j) if point j is among the k nearest points of point i.

    Raises:
        ValueError: The features are not a matrix of finite numbers, or `k` is not from 1 to N - 1.
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
    """Compute the mean overlap of the k nearest neighbours of each point, |S₁(i) ∩ S₂(i)| / k.

    This is the mutual k-NN metric of "The Platonic Representation Hypothesis" (arXiv 2405.07987).

    Args:
        first: First representation `[N, F]` of N points, with F features each.
        second: Second representation `[N, F']` of the same points.
        k: Number of neighbours, from 1 to N - 1.
        seed: Seed of the orders in which ties between neighbours are broken.

    Raises:
        ValueError: The numbers of points differ, a representation is not a matrix of finite
            numbers, or `k` is not from 1 to N - 1.
    """
    return _overlap(*_both(first, second, k, seed), k)


def alignment(
    first: np.ndarray, second: np.ndarray, k: int, permutations: int = 200, seed: int = 0
) -> Alignment:
    """Compute `mutual_knn`, and test it against random pairings of the points.

    Args:
        first: First representation `[N, F]` of N points, with F features each.
        second: Second representation `[N, F']` of the same points.
        k: Number of neighbours, from 1 to N - 1.
        permutations: Number of random permutations of the points of `second`, 1 or more.
        seed: Seed of the permutations, and of the orders in which ties between neighbours are
            broken.

    Raises:
        ValueError: The numbers of points differ, a representation is not a matrix of finite
            numbers, `k` is not from 1 to N - 1, or `permutations` is below 1.
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

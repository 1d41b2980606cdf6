"""Label shares of a mixture, and the weights of sources that come nearest to wanted shares.

A source has a share of segments with each label (a matrix C, sources x labels; a segment may have
several labels). A mixture with weights w has the shares w·C.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from train.data.config import DataError

Matrix = Mapping[str, Mapping[str, float]]
"""Share of segments with a label, from 0 to 1, by source and label."""

_PRECISION = 1e4
"""Ratio of what a missed target costs to what leaving the preferred weights costs."""


@dataclasses.dataclass(frozen=True)
class Solution:
    """Weights that come nearest to wanted label shares.

    Attributes:
        weights: Weight of each source; they sum to 1.
        shares: Share of each label in the mixture.
        distance: Largest difference between a wanted share and the mixture's.
    """

    weights: dict[str, float]
    shares: dict[str, float]
    distance: float


def label_shares(weights: Mapping[str, float], matrix: Matrix) -> dict[str, float]:
    """Share of each label in a mixture, w·C.

    Args:
        weights: Weight of each source.
        matrix: Label shares of each source.
    """
    labels = dict.fromkeys(label for shares in matrix.values() for label in shares)
    return {
        label: sum(weight * matrix[name].get(label, 0.0) for name, weight in weights.items())
        for label in labels
    }


def solve_weights(
    matrix: Matrix, wanted: Mapping[str, float], near: Mapping[str, float] | None = None
) -> Solution:
    """Weights of sources for wanted label shares: min ‖w·C - t‖ over the simplex.

    Where many weights hit the targets equally well, those nearest to preferred ones are taken. On
    the simplex w·C - t = w·(C - 1·t), so that the sum constraint only fixes the length of w: the
    problem is one of nonnegative least squares whose solution is scaled to sum to 1.

    Args:
        matrix: Label shares of each source.
        wanted: Wanted share t of some labels, from 0 to 1.
        near: Preferred weights; equal ones by default.

    Raises:
        DataError: No share is wanted, one is no share or of a label that no source has, or a source
            is preferred that is not there.
    """
    from scipy.optimize import nnls  # 0.2 s to import

    names = list(matrix)
    check_wanted(wanted, [label for shares in matrix.values() for label in shares])
    for name in near or ():
        if name not in matrix:
            raise DataError(f"no source {name} to prefer: choose from {', '.join(names)}")
    targets = np.array([[matrix[name].get(label, 0.0) for name in names] for label in wanted])
    missed = targets - np.array(list(wanted.values()))[:, None]
    preferred = np.array([near.get(name, 0.0) if near else 1 / len(names) for name in names])
    away = np.eye(len(names)) - preferred[:, None]
    rows = np.concatenate([_PRECISION * missed, away, np.ones((1, len(names)))])
    solution, _ = nnls(rows, np.eye(len(rows))[-1])
    weights = dict(zip(names, (solution / solution.sum()).tolist(), strict=True))
    shares = label_shares(weights, matrix)
    distance = max((abs(shares[label] - share) for label, share in wanted.items()), default=0.0)
    return Solution(weights, shares, distance)


def check_wanted(wanted: Mapping[str, float], labels: Iterable[str]) -> None:
    """Raise a `DataError` for wanted shares that no mixture can have.

    Args:
        wanted: Wanted share of each label.
        labels: Labels that there are.
    """
    known = dict.fromkeys(labels)
    if not wanted:
        raise DataError(f"no share is wanted: give that of one of {', '.join(known)}")
    for label, share in wanted.items():
        if not 0 <= share <= 1:
            raise DataError(f"a share of {share:g} of {label}: choose 0 to 1")
        if label not in known:
            raise DataError(f"no source has the label {label}: choose from {', '.join(known)}")


def with_share(
    weights: Mapping[str, float], category: Sequence[str], share: float
) -> dict[str, float]:
    """Weights in which a category has a given share, and all else is in proportion.

    Args:
        weights: Weights to begin with.
        category: Names of the sources of the category.
        share: Share of the category, from 0 to 1.

    Raises:
        DataError: The share is none, or sources that should grow have no weight.
    """
    for name in category:
        if name not in weights:
            raise DataError(f"no source {name} in the mixture: choose from {', '.join(weights)}")
    if not 0 <= share <= 1:
        raise DataError(f"a share of {share:g} of {', '.join(category)}: choose 0 to 1")
    inside = sum(weights[name] for name in category)
    outside = sum(weights.values()) - inside
    if (share > 0 and not inside) or (share < 1 and not outside):
        raise DataError(
            f"a share of {share:g} of {', '.join(category)}: sources that would make it up have "
            "weight 0, so there is no proportion to keep"
        )
    return {
        name: weight * (share / inside if name in category else (1 - share) / outside)
        if weight
        else 0.0
        for name, weight in weights.items()
    }

"""Label fractions of a mixture, and the mixture weights that come nearest to wanted fractions.

The matrix C (sources x labels) holds the fraction of each source's segments that have each label;
a segment may have several labels. A mixture with weights w has the label fractions w·C.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from train.data.config import DataError

Matrix = Mapping[str, Mapping[str, float]]
"""Mapping from source, then label, to the fraction (0 to 1) of segments that have the label."""

_PRECISION = 1e4
"""Factor on the residuals of the wanted fractions; residuals of the preferred weights have 1."""


@dataclasses.dataclass(frozen=True)
class Solution:
    """Mixture weights that come nearest to wanted label fractions.

    Attributes:
        weights: Mapping from source name to mixture weight; all weights sum to 1.
        shares: Mapping from label to its fraction in the mixture with these weights.
        distance: Maximum difference between the wanted and the reached fraction of a label.
    """

    weights: dict[str, float]
    shares: dict[str, float]
    distance: float


def label_shares(weights: Mapping[str, float], matrix: Matrix) -> dict[str, float]:
    """Compute the fraction of each label in a mixture, w·C.

    Args:
        weights: Mapping from source name to mixture weight.
        matrix: Label fractions of each source.

    Returns:
        Mapping from label to its fraction.
    """
    labels = dict.fromkeys(label for shares in matrix.values() for label in shares)
    return {
        label: sum(weight * matrix[name].get(label, 0.0) for name, weight in weights.items())
        for label in labels
    }


def solve_weights(
    matrix: Matrix, wanted: Mapping[str, float], near: Mapping[str, float] | None = None
) -> Solution:
    """Find the mixture weights for wanted label fractions: min ‖w·C - t‖ over the simplex.

    If many weights reach the targets equally well, those nearest to the preferred weights are
    chosen. On the simplex w·C - t = w·(C - 1·t), so that the sum constraint only fixes the length
    of w: the problem is nonnegative least squares, and its solution is scaled to sum to 1.

    Args:
        matrix: Label fractions of each source.
        wanted: Mapping from label to its wanted fraction t, from 0 to 1; labels may be left out.
        near: Mapping from source name to its preferred weight, 0 for a source that is left out;
            the weights are scaled to sum to 1. None prefers equal weights.

    Raises:
        DataError: No fraction is wanted, a wanted fraction is not from 0 to 1 or its label is
            unknown, or `near` names an unknown source, has a negative or infinite weight, or none
            above 0.
    """
    from scipy.optimize import nnls  # 0.2 s to import

    names = list(matrix)
    check_wanted(wanted, [label for shares in matrix.values() for label in shares])
    near = dict.fromkeys(names, 1.0) if near is None else near
    for name, weight in near.items():
        if name not in matrix:
            raise DataError(f"no source {name} to prefer: choose from {', '.join(names)}")
        if not 0 <= weight < math.inf:
            raise DataError(f"a preferred weight of {weight:g} of {name}: choose 0 or more")
    if not any(near.values()):
        raise DataError("all preferred weights are 0: give a source one above 0")
    targets = np.array([[matrix[name].get(label, 0.0) for name in names] for label in wanted])
    missed = targets - np.array(list(wanted.values()))[:, None]
    preferred = np.array([near.get(name, 0.0) for name in names])
    preferred = preferred / preferred.max()  # whose sum neither overflows nor vanishes
    preferred /= preferred.sum()
    away = np.eye(len(names)) - preferred[:, None]
    rows = np.concatenate([_PRECISION * missed, away, np.ones((1, len(names)))])
    solution, _ = nnls(rows, np.eye(len(rows))[-1])
    weights = dict(zip(names, (solution / solution.sum()).tolist(), strict=True))
    shares = label_shares(weights, matrix)
    distance = max((abs(shares[label] - share) for label, share in wanted.items()), default=0.0)
    return Solution(weights, shares, distance)


def check_wanted(wanted: Mapping[str, float], labels: Iterable[str]) -> None:
    """Raise a `DataError` if no fraction is wanted, or a fraction or its label is invalid.

    Args:
        wanted: Mapping from label to its wanted fraction.
        labels: Names of the known labels.
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
    """Scale mixture weights so that a category of sources gets a given fraction of the total.

    Inside and outside of the category, the weights keep their proportions.

    Args:
        weights: Mapping from source name to mixture weight.
        category: Names of the sources of the category.
        share: Fraction of the category, from 0 to 1.

    Returns:
        Mapping from source name to its new weight; all weights sum to 1.

    Raises:
        DataError: A source is unknown, the fraction is not from 0 to 1, or the sources that should
            get a weight all have weight 0.
    """
    for name in category:
        if name not in weights:
            raise DataError(f"no source {name} in the mixture: choose from {', '.join(weights)}")
    if not 0 <= share <= 1:
        raise DataError(f"a share of {share:g} of {', '.join(category)}: choose 0 to 1")
    inside = sum(weights[name] for name in dict.fromkeys(category))
    outside = sum(weight for name, weight in weights.items() if name not in category)
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

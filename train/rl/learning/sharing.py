"""Layout of rows with equal prompts as branches of shared prefixes, which are computed once."""

import dataclasses
from typing import Any

import numpy as np

from train.rl.buckets import SHORTEST, bucket
from train.rl.rollout.rows import Rows

LEAST_SAVED = 2**12
"""Minimum number of token positions that sharing must save in an update.

Small updates share nothing, so that their results are bitwise equal with and without sharing."""
LEAST_FACTOR = 1.25
"""Minimum factor by which sharing must lower the number of token positions of an update."""


@dataclasses.dataclass(frozen=True)
class Branches:
    """Layout of `K` rows of `L` tokens as `R` shared prefixes with `N` branches each.

    The prompt of a row is all tokens before its first trained token. The shared prefix is the
    prompt without its last token. The input of a branch begins with this last token, whose state
    predicts the first trained token, and ends before the last trained token.

    Attributes:
        row: Index of the row of each branch, `[R, N]`; -1 for padding.
        begin: Position of the first trained token of each row, `[K]`.
        count: Number of tokens from the first to the last trained token of each row, `[K]`.
        prefix_size: Number of positions of a prefix, including padding (`P`).
        size: Number of positions of a branch, including padding (`C`).
    """

    row: np.ndarray
    begin: np.ndarray
    count: np.ndarray
    prefix_size: int
    size: int

    @property
    def positions(self) -> int:
        """Number of token positions of a forward pass, including padding."""
        shared, branches = self.row.shape
        return shared * (self.prefix_size + branches * self.size)

    def laid_out(self, rows: Rows) -> Rows:
        """Rearrange arrays of rows by branch.

        Args:
            rows: Arrays `[K]` or `[K, L]`, such as those of `make_rows`.

        Returns:
            A dict of `prefix [R, P]`, the ids of the prefixes, `prefix_length [R]`,
            `inputs [R, N, C]`, the token before each of `tokens`, and all arrays of `rows`,
            rearranged to `[R, N]` or `[R, N, C]`. `valid` is False for padding branches.
        """
        real = self.row >= 0
        first = self.row[:, 0]  # the first branch's row; any row for a padding prefix
        length = np.where(real[:, 0], self.begin[first] - 1, 1)
        prefix = _columns(rows["tokens"], first, np.zeros_like(first), self.prefix_size)
        found = {
            "prefix": np.where(np.arange(self.prefix_size) < length[:, None], prefix, 0),
            "prefix_length": length.astype(np.int32),
        }
        inside = self._inside
        for name, values in rows.items():
            if values.ndim == 1:
                found[name] = np.where(real, values[self.row], np.ones((), values.dtype))
            else:
                cut = _columns(values, self.row, self.begin[self.row], self.size)
                found[name] = np.where(inside, cut, np.zeros((), values.dtype))
        inputs = _columns(rows["tokens"], self.row, self.begin[self.row] - 1, self.size)
        found["inputs"] = np.where(inside, inputs, 0)
        found["valid"] = found["valid"] & real
        return found

    def by_row(self, values: np.ndarray, length: int) -> np.ndarray:
        """Rearrange values of the tokens of branches into rows, the inverse of `laid_out`.

        Args:
            values: Values of tokens, `[R, N, C]` or `[R * N, C]`; padding entries are not read.
            length: Number of positions per row (`L`).

        Returns:
            Values of tokens, `[K, L]`; 0 for tokens that are in no branch.
        """
        values = values.reshape(*self.row.shape, self.size)
        found = np.zeros((len(self.begin), length), values.dtype)
        shared, branch, slot = np.nonzero(self._inside)
        row = self.row[shared, branch]
        found[row, self.begin[row] + slot] = values[shared, branch, slot]
        return found

    @property
    def _inside(self) -> np.ndarray:
        """Positions of branches that are not padding, `[R, N, C]` bool."""
        count = np.where(self.row >= 0, self.count[self.row], 0)
        return np.arange(self.size) < count[:, :, None]


def branches_of(rows: Rows, multiple: int, widest: int) -> Branches | None:
    """Choose the layout of rows with the fewest token positions; None if sharing saves too little.

    Rows with equal prompts (all tokens before the first trained token) get one prefix. A prompt
    with more rows than branches gets several prefixes. The number of branches per prefix is chosen
    among the powers of two and `widest`.

    Args:
        rows: Rows of `make_rows`.
        multiple: Number that divides the number of shared prefixes (`R`).
        widest: Further number of branches to try, such as the number of rollouts of a problem.

    Returns:
        The layout, or None if it saves fewer than `LEAST_SAVED` positions or lowers their number by
        less than `LEAST_FACTOR`, if no row is valid, or if a valid row has no prompt.
    """
    trained = rows["trained"]
    valid = np.flatnonzero(rows["valid"]).tolist()
    some = trained.any(axis=1)
    # A row without trained tokens counts in means over rows, and has nothing to compute.
    begin = np.where(some, trained.argmax(axis=1), 1)
    last = np.where(some, trained.shape[1] - trained[:, ::-1].argmax(axis=1), begin)
    if not valid or begin[valid].min() < 1:  # nothing predicts the first token of a row
        return None
    groups: dict[bytes, list[int]] = {}
    for index in valid:
        groups.setdefault(rows["tokens"][index, : begin[index]].tobytes(), []).append(index)
    count = last - begin
    found = None
    for branches in sorted({*_powers(max(map(len, groups.values()))), widest}):
        parts = [
            group[at : at + branches]
            for group in groups.values()
            for at in range(0, len(group), branches)
        ]
        row = np.full((bucket(len(parts), multiple), branches), -1)
        for mine, part in zip(row, parts, strict=False):
            mine[: len(part)] = part
        prefix = prefix_bucket(int(begin[valid].max()) - 1)
        layout = Branches(row, begin, count, prefix, bucket(int(count[valid].max()), SHORTEST))
        if found is None or layout.positions < found.positions:
            found = layout
    assert found is not None
    whole = trained.size
    saved = whole - found.positions
    return found if saved >= LEAST_SAVED and whole >= LEAST_FACTOR * found.positions else None


def prefix_bucket(size: int) -> int:
    """Round a size up to a power of two, or to three quarters of a power of two, at least 16.

    These buckets are finer than the buckets of rows, because a prefix is most of a shared row, and
    the longest prompt of a batch varies less than the longest response.
    """
    whole = bucket(size, SHORTEST)
    return whole * 3 // 4 if whole > SHORTEST and size <= whole * 3 // 4 else whole


def flat(rows: dict[str, Any]) -> dict[str, Any]:
    """Merge the axes `R` (prefixes) and `N` (branches) of rows in the layout `Branches`.

    Rows without shared prompts are returned unchanged. The arrays `prefix` and `prefix_length` keep
    their axis `R`.
    """
    if "prefix" not in rows:
        return rows
    return {
        name: values
        if name in ("prefix", "prefix_length")
        else values.reshape(-1, *values.shape[2:])
        for name, values in rows.items()
    }


def _columns(values: np.ndarray, row: np.ndarray, start: np.ndarray, size: int) -> np.ndarray:
    """Gather `size` values of each of the rows `row [...]`, from position `start [...]` on."""
    at = start[..., None] + np.arange(size)
    return values[row[..., None], np.clip(at, 0, values.shape[1] - 1)]


def _powers(most: int) -> list[int]:
    """Return the powers of two, up to the first that is at least `most`."""
    return [1 << exponent for exponent in range((most - 1).bit_length() + 1)]

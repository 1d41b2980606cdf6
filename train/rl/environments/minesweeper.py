"""Environment of the game Minesweeper."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import numpy as np

from train.rl.environments.generated import GeneratedEnvironment, Move, board, rows_of
from train.rl.problems import at_least, at_most

_FRONTIER = 20  # maximum number of cells whose mines are enumerated together


@dataclasses.dataclass(frozen=True)
class MinesweeperState:
    """State of a game of Minesweeper.

    Attributes:
        mines: Cells with a mine, each as the index row x `columns` + column.
        open: Cells that are open, as indices of the same form.
    """

    mines: frozenset[int]
    open: frozenset[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Minesweeper(GeneratedEnvironment):
    """Minesweeper: a board has one line per row; `b3` opens the cell in column b and row 3.

    `?` is a closed cell; a digit is the number of mines around an open cell, `.` stands for 0. An
    open cell without mines around it also opens its neighbours. The first cell is already open in
    the prompt. Opening a mine ends the episode; opening all other cells solves the problem. The
    scripted player opens the cell with the lowest probability of a mine, given the shown board;
    some boards cannot be solved without a guess.

    Attributes:
        rows: Number of rows.
        columns: Number of columns.
        mines: Number of mines.
        max_turns: Number of turns after which the episode is truncated.
        malformed: Reward of a malformed action (a text that does not name a closed cell), which
            uses up a turn.
        strict: Whether a malformed action ends the episode.
        seed: Seed of the order of problems.
    """

    word: ClassVar[str] = "minesweeper"
    rows: int = 5
    columns: int = 5
    mines: int = 4
    max_turns: int = 25

    def check(self) -> None:
        at_least(self, rows=2, columns=2, mines=1)
        at_most(self, rows=26, columns=26)
        if self.mines > self.rows * self.columns - 2:
            raise ValueError(
                f"minesweeper: mines={self.mines} of {self.rows * self.columns} cells: "
                "leave two cells free"
            )

    def draw(self, rng: np.random.Generator) -> tuple[list[int], str]:
        """Sample a board.

        Returns:
            The answer, a list of the first open cell and the sorted cells with a mine, as indices;
            and the kind of the problem.
        """
        cells = self.rows * self.columns
        while True:
            first, *mines = rng.permutation(cells)[: self.mines + 1].tolist()
            if (
                len(self._opened(MinesweeperState(frozenset(mines), frozenset()), first))
                < cells - self.mines
            ):
                return [first, *sorted(mines)], f"{self.mines} mines"

    def prompt(self, answer: Sequence[int]) -> str:
        return f"{self.mines} mines{self.reminder(self.begin(answer))}"

    def begin(self, answer: Sequence[int]) -> MinesweeperState:
        field = MinesweeperState(frozenset(answer[1:]), frozenset())
        return MinesweeperState(field.mines, self._opened(field, answer[0]))

    def move(self, game: MinesweeperState, said: str) -> Move | None:
        cell = self._cell(said)
        if cell is None or cell in game.open:
            return None
        if cell in game.mines:
            return Move(game, self._shown(game, hit=cell), lost=True)
        after = MinesweeperState(game.mines, self._opened(game, cell))
        cleared = len(after.open) + len(game.mines) == self.rows * self.columns
        return Move(after, self._shown(after), cleared)

    def reminder(self, game: MinesweeperState) -> str:
        return self._shown(game)

    def _cell(self, said: str) -> int | None:
        if not re.fullmatch("[a-zA-Z][0-9]{1,2}", said):
            return None
        column, row = ord(said[0].lower()) - ord("a"), int(said[1:]) - 1
        if not (0 <= row < self.rows and column < self.columns):
            return None
        return row * self.columns + column

    def _name(self, cell: int) -> str:
        return f"{chr(ord('a') + cell % self.columns)}{cell // self.columns + 1}"

    def _around(self, cell: int) -> list[int]:
        row, column = divmod(cell, self.columns)
        return [
            i * self.columns + j
            for i in range(max(0, row - 1), min(self.rows, row + 2))
            for j in range(max(0, column - 1), min(self.columns, column + 2))
            if (i, j) != (row, column)
        ]

    def _count(self, mines: frozenset[int], cell: int) -> int:
        return sum(other in mines for other in self._around(cell))

    def _opened(self, field: MinesweeperState, cell: int) -> frozenset[int]:
        found, waiting = set(field.open), [cell]
        while waiting:
            cell = waiting.pop()
            if cell not in found:
                found.add(cell)
                if not self._count(field.mines, cell):
                    waiting += self._around(cell)
        return frozenset(found)

    def _shown(self, field: MinesweeperState, hit: int | None = None) -> str:
        def text(cell: int) -> str:
            if cell == hit:
                return "*"
            return str(self._count(field.mines, cell) or ".") if cell in field.open else "?"

        return board(
            [
                "".join(text(row * self.columns + column) for column in range(self.columns))
                for row in range(self.rows)
            ]
        )

    def _read(self, text: str) -> str:
        return "".join(rows_of(text)[-self.rows :])

    def random_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        closed = [cell for cell, mark in enumerate(self._read(shown[-1])) if mark == "?"]
        return self._name(closed[rng.integers(len(closed))])

    def scripted_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        marks = self._read(shown[-1])
        closed = {cell for cell, mark in enumerate(marks) if mark == "?"}
        numbers = [
            (closed & set(self._around(cell)), int(mark) if mark != "." else 0)
            for cell, mark in enumerate(marks)
            if mark != "?"
        ]
        chances = mine_chances(closed, [pair for pair in numbers if pair[0]], self.mines)
        return self._name(min(sorted(closed), key=lambda cell: chances[cell]))


def mine_chances(
    closed: set[int], numbers: Iterable[tuple[set[int], int]], mines: int
) -> Mapping[int, float]:
    """Compute the probability of a mine in each closed cell.

    All boards that agree with the shown numbers count as equally likely. The frontier consists of
    the closed cells next to an open cell. The result is approximate for a frontier of more than 20
    cells: only the first 20 are enumerated, and numbers that also depend on other cells are
    ignored.

    Args:
        closed: Indices of the closed cells.
        numbers: Pairs for open cells: the cell's closed neighbours, and the number of mines among
            them.
        mines: Number of mines on the board.

    Returns:
        A mapping from each closed cell to its probability.
    """
    numbers = list(numbers)
    frontier = sorted(set().union(*(cells for cells, _ in numbers)))[:_FRONTIER]
    numbers = [(cells, count) for cells, count in numbers if cells <= set(frontier)]
    rest = len(closed) - len(frontier)
    total, inside = 0, 0.0
    weights = dict.fromkeys(frontier, 0)

    def place(index: int, chosen: tuple[int, ...], left: tuple[tuple[int, int], ...]) -> None:
        """Enumerate the cells from `index` on; `left` has each number's missing mines and cells."""
        nonlocal total, inside
        if any(not 0 <= need <= cells for need, cells in left):
            return
        if index == len(frontier):
            if len(chosen) <= mines:
                ways = math.comb(rest, mines - len(chosen))
                total += ways
                inside += ways * len(chosen)
                for cell in chosen:
                    weights[cell] += ways
            return
        cell = frontier[index]
        for mined in (0, 1):
            after = tuple(
                (need - mined, size - 1) if cell in cells else (need, size)
                for (need, size), (cells, _) in zip(left, numbers, strict=True)
            )
            place(index + 1, (*chosen, cell) if mined else chosen, after)

    place(0, (), tuple((count, len(cells)) for cells, count in numbers))
    total = max(total, 1)  # the total is 0 for a text that the environment did not write
    outside = (mines - inside / total) / max(rest, 1)
    return {cell: weights[cell] / total if cell in weights else outside for cell in closed}

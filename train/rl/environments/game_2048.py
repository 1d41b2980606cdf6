"""Environment of the game 2048 on a small board."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from train.rl.environments.generated import GeneratedEnvironment, Move, board, rows_of
from train.rl.problems import at_least, at_most

WAYS = "UDLR"
Cells = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Game2048State:
    """State of a game of 2048.

    Attributes:
        cells: Rows of tiles, 0 for an empty cell.
        seed: Seed of the positions and values of new tiles.
        spawned: Number of tiles that have appeared so far, including the first two.
    """

    cells: Cells
    seed: int
    spawned: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Game2048(GeneratedEnvironment):
    """2048 on a small board: one line per row, `.` is an empty cell, `L` pushes all tiles left.

    Two equal tiles that meet merge into one of twice the value. After each push that changes the
    board a new tile appears in an empty cell: a 2, or a 4 with probability 0.1. A push that changes
    nothing still uses up a turn. A tile of at least `goal` solves the problem; a board on which no
    push changes anything ends the episode unsolved. The problem's seed, the number of earlier tiles
    and the board determine each new tile. The scripted player looks two pushes ahead and prefers
    empty cells and large tiles near one corner.

    Attributes:
        size: Number of rows and of columns.
        goal: Value of the tile that solves the problem, a power of 2.
        max_turns: Number of turns after which the episode is truncated.
        malformed: Reward of a malformed action (a text that is not U, D, L or R), which uses up a
            turn.
        strict: Whether a malformed action ends the episode.
        seed: Seed of the order of problems.
    """

    word: ClassVar[str] = "game_2048"
    size: int = 3
    goal: int = 32
    max_turns: int = 40

    def check(self) -> None:
        at_least(self, size=2, goal=8)
        at_most(self, size=5)
        at_most(self, goal=2 ** (self.size**2 + 1))  # a larger tile does not fit onto the board
        if self.goal & (self.goal - 1):
            raise ValueError(f"game_2048: goal={self.goal}: choose a power of 2")

    def draw(self, rng: np.random.Generator) -> tuple[int, str]:
        return int(rng.integers(2**31)), f"goal {self.goal}"

    def prompt(self, answer: int) -> str:
        return f"goal {self.goal}{_shown(self.begin(answer).cells)}"

    def begin(self, answer: int) -> Game2048State:
        cells = ((0,) * self.size,) * self.size
        for number in range(2):
            cells = _with_new_tile(cells, answer, number)
        return Game2048State(cells, answer)

    def move(self, game: Game2048State, said: str) -> Move | None:
        if said.upper() not in WAYS or len(said) != 1:
            return None
        after = pushed(game.cells, said.upper())
        if after == game.cells:
            return Move(game, _shown(after))
        if max(map(max, after)) >= self.goal:
            done = Game2048State(after, game.seed, game.spawned)
            return Move(done, _shown(after), success=True)
        after = _with_new_tile(after, game.seed, game.spawned)
        stuck = all(pushed(after, way) == after for way in WAYS)
        return Move(Game2048State(after, game.seed, game.spawned + 1), _shown(after), lost=stuck)

    def reminder(self, game: Game2048State) -> str:
        return _shown(game.cells)

    def random_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        cells = self._read(shown[-1])
        ways = [way for way in WAYS if pushed(cells, way) != cells]
        return ways[rng.integers(len(ways))]

    def scripted_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        cells = self._read(shown[-1])

        def worth(way: str) -> float:
            after = pushed(cells, way)
            if after == cells:
                return -np.inf
            following = [
                max(_value(pushed(_with(after, cell, 2), way)) for way in WAYS)
                for cell in _empty(after)
            ]
            return sum(following) / len(following)

        return max(WAYS, key=worth)

    def _read(self, text: str) -> Cells:
        rows = rows_of(text)[-self.size :]
        return tuple(tuple(int(c) if c != "." else 0 for c in row.split()) for row in rows)


def pushed(cells: Cells, way: str) -> Cells:
    """Return the board after one push, before a new tile appears.

    Args:
        cells: Rows of tiles, 0 for an empty cell.
        way: Direction of the push: U, D, L or R.
    """
    if way in "UD":
        turned = pushed(tuple(zip(*cells, strict=True)), "L" if way == "U" else "R")
        return tuple(zip(*turned, strict=True))
    if way == "R":
        return tuple(row[::-1] for row in pushed(tuple(row[::-1] for row in cells), "L"))
    return tuple(map(_pushed_row, cells))


@functools.lru_cache(maxsize=65536)
def _pushed_row(row: tuple[int, ...]) -> tuple[int, ...]:
    merged: list[int] = []
    fresh = False  # whether the last tile may still be doubled
    for tile in filter(None, row):
        if fresh and merged[-1] == tile:
            merged[-1], fresh = 2 * tile, False
        else:
            merged.append(tile)
            fresh = True
    return (*merged, *([0] * (len(row) - len(merged))))


def _empty(cells: Cells) -> list[tuple[int, int]]:
    size = range(len(cells))
    return [(i, j) for i, j in itertools.product(size, size) if not cells[i][j]]


def _with(cells: Cells, cell: tuple[int, int], tile: int) -> Cells:
    return tuple(
        tuple(tile if (i, j) == cell else old for j, old in enumerate(row))
        for i, row in enumerate(cells)
    )


def _with_new_tile(cells: Cells, seed: int, number: int) -> Cells:
    rng = np.random.default_rng([seed, number])
    empty = _empty(cells)
    return _with(cells, empty[rng.integers(len(empty))], 4 if rng.random() < 0.1 else 2)


def _value(cells: Cells) -> float:
    """Heuristic value: number of empty cells, plus squared tiles weighted towards one corner."""
    corner = sum(t * t / (1 + i + j) for i, row in enumerate(cells) for j, t in enumerate(row))
    return len(_empty(cells)) + corner / max(map(max, cells))


def _shown(cells: Cells) -> str:
    return board([" ".join(str(tile or ".") for tile in row) for row in cells])

"""Environment of the sliding-tile puzzle (the fifteen puzzle), with an optimal solver."""

import dataclasses
import functools
import heapq
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from train.rl.environments.generated import GeneratedEnvironment, Move, board, rows_of
from train.rl.problems import at_least, at_most

TILES = ".123456789abcdef"
_STEPS = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
_ATTEMPTS = 100  # to scramble a board; with size=2 some numbers of moves restore the order
_BACK = {"U": "D", "D": "U", "L": "R", "R": "L"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FifteenPuzzle(GeneratedEnvironment):
    """Sliding-tile puzzle: one line per row, `.` is the gap, `UL` moves the gap up, then left.

    The goal is the order `123`, `456`, `78.`. Boards are made from the goal by random moves of the
    gap, so every board can be solved. The scripted player takes a shortest solution.

    Attributes:
        size: Number of rows and of columns.
        scramble: Number of random moves from the goal that make a board.
        moves: Maximum number of moves in one action.
        max_turns: Number of turns after which the episode is truncated.
        malformed: Reward of a malformed action: a text other than 1 to `moves` of the letters U, D,
            L and R, or a move off the board. A malformed action moves nothing and uses up a turn.
        strict: Whether a malformed action ends the episode.
        seed: Seed of the order of problems.
    """

    word: ClassVar[str] = "fifteen_puzzle"
    size: int = 3
    scramble: int = 8
    moves: int = 4
    max_turns: int = 12

    def check(self) -> None:
        at_least(self, size=2, scramble=1, moves=1)
        at_most(self, size=4, scramble=1000)

    def draw(self, rng: np.random.Generator) -> tuple[str, str]:
        for _ in range(_ATTEMPTS):
            tiles, last = solved(self.size), ""
            for _ in range(self.scramble):
                ways = {way: slid(tiles, way) for way in _STEPS if way != _BACK.get(last)}
                possible = [way for way, after in ways.items() if after]
                last = possible[rng.integers(len(possible))]
                tiles = ways[last] or tiles
            if tiles != solved(self.size):
                return tiles, f"scramble {self.scramble}"
        raise ValueError(
            f"fifteen_puzzle: scramble={self.scramble} moves bring each board of size={self.size} "
            "back into order: choose another number"
        )

    def prompt(self, answer: str) -> str:
        return self._shown(answer).lstrip()

    def begin(self, answer: str) -> str:
        return answer

    def move(self, game: str, said: str) -> Move | None:
        if not 1 <= len(said) <= self.moves:
            return None
        after: str | None = game
        for letter in said.upper():
            after = slid(after, letter)
            if after is None:
                return None
        assert after is not None
        return Move(after, self._shown(after), after == solved(self.size))

    def reminder(self, game: str) -> str:
        return self._shown(game)

    def _shown(self, tiles: str) -> str:
        return board([tiles[i : i + self.size] for i in range(0, len(tiles), self.size)])

    def random_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        tiles = "".join(rows_of(shown[-1]))
        ways = [way for way in _STEPS if slid(tiles, way)]
        return ways[rng.integers(len(ways))]

    def scripted_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        return shortest("".join(rows_of(shown[-1])))[: self.moves]


def solved(size: int) -> str:
    """Return the solved board as one string, its rows concatenated."""
    return TILES[1 : size * size] + "."


def slid(tiles: str, way: str) -> str | None:
    """Return the board after one move of the gap, or None if the move is impossible.

    Args:
        tiles: Rows of a square board, concatenated.
        way: Direction of the move: U, D, L or R.
    """
    if way not in _STEPS:
        return None
    size = round(len(tiles) ** 0.5)
    gap = tiles.index(".")
    row, column = gap // size + _STEPS[way][0], gap % size + _STEPS[way][1]
    if not (0 <= row < size and 0 <= column < size):
        return None
    other = row * size + column
    swapped = list(tiles)
    swapped[gap], swapped[other] = swapped[other], "."
    return "".join(swapped)


@functools.lru_cache(maxsize=256)
def shortest(tiles: str, most: int = 10**6) -> str:
    """Find a shortest solution of a board by A* search with Manhattan distances.

    Args:
        tiles: Rows of a square board, concatenated.
        most: Maximum number of different boards that the search stores.

    Returns:
        Moves of the gap, as letters U, D, L and R.

    Raises:
        ValueError: The board has no solution, or the search would store more than `most` boards.
    """
    size = round(len(tiles) ** 0.5)
    goal = solved(size)

    def distance(state: str) -> int:
        cells = ((i, goal.index(tile)) for i, tile in enumerate(state) if tile != ".")
        return sum(abs(i // size - j // size) + abs(i % size - j % size) for i, j in cells)

    best = {tiles: 0}
    queue = [(distance(tiles), tiles, "")]
    while queue:
        _, state, path = heapq.heappop(queue)
        if state == goal:
            return path
        for way in _STEPS:
            after = slid(state, way)
            if after and len(path) + 1 < best.get(after, len(path) + 2):
                if len(best) >= most:
                    raise ValueError(
                        f"fifteen_puzzle: no solution of {tiles} within {most} boards: choose a "
                        "smaller scramble or size"
                    )
                best[after] = len(path) + 1
                heapq.heappush(queue, (len(path) + 1 + distance(after), after, path + way))
    raise ValueError(f"fifteen_puzzle: the board {tiles} cannot be brought into order")

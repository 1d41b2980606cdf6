"""Tiles to slide into order."""

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
_ATTEMPTS = 100  # to scramble a board; on two rows some numbers of moves lead back
_BACK = {"U": "D", "D": "U", "L": "R", "R": "L"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FifteenPuzzle(GeneratedEnvironment):
    """Sliding tiles: a board has a line for each row, `.` is the gap; `UL` moves it up and left.

    The tiles have to come into the order `123`, `456`, `78.`. Boards are scrambled from there, so
    all can be solved. The scripted player needs the fewest moves.

    Attributes:
        size: Number of rows and of columns.
        scramble: Number of random moves that a board is made with.
        moves: Greatest number of moves of one action.
        max_turns: Number of turns after which the episode is cut.
        malformed: Reward of a text that is no run of moves, or leaves the board; it takes a turn.
        strict: Whether such a text ends the episode.
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
    """The board in order, its rows one after the other."""
    return TILES[1 : size * size] + "."


def slid(tiles: str, way: str) -> str | None:
    """The board after the gap has moved, or None where there is no such move."""
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
    """Fewest moves that bring a board into order: A* by the tiles' distances.

    Args:
        tiles: Board whose order can be reached.
        most: Greatest number of boards to look at.

    Raises:
        ValueError: The board cannot be brought into order, or more boards would have to be looked
            at.
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
                        f"fifteen_puzzle: most={most} boards do not solve {tiles}: choose more"
                    )
                best[after] = len(path) + 1
                heapq.heappush(queue, (len(path) + 1 + distance(after), after, path + way))
    raise ValueError(f"fifteen_puzzle: the board {tiles} cannot be brought into order")

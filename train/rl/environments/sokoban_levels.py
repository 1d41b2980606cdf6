"""Sokoban levels: reading and writing, generating solvable levels, and a breadth-first solver."""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

STEPS = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
_MARKS = {"#": "#", "-": "", " ": "", "_": "", ".": ".", "$": "$", "*": "$.", "@": "@", "+": "@."}
Cell = tuple[int, int]
_ATTEMPTS = 1000  # to draw a level with a box that can be pulled; on small boards 1/3 succeed


@dataclasses.dataclass(frozen=True)
class Level:
    """A position of Sokoban, where a cell is a pair of row and column, counted from 0.

    Attributes:
        height: Number of rows.
        width: Number of columns.
        walls: Cells that neither the player nor a box can enter.
        goals: Cells onto which the boxes must be pushed.
        player: Cell of the player.
        boxes: Cells of the boxes, as many as there are goals.
    """

    height: int
    width: int
    walls: frozenset[Cell]
    goals: frozenset[Cell]
    player: Cell
    boxes: frozenset[Cell]

    @classmethod
    def from_rows(cls, rows: Sequence[str]) -> "Level":
        """Read a level in the usual notation.

        Args:
            rows: Lines of the characters `#` (wall), `@` (player), `$` (box), `.` (goal), `+`
                (player on a goal), `*` (box on a goal), and `-`, `_` or space (floor). Shorter
                lines are padded with floor on the right.

        Raises:
            ValueError: A character is unknown, the number of players is not 1, or the numbers of
                boxes and goals differ.
        """
        found: dict[str, set[Cell]] = {mark: set() for mark in "#.$@"}
        for i, row in enumerate(rows):
            for j, character in enumerate(row):
                if character not in _MARKS:
                    raise ValueError(
                        f"sokoban: character {character!r} in row {i + 1}: write one of "
                        f"{' '.join(_MARKS)}"
                    )
                for mark in _MARKS[character]:
                    found[mark].add((i, j))
        if len(found["@"]) != 1 or len(found["$"]) != len(found["."]):
            raise ValueError(
                f"sokoban: {len(found['@'])} players, {len(found['$'])} boxes and "
                f"{len(found['.'])} goals: write one player and as many boxes as goals"
            )
        return cls(
            len(rows),
            max(map(len, rows)),
            frozenset(found["#"]),
            frozenset(found["."]),
            found["@"].pop(),
            frozenset(found["$"]),
        )

    @property
    def rows(self) -> list[str]:
        """Lines of the level in the notation of `from_rows`, all of the same length."""
        return ["".join(self._mark((i, j)) for j in range(self.width)) for i in range(self.height)]

    def _mark(self, cell: Cell) -> str:
        if cell in self.walls:
            return "#"
        mark = "@" if cell == self.player else "$" if cell in self.boxes else ""
        both = {"@": "+", "$": "*", "": "."}
        return both[mark] if cell in self.goals else mark or "-"

    @property
    def solved(self) -> bool:
        """Whether all boxes are on goals."""
        return self.boxes == self.goals

    def free(self, cell: Cell) -> bool:
        """Return whether a cell is on the board and is not a wall."""
        return 0 <= cell[0] < self.height and 0 <= cell[1] < self.width and cell not in self.walls

    def moved(self, way: str) -> "Level | None":
        """Return the level after a step of the player, who may push one box.

        Args:
            way: Direction of the step: U, D, L or R.

        Returns:
            The new level, or None if the step is blocked.
        """
        step = STEPS[way]
        target = _add(self.player, step)
        if not self.free(target):
            return None
        if target not in self.boxes:
            return dataclasses.replace(self, player=target)
        beyond = _add(target, step)
        if not self.free(beyond) or beyond in self.boxes:
            return None
        boxes = self.boxes - {target} | {beyond}
        return dataclasses.replace(self, player=target, boxes=boxes)


def _add(cell: Cell, step: Cell) -> Cell:
    return cell[0] + step[0], cell[1] + step[1]


def check_level(word: str, height: int, width: int, boxes: int, walls: int) -> None:
    """Raise a `ValueError` for boards that are too small or too full for `generate`.

    Args:
        word: Name of the environment, for the error message.
        height: Number of rows, including the outer walls.
        width: Number of columns, including the outer walls.
        boxes: Number of boxes.
        walls: Number of wall cells inside the outer walls.
    """
    if min(height, width) < 4 or max(height, width) < 5:
        raise ValueError(
            f"{word}: height={height} and width={width}: choose one of them 5 or more, so that a "
            "box can be pulled, and the other 4 or more"
        )
    inside = (height - 2) * (width - 2)
    if boxes + walls > inside // 2:
        raise ValueError(
            f"{word}: boxes={boxes} and walls={walls} in {inside} cells: choose half of them or "
            "less"
        )


def generate(
    rng: np.random.Generator,
    height: int = 6,
    width: int = 6,
    boxes: int = 1,
    walls: int = 3,
    pulls: int = 12,
) -> Level:
    """Generate a solvable level by pulling boxes away from their goals at random.

    A pull is a reversed push, so the pulls in reverse order solve the level. Of all positions on
    the path, the one whose boxes are farthest from the goals becomes the level. The player is then
    moved to a random cell that it can walk to.

    Args:
        rng: Random generator of the level.
        height: Number of rows, including the outer walls.
        width: Number of columns, including the outer walls.
        boxes: Number of boxes.
        walls: Number of wall cells inside the outer walls.
        pulls: Number of random pulls.

    Raises:
        ValueError: In 1000 attempts no level was found in which a box can be pulled off its goal.
    """
    edge = {(i, j) for i in range(height) for j in range(width)
            if i in (0, height - 1) or j in (0, width - 1)}  # fmt: skip
    inside = [(i, j) for i in range(1, height - 1) for j in range(1, width - 1)]
    for _ in range(_ATTEMPTS if walls + boxes < len(inside) else 0):
        order = [inside[k] for k in rng.permutation(len(inside))]
        inner, goals, player = order[:walls], order[walls : walls + boxes], order[walls + boxes]
        solved = frozenset(goals)
        level = Level(height, width, frozenset(edge | set(inner)), solved, player, solved)
        walk = [level]
        for _ in range(pulls):
            walk.append(_pulled(walk[-1], rng))
        level = max(walk, key=_distance)
        if not level.solved:
            within = sorted(_reachable(level))
            return dataclasses.replace(level, player=within[rng.integers(len(within))])
    raise ValueError(
        f"sokoban: no level of height={height}, width={width}, boxes={boxes} and walls={walls} is "
        f"left after {pulls} pulls: choose a larger one, or fewer boxes and walls"
    )


def _pulled(level: Level, rng: np.random.Generator) -> Level:
    """Return the level after a random pull of a box, or the same level if no pull is possible."""
    within = _reachable(level)
    pulls = []
    for box in sorted(level.boxes):
        for step in STEPS.values():
            side = _add(box, step)
            back = _add(side, step)
            if side in within and level.free(back) and back not in level.boxes:
                pulls.append((box, side, back))
    if not pulls:
        return level
    box, side, back = pulls[rng.integers(len(pulls))]
    return dataclasses.replace(level, player=back, boxes=level.boxes - {box} | {side})


def _reachable(level: Level) -> set[Cell]:
    """Return the cells that the player can walk to without pushing a box."""
    found, waiting = {level.player}, [level.player]
    while waiting:
        cell = waiting.pop()
        for step in STEPS.values():
            after = _add(cell, step)
            if after not in found and level.free(after) and after not in level.boxes:
                found.add(after)
                waiting.append(after)
    return found


def _distance(level: Level) -> int:
    """Sum over boxes of the Manhattan distance to the nearest goal."""
    return sum(
        min(abs(box[0] - goal[0]) + abs(box[1] - goal[1]) for goal in level.goals)
        for box in level.boxes
    )


@functools.lru_cache(maxsize=1024)
def solve(level: Level, most: int = 10**6) -> str | None:
    """Find a shortest solution of a level by breadth-first search.

    The search skips positions with a box on a cell from which it can never be pushed to a goal.

    Args:
        level: Level to solve.
        most: Maximum number of different positions that the search stores.

    Returns:
        Steps as letters U, D, L and R, or None if there is no solution.

    Raises:
        ValueError: The search would store more than `most` positions.
    """
    alive = _alive(level)
    came: dict[tuple[Cell, frozenset[Cell]], tuple[Level, str] | None]
    came = {(level.player, level.boxes): None}
    queue = collections.deque([level])
    while queue:
        here = queue.popleft()
        if here.solved:
            return _path(here, came)
        for way in STEPS:
            after = here.moved(way)
            if after is None or (after.player, after.boxes) in came:
                continue
            if after.boxes is not here.boxes and not after.boxes <= alive:
                continue
            if len(came) >= most:
                raise ValueError(
                    f"sokoban: no solution within {most} positions: choose fewer boxes or a "
                    "smaller board"
                )
            came[after.player, after.boxes] = here, way
            queue.append(after)
    return None


def _path(level: Level, came: dict) -> str:
    ways = []
    while (before := came[level.player, level.boxes]) is not None:
        level, way = before
        ways.append(way)
    return "".join(reversed(ways))


def _alive(level: Level) -> frozenset[Cell]:
    """Return the cells from which a box can be pushed to a goal on a board without other boxes."""
    found, waiting = set(level.goals), list(level.goals)
    while waiting:
        cell = waiting.pop()
        for step in STEPS.values():
            before = _add(cell, (-step[0], -step[1]))
            pusher = _add(before, (-step[0], -step[1]))
            if before not in found and level.free(before) and level.free(pusher):
                found.add(before)
                waiting.append(before)
    return frozenset(found)

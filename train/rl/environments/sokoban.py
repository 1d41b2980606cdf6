"""Environment of the game Sokoban: push boxes onto goals."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from train.rl.environments.generated import GeneratedEnvironment, Move, board, rows_of
from train.rl.environments.sokoban_levels import STEPS, Level, check_level, generate, solve
from train.rl.problems import at_least, at_most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sokoban(GeneratedEnvironment):
    """Sokoban: a board has one line per row; `UUL` steps up twice, then left, and pushes boxes.

    `#` is a wall, `@` the player, `$` a box, `.` a goal, `*` a box on a goal, `+` the player on a
    goal, `-` floor. A step that is blocked changes nothing. Every level can be solved, but a wrong
    push can make it unsolvable. The scripted player takes a shortest solution.

    Attributes:
        height: Number of rows, including the outer walls.
        width: Number of columns, including the outer walls.
        boxes: Number of boxes.
        walls: Number of wall cells inside the outer walls.
        pulls: Number of random pulls (reversed pushes) that make a level from a solved board.
        moves: Maximum number of steps in one action.
        max_turns: Number of turns after which the episode is truncated.
        malformed: Reward of a malformed action (a text other than 1 to `moves` of the letters U, D,
            L and R), which uses up a turn.
        strict: Whether a malformed action ends the episode.
        seed: Seed of the order of problems.
    """

    word: ClassVar[str] = "sokoban"
    height: int = 6
    width: int = 6
    boxes: int = 2
    walls: int = 2
    pulls: int = 12
    moves: int = 4
    max_turns: int = 12

    def check(self) -> None:
        at_least(self, height=4, width=4, boxes=1, walls=0, pulls=1, moves=1)
        at_most(self, height=20, width=20, boxes=8, pulls=1000, moves=100)
        check_level(self.word, self.height, self.width, self.boxes, self.walls)

    def draw(self, rng: np.random.Generator) -> tuple[list[str], str]:
        level = generate(rng, self.height, self.width, self.boxes, self.walls, self.pulls)
        return level.rows, f"boxes {self.boxes}"

    def prompt(self, answer: Sequence[str]) -> str:
        return board(answer).lstrip()

    def begin(self, answer: Sequence[str]) -> Level:
        return Level.from_rows(answer)

    def move(self, game: Level, said: str) -> Move | None:
        if not 1 <= len(said) <= self.moves or not set(said.upper()) <= STEPS.keys():
            return None
        for way in said.upper():
            game = game.moved(way) or game
        return Move(game, board(game.rows), game.solved)

    def reminder(self, game: Level) -> str:
        return board(game.rows)

    def random_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        return "".join("UDLR"[i] for i in rng.integers(0, 4, self.moves))

    def scripted_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        solution = solve(Level.from_rows(rows_of(shown[-1])))
        return solution[: self.moves] if solution else self.random_action(shown, rng)

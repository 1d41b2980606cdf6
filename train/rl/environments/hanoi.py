"""Environment of the towers of Hanoi, from random positions."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from train.rl.environments.generated import GeneratedEnvironment, Move
from train.rl.problems import at_least, at_most

PEGS = "abc"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hanoi(GeneratedEnvironment):
    """Towers of Hanoi: the prompt `32 - 1 ` shows pegs a, b, c; `ca` moves a disk from c to a.

    The disks of a peg are written as their sizes, from the bottom up; `-` is an empty peg. The goal
    is to move all disks to peg c. A disk may not be placed on a smaller one. The scripted player
    takes a shortest solution.

    Attributes:
        disks: Number of disks.
        max_turns: Number of turns after which the episode is truncated.
        malformed: Reward of a malformed action (a text that is not a move or breaks the rules),
            which uses up a turn.
        strict: Whether a malformed action ends the episode.
        seed: Seed of the order of problems.
    """

    word: ClassVar[str] = "hanoi"
    disks: int = 3
    max_turns: int = 14

    def check(self) -> None:
        at_least(self, disks=2)
        at_most(self, disks=9)

    def draw(self, rng: np.random.Generator) -> tuple[list[int], str]:
        while True:
            pegs = rng.integers(0, 3, self.disks).tolist()
            if set(pegs) != {2}:
                return pegs, f"{moves_left(pegs)} moves"

    def prompt(self, answer: Sequence[int]) -> str:
        return self.shown(answer).lstrip()

    def begin(self, answer: Sequence[int]) -> tuple[int, ...]:
        return tuple(answer)

    def move(self, game: tuple[int, ...], said: str) -> Move | None:
        if len(said) != 2 or said[0] == said[1] or not set(said) <= set(PEGS):
            return None
        start, end = map(PEGS.index, said)
        disk = game.index(start) if start in game else len(game)
        if disk == len(game) or end in game[:disk]:
            return None
        after = (*game[:disk], end, *game[disk + 1 :])
        return Move(after, self.shown(after), set(after) == {2})

    def reminder(self, game: tuple[int, ...]) -> str:
        return self.shown(game)

    def shown(self, pegs: Sequence[int]) -> str:
        """Write the three pegs as an observation.

        Args:
            pegs: Index of the peg of each disk, the smallest disk first.
        """
        towers = [
            "".join(str(disk + 1) for disk in reversed(range(len(pegs))) if pegs[disk] == peg)
            for peg in range(3)
        ]
        return f" {' '.join(tower or '-' for tower in towers)} "

    def _read(self, text: str) -> list[int]:
        where = {disk: peg for peg, tower in enumerate(text.split()) for disk in tower}
        return [where[str(disk + 1)] for disk in range(self.disks)]

    def random_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        pegs = tuple(self._read(shown[-1]))
        moves = [a + b for a in PEGS for b in PEGS if self.move(pegs, a + b)]
        return moves[rng.integers(len(moves))]

    def scripted_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        return best_move(self._read(shown[-1]))


def best_move(pegs: Sequence[int]) -> str:
    """Return the first move of the shortest solution, such as `ca`.

    The largest disk that is not on its target peg can move only once all smaller disks are on the
    third peg, which becomes their target, and so on down to the disk that moves first.

    Args:
        pegs: Index of the peg of each disk, the smallest disk first. If all disks are on peg c
            (index 2), the result is an empty text.
    """
    target, move = 2, ""
    for peg in reversed(pegs):
        if peg != target:
            move, target = PEGS[peg] + PEGS[target], 3 - peg - target
    return move


def moves_left(pegs: Sequence[int]) -> int:
    """Compute the minimum number of moves until all disks are on peg c.

    Args:
        pegs: Index of the peg of each disk, the smallest disk first.
    """
    target, moves = 2, 0
    for disk in reversed(range(len(pegs))):
        if pegs[disk] != target:
            moves += 2**disk
            target = 3 - pegs[disk] - target
    return moves

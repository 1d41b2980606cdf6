"""Registry of multi-turn environments by name, as in `guess_number(high=50)`."""

from typing import Any

from thoughtbubbles.registry import Registry
from train.rl.environments.calculator import Calculator
from train.rl.environments.fifteen_puzzle import FifteenPuzzle
from train.rl.environments.game_2048 import Game2048
from train.rl.environments.gem_adapter import Gem
from train.rl.environments.general_points import GeneralPoints
from train.rl.environments.guess_number import GuessNumber
from train.rl.environments.hanoi import Hanoi
from train.rl.environments.mastermind import Mastermind
from train.rl.environments.minesweeper import Minesweeper
from train.rl.environments.search_qa import SearchQA
from train.rl.environments.sokoban import Sokoban
from train.rl.environments.sokoban_variants import SokobanVariants

__all__ = ["ENVIRONMENTS"]

ENVIRONMENTS = Registry[Any](
    "environment",
    {
        environment.word: environment
        for environment in (
            GuessNumber,
            Mastermind,
            Minesweeper,
            Sokoban,
            SokobanVariants,
            GeneralPoints,
            Hanoi,
            FifteenPuzzle,
            Game2048,
            Calculator,
            SearchQA,
            Gem,
        )
    },
)

"""Environments of several turns by name, with options: `guess_number(high=50)`."""

from typing import Any

from train.rl.environments.guess_number import GuessNumber

__all__ = ["ENVIRONMENTS"]

ENVIRONMENTS: dict[str, type[Any]] = {
    environment.word: environment for environment in (GuessNumber,)
}

"""A stand-in for the package gem-llm, with its habits: one game, and the process's generators."""

import random
from typing import Any

import numpy as np


class Guess:
    """The package's number guessing: it seeds the process, and pays nearly all for a near miss."""

    def __init__(self, max_turns: int = 3, most: int = 50):
        self.max_turns, self.most = max_turns, most
        self.turn_count = 0
        self.reset()

    @property
    def unwrapped(self) -> "Guess":
        return self

    def reset(self, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        random.seed(seed)
        np.random.seed(seed)
        self.number = random.randint(1, self.most)
        self.luck = np.random.randint(9)
        self.turn_count = 0
        return f"Guess 1-{self.most}, luck {self.luck}.", {"suffix": "Your guess?"}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn_count += 1
        info = {"suffix": "Your guess?", "luck": random.randint(0, 99), "nan": float("nan")}
        guess = int(action)  # raises for what is no number
        if guess == self.number:
            return "Right!", 1.0, True, False, info
        if self.turn_count >= self.max_turns:
            return "Too late.", 1 - abs(guess - self.number) / self.most, True, True, info
        return "higher" if guess < self.number else "lower", 0.0, False, False, info


def make(id: str, **options: Any) -> Guess:
    if id != "guess":
        raise ValueError(f"Environment {id} not found in registry.")
    return Guess(**options)

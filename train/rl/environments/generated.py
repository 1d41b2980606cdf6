"""Generated environments: an episode is a pure function of options, seed, split and index."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from train.rl.problems import TEST_SHARE, answer_of, at_least, digest, options
from train.rl.types import Completion, Problem, Split, Turn

_ATTEMPTS = 2000


@dataclasses.dataclass(frozen=True)
class EpisodeState:
    """State of an episode of a generated environment.

    Attributes:
        game: State of the game, a value that compares equal to its copies.
        turns: Number of turns taken.
        malformed: Number of turns whose text was no action of the game.
        over: Whether the episode has ended or was cut.
    """

    game: Any
    turns: int = 0
    malformed: int = 0
    over: bool = False


@dataclasses.dataclass(frozen=True)
class Move:
    """What an action does to a game.

    Attributes:
        game: State of the game after the action.
        observation: Text that is shown.
        success: Whether the game is solved, which ends it and is worth 1.
        lost: Whether the game ends unsolved, which is worth 0.
    """

    game: Any
    observation: str
    success: bool = False
    lost: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedEnvironment:
    """Base of the generated environments.

    A new one is a frozen dataclass with a `word`, options as fields, `draw`, `prompt`, `begin`,
    `move` and two players. The reward is 1 in the turn that solves the problem and 0 in others. A
    hash of the answer decides the split of a problem, whatever the seed: no seed trains on another
    seed's test problems.

    Attributes:
        max_turns: Number of turns after which the episode is cut.
        malformed: Reward of a text that is no action; it takes a turn.
        strict: Whether such a text ends the episode.
        seed: Seed of the order of problems.
    """

    word: ClassVar[str] = ""
    """Name of the environment on the command line."""

    max_turns: int = 8
    malformed: float = -0.1
    strict: bool = False
    seed: int = dataclasses.field(default=0, repr=False)

    def __post_init__(self):
        at_least(self, max_turns=1)
        self.check()
        for split in ("train", "test"):
            self.problem(split, 0)

    def check(self) -> None:
        """Raise a `ValueError` for options that make no problems."""

    def draw(self, rng: np.random.Generator) -> tuple[Any, str]:
        """Answer (a value that JSON holds) and kind of a problem of any split."""
        raise NotImplementedError

    def prompt(self, answer: Any) -> str:
        """First observation of an episode."""
        raise NotImplementedError

    def begin(self, answer: Any) -> Any:
        """First state of the game."""
        raise NotImplementedError

    def move(self, game: Any, said: str) -> Move | None:
        """What an action does to a game, or None where the text is no action.

        Args:
            game: State of the game.
            said: First line of the response.
        """
        raise NotImplementedError

    def reminder(self, game: Any) -> str:
        """What a text that is no action is answered by."""
        raise NotImplementedError

    def info(self, game: Any) -> Mapping[str, float]:
        """Numbers for the metrics, counted from the beginning of the episode."""
        del game
        return {}

    def random_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        """A random action, well-formed.

        Args:
            shown: Texts so far: the prompt, the first action, its observation, and so on up to the
                last observation.
            rng: Generator of the player.
        """
        raise NotImplementedError

    def scripted_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        """The action of a player that knows the game, from what was shown alone.

        Args:
            shown: Texts so far, as for `random_action`.
            rng: Generator of the player.
        """
        raise NotImplementedError

    @property
    def name(self) -> str:
        return self.word + options(self)

    @property
    def sizes(self) -> Mapping[Split, int | None]:
        return {"train": None, "test": None}

    def problem(self, split: Split, index: int) -> Problem:
        """A problem of the split; the same one may come at several indices.

        Raises:
            ValueError: There are so few problems that none is in the split.
        """
        rng = np.random.default_rng([self.seed, split == "test", index])
        for _ in range(_ATTEMPTS):
            answer, kind = self.draw(rng)
            found = digest(f"{self.word} {json.dumps(answer)}")
            if (found % TEST_SHARE == 0) == (split == "test"):
                return Problem(f"{self.word}-{found:016x}", self.prompt(answer), answer, kind)
        raise ValueError(
            f"{self.name} has too few different problems to hold some out for {split}: "
            "choose larger options"
        )

    def reset(self, problem: Problem) -> EpisodeState:
        return EpisodeState(self.begin(problem.answer))

    def step(self, state: EpisodeState, action: Completion) -> Turn:
        """Turn after an action.

        Raises:
            ValueError: The episode is over.
        """
        if state.over:
            raise ValueError(f"{self.word}: the episode is over: reset before the next step")
        move = self.move(state.game, answer_of(action.text))
        formed = move is not None
        if move is None:
            move = Move(state.game, self.reminder(state.game), lost=self.strict)
        turns, malformed = state.turns + 1, state.malformed + (not formed)
        terminated = move.success or move.lost
        truncated = not terminated and turns >= self.max_turns
        return Turn(
            EpisodeState(move.game, turns, malformed, terminated or truncated),
            move.observation,
            float(move.success) if formed else self.malformed,
            terminated,
            truncated,
            move.success,
            {"malformed": float(malformed), **self.info(move.game)},
        )


def board(rows: Sequence[str]) -> str:
    """A board as an observation: a line for each row."""
    return "\n" + "\n".join(rows) + "\n"


def rows_of(text: str) -> list[str]:
    """Rows of a board in an observation or in a prompt that ends in one."""
    return [line for line in text.split("\n") if line]

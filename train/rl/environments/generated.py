"""Generated environments: an episode is a pure function of options, seed, split and index."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.rl.problems import GeneratedProblems, answer_of, at_least, at_most, digest
from train.rl.types import Completion, Problem, Turn


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
class GeneratedEnvironment(GeneratedProblems):
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

    max_turns: int = 8
    malformed: float = -0.1
    strict: bool = False

    def __post_init__(self):
        super().__post_init__()
        at_least(self, max_turns=1)
        at_most(self, max_turns=10_000)

    def draw(self, rng: np.random.Generator) -> tuple[Any, str]:
        """Answer (a value that JSON holds) and kind of a problem of any split."""
        raise self._missing("draw(rng)")

    def hashed(self, drawn: tuple[Any, ...]) -> str:
        return f"{self.word} {json.dumps(drawn[0])}"

    def made(self, drawn: tuple[Any, ...]) -> Problem:
        answer, kind = drawn
        uid = f"{self.word}-{digest(self.hashed(drawn)):016x}"
        return Problem(uid, self.prompt(answer), answer, kind)

    def prompt(self, answer: Any) -> str:
        """First observation of an episode."""
        raise self._missing("prompt(answer)")

    def begin(self, answer: Any) -> Any:
        """First state of the game."""
        raise self._missing("begin(answer)")

    def move(self, game: Any, said: str) -> Move | None:
        """What an action does to a game, or None where the text is no action.

        Args:
            game: State of the game.
            said: First line of the response (`action_of`).
        """
        raise self._missing("move(game, said)")

    def action_of(self, text: str) -> str:
        """The part of a response that `move` is given: its first line, unless overridden."""
        return answer_of(text)

    def reminder(self, game: Any) -> str:
        """What a text that is no action is answered by."""
        raise self._missing("reminder(game)")

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

        Raises:
            ValueError: The environment has no such player.
        """
        raise self._no_player("random")

    def scripted_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        """The action of a player that knows the game, from what was shown alone.

        Args:
            shown: Texts so far, as for `random_action`.
            rng: Generator of the player.

        Raises:
            ValueError: The environment has no such player.
        """
        raise self._no_player("scripted")

    def _missing(self, method: str) -> Exception:
        return NotImplementedError(f"{type(self).__name__} lacks a method: write {method}")

    def _no_player(self, name: str) -> Exception:
        return ValueError(
            f"player={name!r}: {self.name} has no such player: play it yourself, or write "
            f"{name}_action(shown, rng)"
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
        move = self.move(state.game, self.action_of(action.text))
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

"""Base of environments that generate problems from options, seed, split and index alone."""

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
        game: State of the game, an immutable value of a class that the environment chooses.
        turns: Number of turns taken.
        malformed: Number of turns whose text was not an action of the game.
        over: Whether the episode was terminated or truncated.
    """

    game: Any
    turns: int = 0
    malformed: int = 0
    over: bool = False


@dataclasses.dataclass(frozen=True)
class Move:
    """Result of an action in a game.

    Attributes:
        game: State of the game after the action, as in `EpisodeState.game`.
        observation: Text that the policy is shown next.
        success: Whether the game is now solved, which ends the episode with reward 1.
        lost: Whether the game has ended unsolved, which ends the episode.
    """

    game: Any
    observation: str
    success: bool = False
    lost: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedEnvironment(GeneratedProblems):
    """Base of generated environments: a subclass defines the game, this class plays episodes of it.

    A subclass is a frozen dataclass with a `word` (its name on the command line), options as
    fields, the methods `draw`, `prompt`, `begin`, `move` and `reminder`, and optionally two players
    (`random_action`, `scripted_action`). The reward is 1 in the turn that solves the problem,
    `malformed` in a turn whose text is not an action, and 0 in all other turns. A hash of the
    answer, the data that defines the game, decides the split of a problem, so a test problem of one
    seed is not a training problem of another seed.

    Attributes:
        max_turns: Number of turns after which the episode is truncated.
        malformed: Reward of a malformed action (a text that is not an action), which uses up a
            turn.
        strict: Whether a malformed action ends the episode.
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
        """Sample a problem of either split.

        Returns:
            The answer, and the kind of the problem (`Problem.kind`). The answer is a
            JSON-serialisable value that defines the game, such as a secret number or a board.
        """
        raise self._missing("draw(rng)")

    def split_key(self, drawn: tuple[Any, ...]) -> str:
        return f"{self.word} {json.dumps(drawn[0])}"

    def made(self, drawn: tuple[Any, ...]) -> Problem:
        answer, kind = drawn
        uid = f"{self.word}-{digest(self.split_key(drawn)):016x}"
        return Problem(uid, self.prompt(answer), answer, kind)

    def prompt(self, answer: Any) -> str:
        """Return the prompt of a problem, which is the first observation of its episodes.

        Args:
            answer: Data that defines the game, as `draw` samples it (`Problem.answer`).
        """
        raise self._missing("prompt(answer)")

    def begin(self, answer: Any) -> Any:
        """Return the first state of the game (`EpisodeState.game`).

        Args:
            answer: Data that defines the game, as `draw` samples it (`Problem.answer`).
        """
        raise self._missing("begin(answer)")

    def move(self, game: Any, said: str) -> Move | None:
        """Apply an action to a game; return None if the text is not an action.

        Args:
            game: State of the game before the action.
            said: Text of the action, as `action_of` extracts it from the response.
        """
        raise self._missing("move(game, said)")

    def action_of(self, text: str) -> str:
        """Extract the text for `move` from a response: by default the first non-blank line."""
        return answer_of(text)

    def reminder(self, game: Any) -> str:
        """Return the observation after a malformed action.

        Args:
            game: State of the game, which a malformed action does not change.
        """
        raise self._missing("reminder(game)")

    def info(self, game: Any) -> Mapping[str, float]:
        """Return a mapping from name to number for the metrics, by default an empty mapping.

        Args:
            game: State of the game, from which totals since the start of the episode are read.
        """
        del game
        return {}

    def random_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        """Return a random well-formed action.

        Args:
            shown: Texts so far: the prompt, the first action, its observation, and so on up to the
                last observation.
            rng: Random generator of the player.

        Raises:
            ValueError: The environment has no random player.
        """
        raise self._no_player("random")

    def scripted_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        """Return the action of a hand-written player, which sees only the texts of the episode.

        Args:
            shown: Texts so far, as for `random_action`.
            rng: Random generator of the player.

        Raises:
            ValueError: The environment has no scripted player.
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
        """Return the turn after a response of the policy.

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
    """Join the rows of a board into an observation, each row between line breaks."""
    return "\n" + "\n".join(rows) + "\n"


def rows_of(text: str) -> list[str]:
    """Split an observation, or a prompt that ends in a board, into its non-empty lines."""
    return [line for line in text.split("\n") if line]

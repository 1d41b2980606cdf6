"""Base of environments whose prompt defines the names of actions or the values of cards."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from train.data.semantic_maps import (
    TEMPLATES,
    MapSampler,
    PromptTemplate,
    RenderedPrompt,
    SemanticMap,
)
from train.data.verbalise import Trace, answer_in
from train.rl.environments.generated import GeneratedEnvironment, Move
from train.rl.problems import at_least, at_most, digest
from train.rl.types import Completion, Problem, Split, Turn

# Offsets of the indices for which maps are sampled, so that problems, later states of
# demonstrations and test problems get different indices.
_TURN_INDICES, _TEST_INDICES = 2**32, 2**48


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant of an environment: the map in prompts, the map for scoring, and problem sizes.

    A map (`SemanticMap`) gives names to actions, or values to cards.

    Attributes:
        shown: Map in prompts; None to sample a map for each problem.
        scored: Map with which actions are scored; None for the map in the prompt. A different map
            makes a fake variant, in which a success shows that the policy ignores its prompt.
        held_out: Whether maps are sampled from the part of the pool that training never sees.
        sizes: Mapping from option name to problem size, used for options whose value is 0.
    """

    shown: SemanticMap | None = None
    scored: SemanticMap | None = None
    held_out: bool = False
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class InstructedGame:
    """State of an episode: the game, and the maps and the wording of its prompt.

    Attributes:
        inner: State of the game without its maps, as the environment's `start` returns it, such as
            a Sokoban board or the cards of a hand.
        shown: Map in the prompt.
        scored: Map with which actions are scored.
        paraphrase: Index of the wording of the prompt.
        invalid: Number of answers so far that the prompt did not allow.
    """

    inner: Any
    shown: SemanticMap
    scored: SemanticMap
    paraphrase: int = 0
    invalid: int = 0


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """One example for imitation: the prompt of a state, and an expert's thoughts and answer.

    Attributes:
        prompt: Prompt that shows the state.
        trace: Thoughts of the expert, and the expert's answer in the names of the prompt.
        problem: Name of the problem (`Problem.uid`).
    """

    prompt: RenderedPrompt
    trace: Trace
    problem: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructedEnvironment(GeneratedEnvironment):
    """Base of environments whose prompts define the names of actions or the values of cards.

    A subclass has a `usual_template`, `variants`, a `pool`, `draw` (which samples a problem without
    its map), `start`, `values`, `act`, `is_valid`, `observation`, `expert` and a scripted player.
    One object, a `RenderedPrompt`, provides the text of a prompt, the names in the expert's answer
    and the set of valid answers.

    Attributes:
        variant: Name of the variant.
        template: Name of the prompt template in `TEMPLATES`; "" for the default template.
        maps: Number of different maps (K) in all problems of a variant that samples maps; 0 to
            sample a new map for each problem.
        resample: Whether demonstrations sample new maps in each epoch.
        held_out: Number of words, or maps, of the pool that only the variant `held_out` uses.
        paraphrases: Number of wordings of the prompt to sample from.
        restate: Whether each observation is a whole prompt of the new state, for policies that are
            shown one observation at a time.
        max_turns: Number of turns after which the episode is truncated.
        malformed: Reward of a malformed action (a text that is not an action), which uses up a
            turn.
        strict: Whether a malformed action ends the episode.
        seed: Seed of the order of problems and of maps.
    """

    usual_template: ClassVar[PromptTemplate]
    variants: ClassVar[Mapping[str, Variant]]
    pool: ClassVar[tuple[str, ...] | tuple[SemanticMap, ...]]
    """Names from which maps are sampled, or whole maps to sample from."""

    variant: str = "id"
    template: str = ""
    maps: int = 0
    resample: bool = True
    held_out: int = 0
    paraphrases: int = 1
    restate: bool = False

    def check(self) -> None:
        if self.variant not in self.variants:
            raise ValueError(
                f"{self.word}: variant={self.variant[:40]!r}: choose from "
                f"{', '.join(self.variants)}"
            )
        at_least(self, maps=0, held_out=0, paraphrases=1)
        at_most(self, maps=100_000, paraphrases=len(self.prompt_template.wordings))
        if self.variants[self.variant].held_out and not self.held_out:
            raise ValueError(
                f"{self.word}: variant={self.variant!r} shows what held_out={self.held_out} keeps "
                "from training: choose a larger number"
            )
        try:
            self.sampler  # noqa: B018 (computed once)
        except ValueError as error:
            raise ValueError(f"{self.word}: {error}") from None

    @functools.cached_property
    def prompt_template(self) -> PromptTemplate:
        """Template that prompts are rendered with.

        Raises:
            ValueError: `template` is not in `TEMPLATES`, or has other concepts or values than the
                default template of this game.
        """
        usual = self.usual_template
        slots = (usual.concepts, usual.values)
        fit = {name: t for name, t in TEMPLATES.items() if (t.concepts, t.values) == slots}
        if self.template and self.template not in fit:
            raise ValueError(
                f"{self.word}: template={self.template[:40]!r}: choose from {', '.join(fit)}, or "
                "register one of the same concepts and values in TEMPLATES"
            )
        return fit[self.template] if self.template else usual

    @functools.cached_property
    def sampler(self) -> MapSampler:
        """Sampler of maps and wordings.

        Raises:
            ValueError: The pool is too small for `maps` and `held_out`.
        """
        words = self.pool if isinstance(self.pool[0], str) else ()
        return MapSampler(
            self.prompt_template.concepts,
            words,  # pyright: ignore[reportArgumentType]
            () if words else self.pool,  # pyright: ignore[reportArgumentType]
            self.maps or None,
            self.resample,
            self.held_out,
            self.paraphrases,
            self.seed,
        )

    def size(self, name: str) -> int:
        """Return the value of the option `name`; if it is 0, the variant's size of this name."""
        return getattr(self, name) or self.variants[self.variant].sizes[name]

    def start(self, drawn: Any) -> Any:
        """Return the first state of a game (`InstructedGame.inner`).

        Args:
            drawn: Problem without its map, as `draw` samples it.
        """
        raise self._missing("start(drawn)")

    def values(self, inner: Any) -> Mapping[str, str]:
        """Return a mapping from value slot of the template, such as `board`, to its text.

        Args:
            inner: State of the game (`InstructedGame.inner`) that the prompt is to show.
        """
        raise self._missing("values(inner)")

    def act(self, inner: Any, said: str, scored: SemanticMap) -> Move | None:
        """Apply an answer to a state of the game; return None if it is not an action.

        Args:
            inner: State of the game before the answer (`InstructedGame.inner`).
            said: Text of the answer.
            scored: Map with which the answer is interpreted.

        Returns:
            The move, whose `game` is the next state of the game and whose `observation` is used
            without `restate` or at the end of the episode.
        """
        raise self._missing("act(inner, said, scored)")

    def is_valid(self, inner: Any, said: str, prompt: RenderedPrompt) -> bool:
        """Return whether a prompt allows an answer, which may be right or wrong.

        Args:
            inner: State of the game before the answer (`InstructedGame.inner`).
            said: Text of the answer.
            prompt: Prompt that shows the state.
        """
        raise self._missing("is_valid(inner, said, prompt)")

    def expert(self, inner: Any, prompt: RenderedPrompt) -> tuple[Trace, Any]:
        """Compute an expert's demonstration in a state.

        Args:
            inner: State of the game (`InstructedGame.inner`).
            prompt: Prompt that shows the state.

        Returns:
            The thoughts and the answer of the expert, and the state of the game after the answer,
            which is None if the episode has ended.
        """
        raise self._missing("expert(inner, prompt)")

    def draw(self, rng: np.random.Generator, *maps: SemanticMap) -> tuple[Any, str]:
        """Sample a problem of either split, without its map.

        Args:
            rng: Random generator of the problem.
            maps: Map in the prompt and map for scoring. The problem must be solvable with each.

        Returns:
            The problem as a JSON-serialisable value for `start`, and a text from which `split_key`
            may decide the split.
        """
        raise self._missing("draw(rng, *maps)")

    def is_test_state(self, inner: Any) -> bool:
        """Return whether a later state of an episode is also the first state of a test problem.

        Args:
            inner: State of the game (`InstructedGame.inner`).
        """
        del inner
        return False

    def problem(self, split: Split, index: int) -> Problem:
        return self.problem_in(split, index, 0)

    def problem_in(self, split: Split, index: int, epoch: int) -> Problem:
        """Return a problem with the map that is sampled for it in an epoch.

        Args:
            split: Split of the problem.
            index: Index of the problem.
            epoch: Number of passes over the problems before this one.
        """
        shown, scored, paraphrase = self._maps(split, epoch, index)
        drawn, _ = self.drawn(split, index, lambda rng: self.draw(rng, shown, scored))
        answer = {
            "drawn": drawn,
            "shown": dataclasses.asdict(shown),
            "scored": dataclasses.asdict(scored),
            "paraphrase": paraphrase,
        }
        uid = f"{self.word}-{digest(json.dumps(answer)):016x}"
        return Problem(uid, self.prompt(answer), answer, self.variant)

    def _maps(self, split: Split, epoch: int, index: int) -> tuple[SemanticMap, SemanticMap, int]:
        """Return the map in the prompt, the map for scoring and the index of the wording."""
        variant = self.variants[self.variant]
        if split == "test":
            index += _TEST_INDICES
        shown = variant.shown
        if shown is None:
            draw = self.sampler.map
            shown = self.sampler.held_out_map(index) if variant.held_out else draw(epoch, index)
        return shown, variant.scored or shown, self.sampler.paraphrase(epoch, index)

    def begin(self, answer: Mapping[str, Any]) -> InstructedGame:
        shown, scored = (SemanticMap(**answer[name]) for name in ("shown", "scored"))
        return InstructedGame(self.start(answer["drawn"]), shown, scored, answer["paraphrase"])

    def prompt(self, answer: Mapping[str, Any]) -> str:
        return self.rendered(self.begin(answer)).text

    def rendered(self, game: InstructedGame) -> RenderedPrompt:
        """Render the prompt of a state."""
        return self.prompt_template.render(game.shown, game.paraphrase, **self.values(game.inner))

    def action_of(self, text: str) -> str:
        return answer_in(text)

    def move(self, game: InstructedGame, said: str) -> Move | None:
        move = self.act(game.inner, said, game.scored)
        if move is None:
            return None
        after = dataclasses.replace(game, inner=move.game)
        return dataclasses.replace(move, game=after, observation=self._shown(after, move))

    def reminder(self, game: InstructedGame) -> str:
        return self._shown(game, None)

    def _shown(self, game: InstructedGame, move: Move | None) -> str:
        over = move is not None and (move.success or move.lost)
        if self.restate and not over:
            return self.rendered(game).text
        return self.observation(game.inner) if move is None else move.observation

    def observation(self, inner: Any) -> str:
        """Return the observation after a malformed action where `restate` is False.

        The observation shows the state of the game and does not repeat the whole prompt.

        Args:
            inner: State of the game (`InstructedGame.inner`), which a malformed action does not
                change.
        """
        raise self._missing("observation(inner)")

    def step(self, state: Any, action: Completion) -> Turn:
        """Return the turn after an action.

        The turn's `info["validity"]` is the fraction of the episode's answers so far that the
        prompt allowed.

        Args:
            state: `EpisodeState` whose `game` is an `InstructedGame`.
            action: Response of the policy.

        Raises:
            ValueError: The episode is over.
        """
        turn = super().step(state, action)
        said = self.action_of(action.text)
        valid = self.is_valid(state.game.inner, said, self.rendered(state.game))
        game = dataclasses.replace(turn.state.game, invalid=state.game.invalid + (not valid))
        after = dataclasses.replace(turn.state, game=game)
        info = {**turn.info, "validity": 1 - game.invalid / after.turns}
        return dataclasses.replace(turn, state=after, info=info)

    def demonstrations(self, split: Split, count: int, epoch: int = 0) -> Iterator[Demonstration]:
        """Yield `count` demonstrations, one for each state of an expert's episodes, in order.

        If the variant samples maps, a new map is sampled for each state. Later states of training
        episodes that are the first state of a test problem are left out.

        Args:
            split: Split of the problems.
            count: Number of demonstrations.
            epoch: Number of passes before this one. In games whose problems do not depend on the
                map, such as Sokoban, each epoch has the same states. In General Points the cards
                depend on the map for their scoring.
        """
        left = count
        for index in itertools.count():
            problem = self.problem_in(split, index, epoch)
            game = self.begin(problem.answer)
            for turn in itertools.count(1):
                if left == 0:
                    return
                prompt = self.rendered(game)
                trace, inner = self.expert(game.inner, prompt)
                if turn == 1 or split == "test" or not self.is_test_state(game.inner):
                    yield Demonstration(prompt, trace, problem.uid)
                    left -= 1
                if inner is None:
                    break
                maps = self._maps(split, epoch, index + turn * _TURN_INDICES)
                game = InstructedGame(inner, *maps)

    def shown_answers(self, prompt: str) -> list[str]:
        """Read the names of the actions from the line of a prompt that begins with `Answers: `.

        Raises:
            ValueError: The prompt has no such line or more than one.
        """
        return listed_in(prompt, "Answers: ")

    def random_action(self, shown: Any, rng: np.random.Generator) -> str:
        names = self.shown_answers(shown[0])
        return names[rng.integers(len(names))]


def listed_in(prompt: str, head: str) -> list[str]:
    """Read the comma-separated list in the only line of a prompt that begins with `head`.

    Random and scripted players use this function, because they see only the text of the prompt.

    Raises:
        ValueError: No line begins with `head`, or more than one does.
    """
    lines = [line for line in prompt.split("\n") if line.startswith(head)]
    if len(lines) != 1:
        raise ValueError(
            f"random and scripted players look for one line {head!r} in a prompt, this one has "
            f"{len(lines)}: add it to the wordings of the template"
        )
    return lines[0].removeprefix(head).split(", ")

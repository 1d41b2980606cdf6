"""Environments whose prompt gives names or values to what is acted with, in several variants."""

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

# Indices that maps are drawn for: those of problems, of later states of their demonstrations, and
# of test problems, apart from each other.
_TURN_INDICES, _TEST_INDICES = 2**32, 2**48


@dataclasses.dataclass(frozen=True)
class Variant:
    """Names that prompts of a variant show, names that actions are scored by, and sizes.

    Attributes:
        shown: Map that prompts show; None for one that is drawn for each problem.
        scored: Map that actions are scored by; None for the one that is shown. Another one makes a
            fake variant: success there shows that a policy has not read its prompt.
        held_out: Whether maps are drawn from the part of the pool that training never sees.
        sizes: Options that the variant changes, by name.
    """

    shown: SemanticMap | None = None
    scored: SemanticMap | None = None
    held_out: bool = False
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class InstructedGame:
    """State of an episode: the game, and what its prompt calls things.

    Attributes:
        inner: State of the game.
        shown: Map that the prompt shows.
        scored: Map that actions are scored by.
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
    """A state of an expert's episode with what the expert does there.

    Attributes:
        prompt: Prompt that shows the state.
        trace: Thoughts and answer, in the words of the prompt.
        problem: Name of the problem.
    """

    prompt: RenderedPrompt
    trace: Trace
    problem: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructedEnvironment(GeneratedEnvironment):
    """Base of environments with a prompt template.

    A new one has a `usual_template`, `variants`, a `pool`, `draw` (a problem without its map),
    `start`, `values`, `act`, `is_valid`, `observation`, `expert`, and two players. Prompt, target
    and validity of an answer come from one rendered prompt.

    Attributes:
        variant: Variant by name.
        template: Template of the prompt, a name of `TEMPLATES`; "" for the usual one.
        maps: Number of different maps that a variant with drawn ones draws (K); 0 for a new draw in
            each problem.
        resample: Whether demonstrations of another epoch have other maps.
        held_out: Number of names of the pool that only the variant `held_out` shows.
        paraphrases: Number of wordings of the prompt.
        restate: Whether each observation is a whole prompt of the new state, for policies that are
            shown one observation at a time.
        max_turns: Number of turns after which the episode is cut.
        malformed: Reward of a text that is no action; it takes a turn.
        strict: Whether such a text ends the episode.
        seed: Seed of the order of problems and of maps.
    """

    usual_template: ClassVar[PromptTemplate]
    variants: ClassVar[Mapping[str, Variant]]
    pool: ClassVar[tuple[str, ...] | tuple[SemanticMap, ...]]
    """Names, or whole maps, to draw from."""

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
        """The template that prompts are rendered with.

        Raises:
            ValueError: There is no such template, or it is of another game.
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
        """Sampler of the maps of variants that draw them."""
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
        """An option that is 0 where the variant decides it."""
        return getattr(self, name) or self.variants[self.variant].sizes[name]

    def start(self, drawn: Any) -> Any:
        """First state of the game of what was drawn."""
        raise self._missing("start(drawn)")

    def values(self, inner: Any) -> Mapping[str, str]:
        """What the prompt of a state shows besides names, by slot."""
        raise self._missing("values(inner)")

    def act(self, inner: Any, said: str, scored: SemanticMap) -> Move | None:
        """What an answer does, as `move` with the inner state; None where it is no action."""
        raise self._missing("act(inner, said, scored)")

    def is_valid(self, inner: Any, said: str, prompt: RenderedPrompt) -> bool:
        """Whether the prompt of a state allows an answer, right or wrong."""
        raise self._missing("is_valid(inner, said, prompt)")

    def expert(self, inner: Any, prompt: RenderedPrompt) -> tuple[Trace, Any]:
        """What an expert thinks and answers in a state, and the next state, None at the end."""
        raise self._missing("expert(inner, prompt)")

    def draw(self, rng: np.random.Generator, *maps: SemanticMap) -> tuple[Any, str]:
        """What a problem of any split is made of, and its kind.

        Args:
            rng: Generator of the problem.
            maps: Maps that are shown and scored by; a problem has to be solvable with each.
        """
        raise self._missing("draw(rng, *maps)")

    def is_test_state(self, inner: Any) -> bool:
        """Whether a later state of an episode is, as a problem of its own, held out."""
        del inner
        return False

    def problem(self, split: Split, index: int) -> Problem:
        return self.problem_in(split, index, 0)

    def problem_in(self, split: Split, index: int, epoch: int) -> Problem:
        """A problem as it comes in an epoch, where it may have another map."""
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
        """Shown and scored map, and the wording, of an example."""
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
        """The prompt of a state."""
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
        """What is shown of a state behind the prompt."""
        raise self._missing("observation(inner)")

    def step(self, state: Any, action: Completion) -> Turn:
        """Turn after an action; `info["validity"]` is the share of answers that prompts allowed."""
        turn = super().step(state, action)
        said = self.action_of(action.text)
        valid = self.is_valid(state.game.inner, said, self.rendered(state.game))
        game = dataclasses.replace(turn.state.game, invalid=state.game.invalid + (not valid))
        after = dataclasses.replace(turn.state, game=game)
        info = {**turn.info, "validity": 1 - game.invalid / after.turns}
        return dataclasses.replace(turn, state=after, info=info)

    def demonstrations(self, split: Split, count: int, epoch: int = 0) -> Iterator[Demonstration]:
        """States of an expert's episodes, each with a map of its own where maps are drawn.

        A later state of a training episode that is a test problem itself is left out.

        Args:
            split: Split of the problems.
            count: Number of states.
            epoch: Number of passes before this one. The states are the same in each where a
                problem does not depend on its map, as boards of Sokoban; cards of General Points
                are dealt for the map that they are scored by.
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
        """Names in the line of a prompt that lists them.

        Raises:
            ValueError: The template has no such line.
        """
        return listed_in(prompt, "Answers: ")

    def random_action(self, shown: Any, rng: np.random.Generator) -> str:
        names = self.shown_answers(shown[0])
        return names[rng.integers(len(names))]


def listed_in(prompt: str, head: str) -> list[str]:
    """What the one line of a prompt with this head lists, for players, who see the text alone.

    Raises:
        ValueError: There is no such line, or more than one.
    """
    lines = [line for line in prompt.split("\n") if line.startswith(head)]
    if len(lines) != 1:
        raise ValueError(
            f"random and scripted players look for one line {head!r} in a prompt, this one has "
            f"{len(lines)}: add it to the wordings of the template"
        )
    return lines[0].removeprefix(head).split(", ")

"""Environment of Sokoban one step at a time, where the prompt defines the names of the steps."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from train.data.everyday_words import EVERYDAY_WORDS
from train.data.semantic_maps import TEMPLATES, PromptTemplate, RenderedPrompt, SemanticMap
from train.data.verbalise import Trace
from train.rl.environments.generated import Move, board, rows_of
from train.rl.environments.instructed import InstructedEnvironment, Variant
from train.rl.environments.sokoban_levels import Level, check_level, generate, solve
from train.rl.problems import at_least, at_most, is_held_out

STEPS = {"Up": "U", "Down": "D", "Left": "L", "Right": "R"}
"""Letter of each step in `sokoban_levels`, by the step's original name."""

_SYMBOLS = "# wall, - floor, . goal, $ box, * box on a goal, @ you, + you on a goal"

TEMPLATE = PromptTemplate(
    "sokoban",
    (
        "Sokoban: push each box onto a goal, a step at a time.\n"
        f"Symbols: {_SYMBOLS}.\n"
        "Answers: {answers}\n"
        "A blocked step changes nothing.{gloss} Reward: 1 once all boxes are on goals.\n{board}",
        "You move boxes in a store. Which step comes next?\n"
        f"On the map: {_SYMBOLS}.\n"
        "Answers: {answers}\n"
        "You win as soon as there is a box on each goal; walls stop you.{gloss}\n{board}",
        f"{_SYMBOLS}. Boxes can be pushed, never pulled, and belong on goals.\n"
        "Say your next step in this puzzle.{gloss}\n"
        "Answers: {answers}\n{board}",
    ),
    tuple(STEPS),
    ("board",),
)
TEMPLATES[TEMPLATE.name] = TEMPLATE


def _map(name: str, *names: str, gloss: bool = True) -> SemanticMap:
    return SemanticMap(name, dict(zip(STEPS, names, strict=True)), gloss)


ORIGINAL = _map("original", *STEPS, gloss=False)
NUMERICAL = _map("numerical", "1", "2", "3", "4")
CARDINAL = _map("cardinal", "North", "South", "West", "East", gloss=False)
EMOJI = _map("emoji", "⬆️", "⬇️", "⬅️", "➡️", gloss=False)

_SMALL = {"height": 6, "width": 6, "boxes": 1}
_LARGE = {"height": 10, "width": 10}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SokobanVariants(InstructedEnvironment):
    """Sokoban whose prompt lists names for the four steps; an action is one of these names.

    Variants follow arXiv 2510.00237. Names: `id` (Up Down Left Right), `alphabetical`, `numerical`,
    `random`, `cardinal`, `emoji`; `diverse` samples four everyday words for each problem,
    `held_out` words that `diverse` never uses. Difficulty: `larger` (10 x 10), `two_boxes`,
    `complex` (both). `fake`, `fake_cardinal` and `fake_emoji` show new names but accept only the
    original ones, so a policy that succeeds ignores its prompt. The scripted player takes a
    shortest solution and uses the names in the prompt.

    Attributes:
        variant: Name of the variant.
        template: Name of the prompt template in `TEMPLATES`; "" for the default template.
        maps: Number of different maps (K) in all problems of `diverse`; 0 to sample a new map for
            each problem.
        resample: Whether demonstrations sample new names in each epoch.
        held_out: Number of words that only the variant `held_out` uses.
        paraphrases: Number of wordings of the prompt to sample from.
        restate: Whether each observation is a whole prompt of the new board, for policies that are
            shown one observation at a time.
        height: Number of rows, including the outer walls; 0 for the variant's number.
        width: Number of columns, including the outer walls; 0 for the variant's number.
        boxes: Number of boxes; 0 for the variant's number.
        walls: Number of wall cells inside the outer walls.
        pulls: Number of random pulls (reversed pushes) that make a level from a solved board.
        max_turns: Number of steps after which the episode is truncated.
        malformed: Reward of a malformed action (a text that does not name a step), which uses up a
            turn.
        strict: Whether a malformed action ends the episode.
        seed: Seed of the order of problems and of names.
    """

    word: ClassVar[str] = "sokoban_variants"
    usual_template = TEMPLATE
    pool = EVERYDAY_WORDS
    variants: ClassVar[Mapping[str, Variant]] = {
        "id": Variant(ORIGINAL, sizes=_SMALL),
        "alphabetical": Variant(_map("alphabetical", "A", "B", "C", "D"), sizes=_SMALL),
        "numerical": Variant(NUMERICAL, sizes=_SMALL),
        "random": Variant(_map("random", "*", "&", "1", "M"), sizes=_SMALL),
        "cardinal": Variant(CARDINAL, sizes=_SMALL),
        "emoji": Variant(EMOJI, sizes=_SMALL),
        "larger": Variant(ORIGINAL, sizes=_SMALL | _LARGE),
        "two_boxes": Variant(ORIGINAL, sizes=_SMALL | {"boxes": 2}),
        "complex": Variant(ORIGINAL, sizes=_LARGE | {"boxes": 2}),
        "fake": Variant(NUMERICAL, ORIGINAL, sizes=_SMALL),
        "fake_cardinal": Variant(CARDINAL, ORIGINAL, sizes=_SMALL),
        "fake_emoji": Variant(EMOJI, ORIGINAL, sizes=_SMALL),
        "diverse": Variant(sizes=_SMALL),
        "held_out": Variant(held_out=True, sizes=_SMALL),
    }

    height: int = 0
    width: int = 0
    boxes: int = 0
    walls: int = 2
    pulls: int = 12
    max_turns: int = 30

    def check(self) -> None:
        super().check()
        at_least(self, height=0, width=0, boxes=0, walls=0, pulls=1)
        at_most(self, height=20, width=20, boxes=8, walls=400, pulls=1000)
        check_level(self.word, self.size("height"), self.size("width"), self.size("boxes"),
                    self.walls)  # fmt: skip

    def draw(self, rng: np.random.Generator, *maps: SemanticMap) -> tuple[list[str], str]:
        del maps  # a board can be solved whatever its steps are called
        sizes = (self.size("height"), self.size("width"), self.size("boxes"))
        return generate(rng, *sizes, self.walls, self.pulls).rows, ""

    def is_test_state(self, inner: Level) -> bool:
        return is_held_out(self.split_key((list(inner.rows), "")))

    def start(self, drawn: Sequence[str]) -> Level:
        return Level.from_rows(drawn)

    def values(self, inner: Level) -> Mapping[str, str]:
        return {"board": "\n".join(inner.rows) + "\n"}

    def observation(self, inner: Level) -> str:
        return board(inner.rows)

    def act(self, inner: Level, said: str, scored: SemanticMap) -> Move | None:
        step = scored.concept_of(said)
        if step is None:
            return None
        after = inner.moved(STEPS[step]) or inner
        return Move(after, board(after.rows), after.solved)

    def is_valid(self, inner: Level, said: str, prompt: RenderedPrompt) -> bool:
        return prompt.is_valid(said)

    def expert(self, inner: Level, prompt: RenderedPrompt) -> tuple[Trace, Level | None]:
        solution = solve(inner)
        assert solution, "levels are generated backwards from a solution"
        names = {letter: step for step, letter in STEPS.items()}
        answer = prompt.target(names[solution[0]])
        way = " ".join(names[letter] for letter in solution)
        after = inner.moved(solution[0])
        assert after is not None
        thoughts = f"The way is {way}. Now {names[solution[0]]}, which is called {answer}"
        return Trace(thoughts, answer), None if after.solved else after

    def scripted_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        marks = set("#-.$*@+")
        rows = [row for row in rows_of(shown[-1]) if set(row) <= marks]
        solution = solve(Level.from_rows(rows))
        if not solution:
            return self.random_action(shown, rng)
        return self.shown_answers(shown[0])["UDLR".index(solution[0])]

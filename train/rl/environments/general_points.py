"""Environment General Points: make 24 from cards, with values of face cards from the prompt."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from train.data.semantic_maps import TEMPLATES, PromptTemplate, RenderedPrompt, SemanticMap
from train.data.verbalise import Trace
from train.rl.environments.general_points_solver import (
    MOST_NUMBERS,
    formula_text,
    solve,
    steps,
    value_of,
)
from train.rl.environments.generated import Move
from train.rl.environments.instructed import InstructedEnvironment, Variant, listed_in
from train.rl.problems import at_least, at_most

FACES = ("J", "Q", "K")
RANKS = (*map(str, range(1, 11)), *FACES)
LARGE = tuple(map(str, range(14, 20)))
"""Ranks above those of ordinary cards; a hand of the variant `large` has one or more of `LARGE`."""

_FORM = '{{"cards": [...], "number": [...], "formula": "..."}}'
TEMPLATE = PromptTemplate(
    "general_points",
    (
        "Cards: {cards}\nJ counts as {J}, Q counts as {Q}, K counts as {K}. Use each card once, "
        f"with + - * / and brackets, to make {{target}}. Answer in JSON: {_FORM}\n",
        "A game of cards: J counts as {J}, Q counts as {Q}, K counts as {K}, the others what is "
        "written on them.\nCards: {cards}\nWrite a formula of all of them that is {target}, as "
        f"{_FORM}\n",
        "Reach {target} by adding, subtracting, multiplying and dividing; take every card exactly "
        "once.\nCards: {cards}\nJ counts as {J}, Q counts as {Q}, K counts as {K}.\n"
        f"{_FORM}\n",
    ),
    FACES,
    ("cards", "target"),
)
TEMPLATES[TEMPLATE.name] = TEMPLATE

_FORMULA = re.compile(r"(?=.*[0-9])[0-9+\-*/() ]+(=[0-9+\-*/() ]+)?")
_ATTEMPTS = 200  # maximum number of hands to deal until one can make the target


def _map(*values: int) -> SemanticMap:
    jack, queen, king = values if len(values) == 3 else values * 3
    name = f"all_{jack}" if len(values) == 1 else f"{jack}_{queen}_{king}"
    return SemanticMap(name, {"J": str(jack), "Q": str(queen), "K": str(king)})


ALL_10 = _map(10)
DIVERSE = (ALL_10, _map(11), _map(13), _map(9, 10, 11), _map(10, 11, 12), _map(7, 9, 11),
           _map(8, 10, 12), _map(9, 11, 13))  # fmt: skip
"""The eight maps of J, Q and K to values that the variant `diverse` samples from."""

_ANY = {"cards": 4, "faces": 0, "large": 0}
_FACES = _ANY | {"faces": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneralPoints(InstructedEnvironment):
    """Write a formula that uses each dealt card once and makes 24; the prompt defines J, Q and K.

    The split of a hand depends on the values by which its cards are scored, not on their ranks: no
    multiset of values is in both splits, even across variants.

    Variants follow arXiv 2510.00237. Values of J, Q and K: `id` (all 10), `all_5`, `all_7`,
    `all_12`, `regular` (11, 12, 13), where all but `id` deal at least one face card; `diverse`
    samples one of eight maps, `held_out` one of the maps that the option `held_out` withholds from
    `diverse`. Difficulty: `large` (at least one card from 14 to 19), `five` (five cards), `three`
    (three cards, easier). The prompt of `fake` says that face cards count 5, the prompt of
    `fake_regular` that they count 11, 12 and 13, but both variants score face cards as 10. The
    scripted player solves the hand with the values in the prompt.

    Attributes:
        variant: Name of the variant.
        template: Name of the prompt template in `TEMPLATES`; "" for the default template.
        maps: Number of maps (K) that `diverse` samples from, counted from the first of the eight; 0
            for all maps that are not held out.
        resample: Whether demonstrations sample new maps in each epoch.
        held_out: Number of maps, counted from the last of the eight, that only the variant
            `held_out` uses.
        paraphrases: Number of wordings of the prompt to sample from.
        restate: Whether each observation is a whole prompt, for policies that are shown one
            observation at a time.
        cards: Number of cards, 3 to 5; 0 for the number of the variant.
        target: Number to make.
        bare: Whether the expert and the players answer with the formula alone rather than in JSON,
            for templates that ask for a bare formula. The environment accepts both forms.
        max_turns: Number of answers after which the episode is truncated.
        malformed: Reward of a malformed action (a text without a formula), which uses up a turn.
        strict: Whether a malformed action ends the episode.
        seed: Seed of the order of problems and of maps.
    """

    word: ClassVar[str] = "general_points"
    usual_template = TEMPLATE
    pool = DIVERSE
    variants: ClassVar[Mapping[str, Variant]] = {
        "id": Variant(ALL_10, sizes=_ANY),
        "all_5": Variant(_map(5), sizes=_FACES),
        "all_7": Variant(_map(7), sizes=_FACES),
        "all_12": Variant(_map(12), sizes=_FACES),
        "regular": Variant(_map(11, 12, 13), sizes=_FACES),
        "three": Variant(ALL_10, sizes=_ANY | {"cards": 3}),
        "large": Variant(ALL_10, sizes=_ANY | {"large": 1}),
        "five": Variant(ALL_10, sizes=_ANY | {"cards": 5}),
        "fake": Variant(_map(5), ALL_10, sizes=_FACES),
        "fake_regular": Variant(_map(11, 12, 13), ALL_10, sizes=_FACES),
        "diverse": Variant(sizes=_ANY),
        "held_out": Variant(held_out=True, sizes=_FACES),
    }

    cards: int = 0
    target: int = 24
    bare: bool = False
    max_turns: int = 1

    def check(self) -> None:
        super().check()
        at_least(self, cards=0, target=1)
        at_most(self, cards=MOST_NUMBERS, target=1000)
        if self.cards in (1, 2):
            raise ValueError(
                f"{self.word}: cards={self.cards}: choose 3 or more, or 0 for the variant's"
            )

    def draw(self, rng: np.random.Generator, *maps: SemanticMap) -> tuple[list[str], str]:
        """Sample a hand of cards that can make the target with each of `maps`.

        Returns:
            Ranks of the cards, and the sorted values of the cards under the last map as a text,
            which `split_key` uses.

        Raises:
            ValueError: In 200 attempts no such hand was found.
        """
        count, sizes = self.size("cards"), self.variants[self.variant].sizes
        for _ in range(_ATTEMPTS):
            cards = [RANKS[i] for i in rng.integers(0, len(RANKS), count)]
            if sizes["large"]:
                cards[rng.integers(count)] = LARGE[rng.integers(len(LARGE))]
            if sizes["faces"] and not set(cards) & set(FACES):
                cards[rng.integers(count)] = FACES[rng.integers(len(FACES))]
            ways = [sorted(_numbers(cards, each.names)) for each in maps or (ALL_10,)]
            if all(solve(numbers, self.target) is not None for numbers in ways):
                return cards, str(ways[-1])
        raise ValueError(
            f"{self.word}: {count} cards hardly ever make target={self.target}: choose a smaller "
            "target or more cards"
        )

    def split_key(self, drawn: tuple[Any, ...]) -> str:
        return f"{self.word} {drawn[1]}"  # of values: different ranks can have equal values

    def start(self, drawn: Sequence[str]) -> tuple[str, ...]:
        return tuple(drawn)

    def values(self, inner: tuple[str, ...]) -> Mapping[str, str]:
        return {"cards": ", ".join(inner), "target": str(self.target)}

    def observation(self, inner: tuple[str, ...]) -> str:
        return f" write a formula of {' '.join(inner)} "

    def act(self, inner: tuple[str, ...], said: str, scored: SemanticMap) -> Move | None:
        formula = self._formula(said)
        if formula is None:
            return None
        success = value_of(formula, _numbers(inner, scored.names)) == self.target
        return Move(inner, " right " if success else " wrong ", success)

    def is_valid(self, inner: tuple[str, ...], said: str, prompt: RenderedPrompt) -> bool:
        formula = self._formula(said)
        if formula is None:
            return False
        return value_of(formula, _numbers(inner, prompt.shown.names)) is not None

    def _formula(self, said: str) -> str | None:
        """Return the formula in an answer, which is JSON or a bare formula; None if there is none.

        If the answer is an equation with the target on one side, the formula is the other side. Any
        other equation is returned whole, and is later scored as wrong.
        """
        if not said or len(said) > 1000:
            return None
        if said.startswith("{"):
            try:
                fields = json.loads(said)
            except (ValueError, RecursionError):
                return None
            formula = fields.get("formula") if isinstance(fields, dict) else None
            if not isinstance(formula, str):
                return None
            said = formula
        said = said.strip().removesuffix(".")
        if not _FORMULA.fullmatch(said):
            return None
        left, equals, right = (part.strip() for part in said.partition("="))
        if equals and str(self.target) in (left, right):
            return left if right == str(self.target) else right
        return said

    def expert(self, inner: tuple[str, ...], prompt: RenderedPrompt) -> tuple[Trace, None]:
        numbers = _numbers(inner, prompt.shown.names)
        formula = solve(numbers, self.target)
        assert formula is not None, "hands can be solved as they are shown"
        answer = self._answer(inner, numbers, formula_text(formula))
        counts = f"{' '.join(inner)} count as {' '.join(map(str, numbers))}"
        return Trace(f"{counts}. {', '.join(steps(formula))}. So {answer}", answer), None

    def random_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        cards, numbers = _seen(shown[0])
        order = [numbers[i] for i in rng.permutation(len(numbers))]
        signs = ["+-*/"[i] for i in rng.integers(0, 4, len(numbers) - 1)]
        rest = "".join(f"{sign}{n}" for sign, n in zip(signs, order[1:], strict=True))
        return self._answer(cards, numbers, f"{order[0]}{rest}")

    def scripted_action(self, shown: Sequence[str], rng: np.random.Generator) -> str:
        cards, numbers = _seen(shown[0])
        formula = solve(numbers, self.target)
        if formula is None:
            return self.random_action(shown, rng)
        return self._answer(cards, numbers, formula_text(formula))

    def _answer(self, cards: Sequence[str], numbers: Sequence[int], formula: str) -> str:
        """Write an answer as JSON without spaces, or as the bare formula."""
        if self.bare:
            return formula
        fields = {"cards": list(cards), "number": list(numbers), "formula": formula}
        return json.dumps(fields, separators=(",", ":"))


def _numbers(cards: Sequence[str], names: Mapping[str, str]) -> list[int]:
    """Return the values of cards; `names` maps face cards to their values."""
    return [int(names.get(card, card)) for card in cards]


def _seen(prompt: str) -> tuple[list[str], list[int]]:
    """Read the cards and their values from a prompt.

    Raises:
        ValueError: The prompt does not list cards or values in the words of the default template.
    """
    cards = listed_in(prompt, "Cards: ")
    names = dict(re.findall(r"([JQK]) counts as ([0-9]+)", prompt))
    if missing := sorted({*cards} & {*FACES} - {*names}):
        raise ValueError(
            f"random and scripted players look for '{missing[0]} counts as ...' in a prompt: add "
            "it to the wordings of the template"
        )
    return cards, _numbers(cards, names)

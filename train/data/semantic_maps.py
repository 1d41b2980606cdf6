"""Names that a prompt gives to concepts, rendered into prompt and target from one object.

Supervised tuning on one fixed prompt teaches a model to answer without reading its instruction
(arXiv 2510.00237). Here names of actions or values of cards are drawn anew for each example.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import string
from collections.abc import Mapping, Sequence

import numpy as np

ANSWERS, GLOSS = "answers", "gloss"
"""Slots of every template: the list of names, and the sentence that says what each one means."""

_MAP, _PARAPHRASE, _DISTINCT = range(3)  # streams of randomness, apart from each other


@dataclasses.dataclass(frozen=True)
class SemanticMap:
    """Names of concepts, such as those of actions or the values of cards.

    Attributes:
        name: Name of the map, for records and error messages.
        names: Name of each concept, in the order in which prompts list them.
        gloss: Whether prompts say which concept each name stands for; names that speak for
            themselves need none.
    """

    name: str
    names: Mapping[str, str]
    gloss: bool = True

    def concept_of(self, answer: str) -> str | None:
        """The first concept that is called so, or None where no concept is."""
        return next((concept for concept, name in self.names.items() if name == answer), None)

    @property
    def answers(self) -> tuple[str, ...]:
        """Names in order: what may be answered to a prompt that lists them."""
        return tuple(self.names.values())


@dataclasses.dataclass(frozen=True)
class RenderedPrompt:
    """A prompt and the map that it was rendered with, from which its target is rendered too.

    Attributes:
        text: Text of the prompt.
        shown: Map of the names that the text shows.
        template: Name of the template.
        paraphrase: Index of the template's wording.
    """

    text: str
    shown: SemanticMap
    template: str
    paraphrase: int

    def target(self, concept: str) -> str:
        """What the prompt calls a concept."""
        return self.shown.names[concept]

    def is_valid(self, answer: str) -> bool:
        """Whether an answer is one of the names that the prompt shows."""
        return answer in self.shown.answers


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """Wordings of one prompt, texts with named slots such as `{board}` or `{Up}`.

    Besides concepts and values a wording may have the slots `{answers}`, the names in order, and
    `{gloss}`, a sentence that explains them; braces are doubled to stand for themselves.

    Attributes:
        name: Name of the template.
        wordings: Texts of the same meaning, the paraphrases; the first is the usual one.
        concepts: Concepts that a map has to name.
        values: Names of the slots that the task fills, such as a board.

    Raises:
        ValueError: A wording has a slot of another name, or is no text with slots.
    """

    name: str
    wordings: tuple[str, ...]
    concepts: tuple[str, ...]
    values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = (*self.concepts, *self.values, ANSWERS, GLOSS)
        if not self.wordings:
            raise ValueError(f"template {self.name} has no wording: give one text or more")
        for wording in self.wordings:
            try:
                slots = [slot for _, slot, _, _ in string.Formatter().parse(wording)]
            except ValueError as error:
                raise ValueError(f"template {self.name}: {error}: double its braces") from None
            for slot in slots:
                if slot is not None and slot not in known:
                    raise ValueError(
                        f"template {self.name} has the slot {{{slot}}}: choose from "
                        f"{', '.join(known)}"
                    )

    def render(self, shown: SemanticMap, paraphrase: int = 0, **values: str) -> RenderedPrompt:
        """The prompt with the names of a map.

        Args:
            shown: Map whose names the prompt shows.
            paraphrase: Index of the wording.
            values: Text of each slot that the task fills.

        Raises:
            ValueError: The map misses a name, a value is missing, or there is no such wording.
        """
        for concept in self.concepts:
            if not shown.names.get(concept):
                raise ValueError(
                    f"template {self.name}: map {shown.name} has no name for {concept}: give one "
                    f"to each of {', '.join(self.concepts)}"
                )
        if missing := [value for value in self.values if value not in values]:
            raise ValueError(f"template {self.name}: no value for the slot {{{missing[0]}}}")
        if not 0 <= paraphrase < len(self.wordings):
            raise ValueError(
                f"template {self.name} has {len(self.wordings)} wordings, not one of index "
                f"{paraphrase}: choose a smaller one"
            )
        meaning = ", ".join(f"{name} is {concept}" for concept, name in shown.names.items())
        text = self.wordings[paraphrase].format(
            **{concept: shown.names[concept] for concept in self.concepts},
            **{value: values[value] for value in self.values},
            **{ANSWERS: ", ".join(shown.answers), GLOSS: f" {meaning}." if shown.gloss else ""},
        )
        return RenderedPrompt(text, shown, self.name, paraphrase)


TEMPLATES: dict[str, PromptTemplate] = {}
"""Prompt templates by name; the modules that own them fill it."""


@dataclasses.dataclass(frozen=True)
class MapSampler:
    """Draws the map of each example: a pure function of seed, epoch and index.

    Nothing is stored between draws, so that a run that resumes, or reads its examples in another
    order, sees the same prompts.

    Attributes:
        concepts: Concepts that are named.
        words: Pool of names; a map takes different words for its concepts.
        maps: Whole maps to choose from in place of words.
        distinct: Number of different maps in all training examples (K); None for a fresh draw in
            each example, or for all `maps`.
        resample: Whether an example gets another map in each epoch, or keeps that of epoch 0.
        held_out: Number of words, or of maps, that training never sees. A hash of the word decides
            which ones, whatever the seed; of `maps` it is the last ones.
        paraphrases: Number of wordings, drawn apart from maps.
        seed: Seed of all draws.

    Raises:
        ValueError: The pool is too small for the options, or words are no names.
    """

    concepts: tuple[str, ...]
    words: tuple[str, ...] = ()
    maps: tuple[SemanticMap, ...] = ()
    distinct: int | None = None
    resample: bool = True
    held_out: int = 0
    paraphrases: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if bool(self.words) == bool(self.maps):
            raise ValueError("a sampler of maps has words or maps: give one of them")
        for name, least in (("held_out", 0), ("paraphrases", 1), ("seed", 0), ("distinct", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: choose {least} or more")
        words = sorted(self.words)
        for index, word in enumerate(words):
            if not word or word != word.strip() or word in words[index + 1 : index + 2]:
                raise ValueError(
                    f"words hold {word!r}, which is empty, repeated, or begins or ends in white "
                    "space: give words that differ, without space around them"
                )
        pool = len(self.words or self.maps)
        needed = len(self.concepts) if self.words else 1
        if pool - self.held_out < needed or 0 < self.held_out < needed:
            raise ValueError(
                f"held_out={self.held_out} of {pool} {self._noun}: leave {needed} or more on both "
                "sides, or hold out none"
            )
        left = len(self.training_pool)
        possible = math.perm(left, needed) if self.words else left
        if self.distinct is not None and self.distinct > possible:
            raise ValueError(
                f"distinct={self.distinct} maps of {left} {self._noun}: choose {possible} or fewer"
            )

    def map(self, epoch: int, index: int) -> SemanticMap:
        """The map of a training example.

        Args:
            epoch: Number of passes over the examples before this one.
            index: Index of the example.
        """
        rng = self._rng(_MAP, epoch if self.resample else 0, index)
        if self.maps:
            pool = self.maps[: len(self.maps) - self.held_out][: self.distinct]
            return pool[rng.integers(len(pool))]
        if self.distinct is None:
            return self._drawn(self.training_pool, rng)
        return self._distinct_maps[rng.integers(self.distinct)]

    def held_out_map(self, index: int) -> SemanticMap:
        """A map of the part of the pool that training never sees.

        Args:
            index: Index of the example.

        Raises:
            ValueError: Nothing is held out.
        """
        if not self.held_out:
            raise ValueError(f"held_out=0: no {self._noun} are held out to draw from")
        rng = self._rng(_MAP, 2**32 - 1, index)
        if self.maps:
            return self.maps[len(self.maps) - self.held_out :][rng.integers(self.held_out)]
        return self._drawn(self.held_out_pool, rng)

    def paraphrase(self, epoch: int, index: int) -> int:
        """Index of the wording of a training example; the arguments are those of `map`."""
        rng = self._rng(_PARAPHRASE, epoch if self.resample else 0, index)
        return int(rng.integers(self.paraphrases))

    @property
    def training_pool(self) -> tuple[str, ...] | tuple[SemanticMap, ...]:
        """Words, or maps, that training draws from."""
        pool = self._ordered if self.words else self.maps
        return pool[: len(pool) - self.held_out]

    @property
    def held_out_pool(self) -> tuple[str, ...] | tuple[SemanticMap, ...]:
        """Words, or maps, that training never sees."""
        pool = self._ordered if self.words else self.maps
        return pool[len(pool) - self.held_out :]

    @property
    def _noun(self) -> str:
        return "words" if self.words else "maps"

    @functools.cached_property
    def _ordered(self) -> tuple[str, ...]:
        return tuple(sorted(self.words, key=lambda word: hashlib.blake2b(word.encode()).digest()))

    @functools.cached_property
    def _distinct_maps(self) -> list[SemanticMap]:
        assert self.distinct is not None
        rng, found = self._rng(_DISTINCT, 0, 0), {}
        while len(found) < self.distinct:
            drawn = self._drawn(self.training_pool, rng)
            found.setdefault(drawn.answers, drawn)
        return list(found.values())

    def _rng(self, stream: int, epoch: int, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream, epoch, index])

    def _drawn(self, pool: Sequence, rng: np.random.Generator) -> SemanticMap:
        chosen = rng.choice(len(pool), len(self.concepts), replace=False)
        names = [pool[index] for index in chosen]
        return SemanticMap("drawn", dict(zip(self.concepts, names, strict=True)))

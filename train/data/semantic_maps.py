"""Prompts in which concepts get new names, such as actions or values of cards.

Supervised tuning on one fixed prompt teaches a model to answer without reading its instruction
(arXiv 2510.00237). Here names are sampled anew for each example. One object renders a prompt and
its target, so that both use the same names.
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
"""Slots that every template may use: the list of names, and the sentence that explains them."""

_MAP, _PARAPHRASE, _DISTINCT = range(3)  # independent streams of random numbers


@dataclasses.dataclass(frozen=True)
class SemanticMap:
    """Names that a prompt gives to concepts, such as to actions or to the values of cards.

    Attributes:
        name: Name of the map, for records and error messages.
        names: Mapping from concept to name, in the order in which prompts list the names.
        gloss: Whether prompts explain which concept each name stands for; self-explanatory names
            need no explanation.
    """

    name: str
    names: Mapping[str, str]
    gloss: bool = True

    def concept_of(self, answer: str) -> str | None:
        """Return the first concept whose name is `answer`, or None if there is none."""
        return next((concept for concept, name in self.names.items() if name == answer), None)

    @property
    def answers(self) -> tuple[str, ...]:
        """Names in the order of the concepts: the valid answers to a prompt that lists them."""
        return tuple(self.names.values())


@dataclasses.dataclass(frozen=True)
class RenderedPrompt:
    """A prompt with the map that it was rendered with; the same map gives the target its names.

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
        """Return the name that the prompt gives to a concept."""
        return self.shown.names[concept]

    def is_valid(self, answer: str) -> bool:
        """Whether an answer is one of the names that the prompt shows."""
        return answer in self.shown.answers


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """Template of a prompt: wordings of the same meaning with slots such as `{board}` or `{Up}`.

    Besides slots for concepts and values, a wording may have the slots `{answers}`, the names in
    order, and `{gloss}`, a sentence that explains the names. A literal brace is written twice.

    Attributes:
        name: Name of the template.
        wordings: Paraphrases: texts of the same meaning, of which the first is the default.
        concepts: Concepts that a map has to name; each concept is a slot.
        values: Names of the slots that the task fills, such as a board.

    Raises:
        ValueError: There is no wording, or a wording has an unknown slot or a single brace.
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
        """Render the prompt with the names of a map.

        Args:
            shown: Map whose names the prompt shows.
            paraphrase: Index of the wording.
            values: Text for each slot of `PromptTemplate.values`, keyed by the name of the slot.

        Raises:
            ValueError: The map lacks the name of a concept, a value is missing, or there is no
                wording of this index.
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
"""Prompt templates by name; each module that defines a template adds it."""


@dataclasses.dataclass(frozen=True)
class MapSampler:
    """Sampler of a semantic map for each example: a pure function of seed, epoch and index.

    Nothing is stored between samples, so a resumed run, or a run that reads the examples in another
    order, sees the same prompts.

    Attributes:
        concepts: Concepts that a map names.
        words: Pool of names, from which a map gives a different word to each concept.
        maps: Complete maps to choose from, instead of `words`.
        distinct: Number of different maps in all training examples (K); None samples a new map for
            each example, or chooses from all of `maps`.
        resample: Whether an example gets a new map in each epoch; False keeps the map of epoch 0.
        held_out: Number of words, or of maps, that training never sees. A hash, which does not
            depend on the seed, chooses the held-out words; the last maps of `maps` are held out.
        paraphrases: Number of wordings, from which an index is sampled independently of the map.
        seed: Seed of all samples.

    Raises:
        ValueError: Not exactly one of `words` and `maps` is given, a number is out of range or too
            large for the pool, or a word is empty, repeated or has white space around it.
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
        """Sample the map of a training example.

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
        """Sample a map from the part of the pool that training never sees.

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
        """Sample the index of the wording of a training example, with arguments as in `map`."""
        rng = self._rng(_PARAPHRASE, epoch if self.resample else 0, index)
        return int(rng.integers(self.paraphrases))

    @property
    def training_pool(self) -> tuple[str, ...] | tuple[SemanticMap, ...]:
        """Words, or maps, that training samples from."""
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

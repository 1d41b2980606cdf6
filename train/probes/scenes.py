"""Small rendered scenes: images, captions, and statements to complete with one of four answers.

A scene has one to four objects in the corners of an image. The objects differ in shape and colour,
so that each statement has one right answer. A scene is a function of seed, split and index. A hash
of the objects decides the split, so that no held-out scene is ever trained on.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from train.data.corpus import Split
from train.data.splits import split_of

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
CORNERS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("one", "two", "three", "four")
ANSWERS = {"colour": tuple(COLOURS), "shape": SHAPES, "position": CORNERS, "count": NUMBERS}
"""Mapping from each kind of question to its possible answers."""
TEXTS = {
    "colour": "the {shape} is",
    "shape": "the {colour} shape is a",
    "position": "the {colour} {shape} is at the",
    "count": "the number of shapes is",
}
"""Mapping from each kind of question to the template of a statement, which the answer completes."""

SIZE = 16  # side of an image in pixels
SPRITE = 6  # side of an object in pixels; an object lies within a quarter of the image
NOISE = 0.05  # standard deviation of the noise of each pixel
HELD_OUT = 0.2  # fraction of the scenes


class Thing(NamedTuple):
    """An object of a scene.

    Attributes:
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
        corner: One of `CORNERS`.
    """

    shape: str
    colour: str
    corner: str


@dataclasses.dataclass(frozen=True)
class Question:
    """A statement about a scene that an answer completes.

    Attributes:
        kind: Kind of the question, a key of `ANSWERS`.
        text: The statement up to the answer.
        answer: Index of the right answer in `ANSWERS[kind]`.
    """

    kind: str
    text: str
    answer: int

    @property
    def choices(self) -> tuple[str, ...]:
        """Possible answers; each of them continues `text` after a space."""
        return ANSWERS[self.kind]

    @property
    def statement(self) -> str:
        """The statement completed with the right answer, and a full stop."""
        return f"{self.text} {self.choices[self.answer]}."


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """Objects of a scene, and the image that shows the objects.

    Attributes:
        things: Objects in random order.
        image: Pixels `[SIZE, SIZE, 3]` float32, 0 for black and 1 for full colour, with noise.
        seed: Seeds of all random choices about the scene.
    """

    things: tuple[Thing, ...]
    image: np.ndarray
    seed: tuple[int, ...]

    @property
    def caption(self) -> str:
        """Objects in words, e.g. "a red circle at the top left, a blue cross at the top right."."""
        return caption(self.things)

    @property
    def shown(self) -> frozenset[Thing]:
        """Set of objects, equal for scenes that differ only in order, exact positions or noise."""
        return frozenset(self.things)

    def question(self, kind: str) -> Question:
        """Return the scene's question of the given kind (a key of `ANSWERS`) on a random object."""
        rng = np.random.default_rng([*self.seed, 1, list(ANSWERS).index(kind)])
        thing = self.things[rng.integers(len(self.things))]
        answer = {
            "colour": thing.colour,
            "shape": thing.shape,
            "position": thing.corner,
            "count": NUMBERS[len(self.things) - 1],
        }[kind]
        text = TEXTS[kind].format(shape=thing.shape, colour=thing.colour)
        return Question(kind, text, ANSWERS[kind].index(answer))

    def text(self) -> str:
        """Describe the scene in text: its caption, then a true statement of each kind, shuffled."""
        rng = np.random.default_rng([*self.seed, 2])
        kinds = [list(ANSWERS)[i] for i in rng.permutation(len(ANSWERS))]
        return " ".join([self.caption, *(self.question(kind).statement for kind in kinds)])


def caption(things: tuple[Thing, ...]) -> str:
    """Describe objects in words, in the given order."""
    return ", ".join(f"a {one.colour} {one.shape} at the {one.corner}" for one in things) + "."


def scene(seed: int, split: Split, index: int) -> Scene:
    """Generate a scene of a split; equal arguments give the same scene.

    Args:
        seed: Seed of all scenes.
        split: Split of the scene: "train", or "validation" for held-out scenes.
        index: Index of the scene in the split.
    """
    seeds = (seed, ("train", "validation").index(split), index)
    rng = np.random.default_rng([*seeds, 0])
    while True:
        count = rng.integers(1, len(CORNERS) + 1)
        shapes, colours, corners = (rng.permutation(len(CORNERS))[:count] for _ in range(3))
        things = tuple(
            Thing(SHAPES[shape], list(COLOURS)[colour], CORNERS[corner])
            for shape, colour, corner in zip(shapes, colours, corners, strict=True)
        )
        ordered = tuple(sorted(things, key=lambda thing: CORNERS.index(thing.corner)))
        if split_of(caption(ordered), HELD_OUT) == split:
            return Scene(things, _rendered(things, rng), seeds)


def distinct_scenes(seed: int, split: Split) -> Iterator[Scene]:
    """Yield scenes of a split that show different sets of objects.

    The iterator never ends: once all sets of objects have been shown, the search goes on forever.
    """
    seen = set()
    for index in itertools.count():
        one = scene(seed, split, index)
        if one.shown not in seen:
            seen.add(one.shown)
            yield one


def patches(images: np.ndarray, patch: int) -> np.ndarray:
    """Divide images into square patches, row by row, and flatten the pixels of each.

    Args:
        images: Pixels `[N, H, W, C]` of N images with height H, width W and C channels.
        patch: Side of a patch in pixels.

    Returns:
        Features `[N, P, patch * patch * C]` of `P = (H / patch) * (W / patch)` patches per image.

    Raises:
        ValueError: The side of a patch does not divide the height or the width.
    """
    count, height, width, channels = images.shape
    if patch < 1 or height % patch or width % patch:
        raise ValueError(
            f"patch={patch} does not divide images of {height} x {width} pixels: choose a divisor "
            f"of {np.gcd(height, width)}"
        )
    down, right = height // patch, width // patch
    parts = images.reshape(count, down, patch, right, patch, channels).swapaxes(2, 3)
    return parts.reshape(count, down * right, patch * patch * channels)


def _rendered(things: tuple[Thing, ...], rng: np.random.Generator) -> np.ndarray:
    image = rng.normal(0, NOISE, (SIZE, SIZE, 3))
    quarter = SIZE // 2
    for thing in things:
        row, column = divmod(CORNERS.index(thing.corner), 2)
        top, left = rng.integers(0, quarter - SPRITE + 1, 2) + (quarter * row, quarter * column)
        drawn = _sprite(thing.shape)[..., None] * np.array(COLOURS[thing.colour])
        image[top : top + SPRITE, left : left + SPRITE] += drawn
    return image.astype(np.float32)


@functools.cache
def _sprite(shape: str) -> np.ndarray:
    """Return the mask `[SPRITE, SPRITE]` of the pixels that a shape covers."""
    y, x = np.meshgrid(*[np.linspace(-1, 1, SPRITE)] * 2, indexing="ij")
    return {
        "circle": x**2 + y**2 <= 1.2,
        "square": np.ones_like(x, bool),
        "triangle": np.abs(x) <= (y + 1.2) / 2,
        "cross": (np.abs(x) < 0.3) | (np.abs(y) < 0.3),
    }[shape]

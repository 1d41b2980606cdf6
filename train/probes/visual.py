"""Visual probe: train a projector of images to a frozen decoder, and score answers about images.

There are three controls: the image of another example (shuffled), no image (blind), and a projector
that was trained and is tested on blank images, which can only learn to guess (blank).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from thoughtbubbles import Architecture, ArchitectureConfig
from train.cli.numbers import check_least
from train.data.corpus import Split
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable
from train.engine.step import make_train_step
from train.probes.projector import ProjectorParam, SeeingModel, answer_loss
from train.probes.scenes import (
    ANSWERS,
    COLOURS,
    SHAPES,
    SIZE,
    TEXTS,
    Question,
    Scene,
    patches,
    scene,
)

Encode = Callable[[str], list[int]]
CONDITIONS = ("image", "shuffled", "blind", "blank")


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """Sizes of the projector, and options of its training and its test."""

    steps: int = 800
    """Number of training steps of a projector."""

    batch: int = 64
    """Number of questions in a step."""

    learning_rate: float = 3e-3
    """Peak learning rate of the projector."""

    patch: int = 8
    """Side of a patch in pixels, a divisor of 16, since images have 16 x 16 pixels."""

    tokens: int = 4
    """Number of soft tokens that each patch becomes."""

    hidden: int = 128
    """Width of the projector's hidden layer."""

    questions: int = 256
    """Number of held-out questions of each kind that are scored."""

    def __post_init__(self):
        check_least(self, steps=1, batch=1, patch=1, tokens=1, hidden=1, questions=2)
        _ = self.shape, self.optimizer  # both raise errors for wrong options

    @property
    def optimizer(self) -> OptimizerConfig:
        """AdamW without weight decay, with a cosine schedule down to 0."""
        return OptimizerConfig(learning_rate=self.learning_rate, weight_decay=0.0, final_ratio=0.0)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of patches of an image, and number of features of a patch."""
        _, count, features = patches(np.zeros((1, SIZE, SIZE, 3)), self.patch).shape
        return count, features


class Rate(NamedTuple):
    """Fraction of right answers.

    Attributes:
        rate: Fraction of right answers, from 0 to 1.
        low: Lower end of the 95 % interval of `rate` by Wilson's score.
        high: Upper end of the 95 % interval.
    """

    rate: float
    low: float
    high: float


class Example(NamedTuple):
    """A question, and the scene that it is about."""

    question: Question
    scene: Scene


class VisualProbe:
    """Trainer and tester of projectors for frozen decoders of one config, compiled only once.

    Args:
        config: Config of the decoders.
        encode: Function from a text to the token ids that the decoder reads, including the tokens
            that begin every text (`LanguageModel.prompt`).
        options: Sizes of the projector, and options of its training and its test.
        seed: Seed of the projector and of the scenes.

    Raises:
        ValueError: The decoder can't be probed (`SeeingModel`), or an answer does not begin with a
            token of its own.
    """

    def __init__(self, config: ArchitectureConfig, encode: Encode, options: ProbeConfig, seed: int):
        self.config, self.options, self.seed = config, options, seed
        self._encode = encode
        self._before = len(os.path.commonprefix([encode(""), encode("the")]))
        self._width = _width(encode)
        self._mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        self._trainable = make_trainable(
            config, options.optimizer, options.steps, self._mesh, seed, "auto", ProjectorParam,
            self.seeing,
        )  # fmt: skip
        self._step = make_train_step(self._trainable, 1, answer_loss)

        @jax.jit
        def log_probs(variables: Any, tokens: jax.Array, scored: jax.Array, features: Any):
            model: SeeingModel = self._trainable.model(variables)
            return model.log_probs(tokens, scored, features).sum(axis=1)

        @jax.jit
        def mean_state(model: Architecture, tokens: jax.Array) -> jax.Array:
            decoder, real = model.backbone(), tokens >= 0
            length = real.sum(axis=1, dtype=jnp.int32)
            hidden = decoder.hidden_states(decoder.embed_tokens(jnp.maximum(tokens, 0)), length)
            total = jnp.where(real[..., None], hidden.astype(jnp.float32), 0).sum(axis=1)
            return total / length[:, None]

        self._log_probs, self._mean_state = log_probs, mean_state

    def seeing(self, model: Architecture) -> SeeingModel:
        """Wrap a decoder as a `SeeingModel` with a new, untrained projector.

        Args:
            model: Decoder with the probe's config.

        Raises:
            ValueError: The decoder's config differs from the probe's.
        """
        options = self.options
        if model.config != self.config:
            raise ValueError(
                f"a decoder of {model.config.sizes()}; this probe is for {self.config.sizes()}: "
                "make a probe for each config"
            )
        return SeeingModel(
            model, options.shape, options.tokens, options.hidden, self._before,
            rngs=nnx.Rngs(self.seed),
        )  # fmt: skip

    def train(self, model: Architecture, *, blank: bool = False) -> tuple[Any, float]:
        """Train a projector on questions about scenes of the training split.

        Args:
            model: Frozen decoder; its arrays are copied.
            blank: Whether all images are replaced by blank images, as a control.

        Returns:
            nnx.State of all parameters of the `SeeingModel`, and the mean loss over the last tenth
            of the steps, in nats per token of an answer.
        """
        variables = jax.tree.map(lambda leaf: leaf.copy(), nnx.state(self.seeing(model)))
        state, losses = self._trainable.start(variables), []
        for step in range(self.options.steps):
            batch = self.rows(self.examples("train", self.options.batch, step))
            if blank:
                batch["features"][:] = 0
            placed = {name: place(values, self._mesh) for name, values in batch.items()}
            state, metrics = self._step(state, placed)
            losses.append(metrics["loss"])
        last = losses[-max(len(losses) // 10, 1) :]
        return state.variables, float(np.mean([float(loss) for loss in last]))

    def scores(self, seeing: Any, blank: Any) -> dict[str, dict[str, Rate]]:
        """Score held-out questions of each kind under each condition.

        Args:
            seeing: nnx.State that `train` returned for images.
            blank: nnx.State that `train` returned for blank images (`blank=True`).

        Returns:
            Mapping from a kind of question (`ANSWERS`) to a mapping from a condition (`CONDITIONS`)
            to the fraction of right answers.
        """
        found = {}
        for kind in ANSWERS:
            examples = self.examples("validation", self.options.questions, 0, kind)
            shown = self.features([one.scene for one in examples])
            found[kind] = {
                "image": self.rate(seeing, examples, shown),
                "shuffled": self.rate(seeing, examples, np.roll(shown, 1, axis=0)),
                "blind": self.rate(seeing, examples, None),
                "blank": self.rate(blank, examples, np.zeros_like(shown)),
            }
        return found

    def rate(
        self, variables: Any, examples: Sequence[Example], features: np.ndarray | None
    ) -> Rate:
        """Compute the fraction of questions whose most probable choice is the right answer.

        Args:
            variables: nnx.State of a `SeeingModel`, as `train` returns it.
            examples: N questions with their scenes.
            features: Features `[N, P, F]` of the image shown with each question; None for no
                images.
        """
        guesses = self.answers(variables, examples, features)
        right = guesses == np.array([one.question.answer for one in examples])
        return wilson(int(right.sum()), len(examples))

    def answers(
        self, variables: Any, examples: Sequence[Example], features: np.ndarray | None
    ) -> np.ndarray:
        """Return the index of the most probable choice for each question, `[N]` int.

        Args:
            variables: nnx.State of a `SeeingModel`, as `train` returns it.
            examples: N questions with their scenes.
            features: Features `[N, P, F]` of the image shown with each question; None for no
                images.
        """
        count = len(examples[0].question.choices)
        texts = [(one.question.text, c) for one in examples for c in one.question.choices]
        batch = self._tokens(texts)
        shown = None if features is None else np.repeat(features, count, axis=0)
        found = self._log_probs(variables, batch["tokens"], batch["scored"], shown)
        return np.asarray(found).reshape(len(examples), count).argmax(axis=1)

    def caption_states(self, model: Architecture, scenes: Sequence[Scene]) -> np.ndarray:
        """Compute the mean final hidden state over the tokens of each caption, `[N, D]` float32.

        Tokens that begin every text are included in the mean.

        Args:
            model: Frozen decoder.
            scenes: N scenes, of which only the captions are used.
        """
        ids = [self._encode(one.caption) for one in scenes]
        tokens = np.full((len(ids), max(map(len, ids))), -1, np.int32)
        for row, one in zip(tokens, ids, strict=True):
            row[: len(one)] = one
        return np.asarray(self._mean_state(model, tokens))

    def examples(
        self, split: Split, count: int, part: int, kind: str | None = None
    ) -> list[Example]:
        """Return questions about scenes of a split, one for each sampled scene.

        Several scenes may show the same set of objects with other pixels: 256 held-out scenes show
        about 160 different sets.

        Args:
            split: Split of the scenes.
            count: Number of questions.
            part: Index of the block of `count` scenes; the first scene has index `part * count`.
            kind: Kind of all questions; None cycles through all kinds.
        """
        kinds = itertools.cycle(ANSWERS) if kind is None else itertools.repeat(kind)
        drawn = (scene(self.seed, split, part * count + index) for index in range(count))
        return [Example(one.question(name), one) for one, name in zip(drawn, kinds, strict=False)]

    def rows(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Build a batch for `answer_loss` from questions with their right answers.

        Returns:
            Mapping from names to arrays: `tokens`, `[B, L]` int32 padded with -1 to L tokens;
            `scored`, `[B, L]` bool, true for tokens of the answer; `features`, `[B, P, F]` float32.
        """
        asked = [one.question for one in examples]
        batch = self._tokens([(one.text, one.choices[one.answer]) for one in asked])
        return batch | {"features": self.features([one.scene for one in examples])}

    def features(self, scenes: Sequence[Scene]) -> np.ndarray:
        """Return the features `[N, P, F]` of the scenes' images: the pixels of each patch."""
        return patches(np.stack([one.image for one in scenes]), self.options.patch)

    def _tokens(self, pairs: Sequence[tuple[str, str]]) -> dict[str, np.ndarray]:
        tokens = np.full((len(pairs), self._width), -1, np.int32)
        scored = np.zeros(tokens.shape, bool)
        for row, mask, (text, answer) in zip(tokens, scored, pairs, strict=True):
            start, ids = _encoded(self._encode, text, answer)
            row[: len(ids)] = ids
            mask[start : len(ids)] = True
        return {"tokens": tokens, "scored": scored}


def wilson(right: int, count: int) -> Rate:
    """Compute a fraction of right answers with its 95 % interval by Wilson's score.

    Args:
        right: Number of right answers.
        count: Number of answers, 1 or more.
    """
    z = 1.959964
    rate = right / count
    middle = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    # At a rate of 0 or 1, one end of the interval is the rate itself, without rounding errors.
    low, high = (middle - half if right else 0.0), (middle + half if right < count else 1.0)
    return Rate(rate, low, high)


def _encoded(encode: Encode, text: str, answer: str) -> tuple[int, list[int]]:
    """Encode a text with its answer; return the index of the answer's first token, and the ids.

    Raises:
        ValueError: The answer's first token is merged with the end of the text.
    """
    asked, ids = encode(text), encode(f"{text} {answer}")
    if len(ids) <= len(asked) or ids[: len(asked)] != asked:
        raise ValueError(
            f"the answer {answer!r} to {text!r} has no token of its own: probe with a tokenizer "
            "that cuts words at spaces"
        )
    return len(asked), ids


def _width(encode: Encode) -> int:
    """Return the number of tokens of the longest row that a question can give."""
    texts = [
        (template.format(shape=shape, colour=colour), answer)
        for kind, template in TEXTS.items()
        for shape, colour, answer in itertools.product(SHAPES, COLOURS, ANSWERS[kind])
    ]
    return max(len(_encoded(encode, *pair)[1]) for pair in texts)

"""The visual probe: its scenes, what a projector learns and what stays frozen, its controls."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_architectures import SMALL
from tiny import BASE

from thoughtbubbles import ARCHITECTURES, Architecture, ArchitectureConfig
from thoughtbubbles.architecture import architecture_of
from thoughtbubbles.module import abstract_module
from train.probes import scenes
from train.probes.alignment import alignment, mutual_knn, nearest
from train.probes.projector import ProjectorParam, SeeingModel, answer_loss
from train.probes.visual import CONDITIONS, ProbeConfig, VisualProbe, wilson

PHRASES = [*scenes.TEXTS.values(), *(a for answers in scenes.ANSWERS.values() for a in answers)]
WORDS = sorted({word for phrase in PHRASES for word in phrase.split() if "{" not in word})
IDS = {word: index for index, word in enumerate(["<s>", *WORDS])}
OPTIONS = ProbeConfig(
    steps=100, batch=64, learning_rate=0.03, tokens=1, hidden=16, questions=64
)  # fmt: skip


def encode(text: str) -> list[int]:
    """A token for each word, behind a separator."""
    return [0, *(IDS[word.strip(".,")] for word in text.split())]


@dataclasses.dataclass(frozen=True)
class SummingConfig(ArchitectureConfig):
    vocab_size: int = len(IDS)
    embed_dim: int = len(IDS)


class Summing(Architecture):
    """A hidden state is the sum of the vectors so far, and its own logits.

    What is a sum over patches of their features can be read off: how many shapes there are.
    """

    config_class = SummingConfig

    def __init__(self, config, *, rngs, constrain=None, attend=None):
        self.config = config
        self.table = nnx.Param(jnp.eye(config.vocab_size, config.embed_dim))

    def embed_tokens(self, tokens):
        return self.table[...][tokens]

    def unembed(self, hidden):
        return hidden @ self.table[...].T

    def hidden_states(self, x, length=None, *, positions=None, visible=None):
        return jnp.cumsum(x, axis=1)


class Ordered(Summing):
    """A sum in which each position has a weight of its own."""

    def hidden_states(self, x, length=None, *, positions=None, visible=None):
        return jnp.cumsum(x * weights_of(x.shape[1]), axis=1)


def weights_of(count: int) -> np.ndarray:
    return np.cos(np.arange(count, dtype=np.float32))[:, None]


@pytest.fixture(scope="module")
def probe():
    ARCHITECTURES["summing"] = Summing
    yield VisualProbe(SummingConfig(), encode, OPTIONS, seed=0)
    del ARCHITECTURES["summing"]


@pytest.fixture(scope="module")
def model():
    return Summing(SummingConfig(), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def trained(probe, model):
    return probe.train(model)[0]


# Scenes.


def test_a_scene_is_a_function_of_seed_split_and_index():
    first, again = (scenes.scene(1, "train", 10**9) for _ in range(2))
    assert first.things == again.things and np.array_equal(first.image, again.image)
    assert first.text() == again.text()
    others = [scenes.scene(0, "train", 10**9), scenes.scene(1, "train", 0)]
    assert all(not np.array_equal(first.image, other.image) for other in others)
    shown = {
        split: {scenes.scene(0, split, index).shown for index in range(300)}
        for split in ("train", "validation")
    }
    assert not shown["train"] & shown["validation"]
    kept = {scenes.scene(5, "train", index).shown for index in range(300)}
    assert not kept & shown["validation"], "the split depends on the seed"


def test_images_show_what_is_said():
    """Colour, corner and shape of each object, read off the pixels without the renderer."""
    for index in range(40):
        one = scenes.scene(0, "validation", index)
        quarters = {
            corner: one.image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            for (row, column), corner in zip(
                [(0, 0), (0, 1), (1, 0), (1, 1)], scenes.CORNERS, strict=True
            )
        }
        seen = {corner: part.max(axis=-1) > 0.5 for corner, part in quarters.items()}
        assert {corner for corner, lit in seen.items() if lit.any()} == {
            thing.corner for thing in one.things
        }
        for thing in one.things:
            lit = seen[thing.corner]
            pixels = quarters[thing.corner][lit]
            assert np.allclose(pixels.mean(axis=0), scenes.COLOURS[thing.colour], atol=0.1)
            widths = lit.sum(axis=1)
            assert (
                widths[widths > 0].tolist()
                == {
                    "square": [6, 6, 6, 6, 6, 6],
                    "circle": [2, 4, 6, 6, 4, 2],
                    "cross": [2, 2, 6, 6, 2, 2],
                    "triangle": [2, 2, 4, 4, 6],
                }[thing.shape]
            )


def test_questions_have_the_answer_that_the_scene_shows():
    asked = {kind: [] for kind in scenes.ANSWERS}
    for index in range(150):
        one = scenes.scene(0, "train", index)
        text = one.text()
        for kind, answers in asked.items():
            question = one.question(kind)
            words, answer = question.text.split(), question.choices[question.answer]
            matching = [
                thing
                for thing in one.things
                if all(word not in scenes.SHAPES or word == thing.shape for word in words)
                and all(word not in scenes.COLOURS or word == thing.colour for word in words)
            ]
            if kind == "count":
                assert answer == scenes.NUMBERS[len(one.things) - 1]
            else:
                [thing] = matching  # the only one that the question fits
                facts = {"position": thing.corner, "colour": thing.colour, "shape": thing.shape}
                assert answer == facts[kind]
            assert question.statement in text and text.startswith(one.caption)
            answers.append(question.answer)
    for answers in asked.values():
        assert (np.bincount(answers, minlength=4) > 20).all(), "a constant answer is 1/4 right"


def test_patches_are_cut_row_by_row():
    image = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    found = scenes.patches(image, 2)
    for row in range(2):
        for column in range(3):
            part = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert np.array_equal(found[:, 3 * row + column], part.reshape(2, -1))


# The projector in front of a frozen decoder.


@pytest.mark.parametrize("before", [0, 1])
def test_soft_tokens_stand_behind_what_is_in_front_of_every_text(before):
    """The answer's log-probabilities against sums of vectors in NumPy, row by row."""
    model = Ordered(SummingConfig(), rngs=nnx.Rngs(0))
    seeing = SeeingModel(model, (2, 3), 2, 4, before, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 2, 3)).astype(np.float32)
    tokens = np.array([[0, 5, 7, 3, -1, -1], [0, 2, 9, 4, 6, 8]], np.int32)
    scored = np.array([[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1]], bool)
    soft = np.asarray(seeing.projector(jnp.asarray(features)))
    assert soft.shape == (2, 4, len(IDS))
    sizes = np.sqrt(np.square(soft).mean(axis=-1))
    assert np.allclose(sizes, len(IDS) ** -0.5, rtol=1e-5)  # that of the embeddings
    table = np.eye(len(IDS), dtype=np.float32)
    log_probs = jax.jit(lambda seeing, *rows: seeing.log_probs(*rows))
    for shown in (features, None) if before else (features,):
        found = np.asarray(log_probs(seeing, tokens, scored, shown))
        assert found.shape == (2, 5 - before)
        for row, (ids, mask) in enumerate(zip(tokens, scored, strict=True)):
            images = soft[row] if shown is not None else soft[row, :0]
            for index in range(before + 1, 6):
                x = np.concatenate([table[ids[:before]], images, table[ids[before:index]]])
                logits = (x * weights_of(len(x))).sum(axis=0)
                expected = logits[ids[index]] - np.log(np.exp(logits).sum()) if mask[index] else 0
                assert np.isclose(found[row, index - before - 1], expected, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_every_architecture_can_be_shown_images(name):
    """Traced, not computed: plain, forking and Hatchling decoders, with only a projector to train;
    pretrained ones are `Thoughtbubbles` too."""
    config = SMALL[name]
    build = lambda: SeeingModel(  # noqa: E731
        architecture_of(config)(config, rngs=nnx.Rngs(0)), (4, 192), 1, 16, 1, rngs=nnx.Rngs(0)
    )
    seeing = abstract_module(build)
    graphdef, params, rest = nnx.split(seeing, ProjectorParam, ...)
    assert set(params) == {"projector"} and "projector" not in rest

    def loss(params, rest, tokens, features):
        model = nnx.merge(graphdef, params, rest)
        batch = {"tokens": tokens, "scored": tokens >= 0, "features": features}
        return answer_loss(model, batch, jax.random.key(0))[0]

    tokens = jax.ShapeDtypeStruct((2, 6), jnp.int32)
    features = jax.ShapeDtypeStruct((2, 4, 192), jnp.float32)
    grads = jax.eval_shape(jax.grad(loss), params, rest, tokens, features)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)


def test_steps_change_the_projector_alone(probe, model, trained):
    first = nnx.state(probe.seeing(model))
    before, after = (nnx.to_pure_dict(weights) for weights in (first, trained))
    equal = functools.partial(jax.tree.map, lambda a, b: np.array_equal(a, b))
    assert all(jax.tree.leaves(equal(before["model"], after["model"])))
    assert not any(jax.tree.leaves(equal(before["projector"], after["projector"])))
    assert np.array_equal(model.table[...], np.eye(len(IDS)))  # not donated


def test_the_planted_task_is_learned_and_its_controls_are_not(probe, model, trained, monkeypatch):
    rate, calls = VisualProbe.rate, []

    def spied(self, weights, examples, features):
        calls.append((weights, features))
        return rate(self, weights, examples, features)

    monkeypatch.setattr(VisualProbe, "rate", spied)
    untrained = nnx.state(probe.seeing(model))
    found = probe.scores(trained, untrained)
    assert set(found) == set(scenes.ANSWERS) and set(found["count"]) == set(CONDITIONS)
    count = found["count"]  # the one question that a sum answers
    assert count["image"].low > 0.75
    assert count["shuffled"].low < 0.25 < count["shuffled"].high  # chance
    for first in range(0, len(calls), 4):
        image, shuffled, blind, blank = calls[first : first + 4]
        assert image[0] is shuffled[0] is blind[0] is trained and blank[0] is untrained
        assert np.array_equal(shuffled[1][1:], image[1][:-1])
        assert np.array_equal(shuffled[1][0], image[1][-1])
        assert blind[1] is None and not blank[1].any()


def test_blind_answers_do_not_depend_on_images(probe, model, trained):
    examples = probe.examples("validation", 16, 0, "colour")
    others = [
        one._replace(scene=dataclasses.replace(one.scene, image=1 - one.scene.image))
        for one in examples
    ]
    untrained = nnx.state(probe.seeing(model))
    blind = probe.answers(trained, examples, None)
    assert np.array_equal(blind, probe.answers(trained, others, None))
    assert np.array_equal(blind, probe.answers(untrained, examples, None))
    shown = [probe.features([one.scene for one in those]) for those in (examples, others)]
    found = [probe.answers(trained, examples, features) for features in shown]
    assert not np.array_equal(*found)


def test_training_on_blank_images_sees_none(probe, model, monkeypatch):
    """Other pixels, the same projector to the bit."""
    short = VisualProbe.__new__(VisualProbe)
    short.__dict__ |= probe.__dict__ | {"options": dataclasses.replace(OPTIONS, steps=2)}
    first, _ = short.train(model, blank=True)
    seen, _ = short.train(model)
    features = VisualProbe.features
    monkeypatch.setattr(
        VisualProbe, "features", lambda self, those: 1 - features(self, those)
    )  # fmt: skip
    second, _ = short.train(model, blank=True)
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), first, second)
    assert all(jax.tree.leaves(same))
    assert not np.array_equal(first["projector"]["inputs"][...], seen["projector"]["inputs"][...])


def test_intervals_are_wilsons():
    """The ends p solve (p̂ - p)² = z² p (1 - p) / n."""
    for right, count in ((0, 3), (3, 3), (0, 20), (7, 20), (20, 20), (64, 256)):
        rate, low, high = wilson(right, count)
        assert rate == right / count and 0 <= low <= rate <= high <= 1
        for end in (low, high):
            if 0 < end < 1:
                assert np.isclose((rate - end) ** 2, 1.959964**2 * end * (1 - end) / count)


# Alignment of kernels.


def brute_force(first: np.ndarray, second: np.ndarray, k: int) -> float:
    """Mutual k-NN by loops: sort the others of each point by cosine."""

    def cosine(x, y):
        return x @ y / np.sqrt((x @ x) * (y @ y))

    def neighbours(points, i):
        others = sorted(set(range(len(points))) - {i}, key=lambda j: cosine(points[i], points[j]))
        return set(others[-k:])

    shared = [len(neighbours(first, i) & neighbours(second, i)) / k for i in range(len(first))]
    return sum(shared) / len(shared)


@pytest.mark.parametrize("k", [1, 5, 29])
def test_mutual_neighbours_are_those_of_brute_force(k):
    rng = np.random.default_rng(k)
    first = rng.normal(size=(30, 6))
    second = np.concatenate([first[:, :2] + 0.3 * rng.normal(size=(30, 2)), first[:, 2:4]], axis=1)
    assert mutual_knn(first, second, k) == pytest.approx(brute_force(first, second, k), abs=1e-12)
    assert mutual_knn(first, second, k) == mutual_knn(second, first, k)
    sizes = rng.uniform(0.1, 9, (30, 1))
    assert mutual_knn(first, first * sizes, k) == 1  # cosine: sizes do not matter
    if k == 29:  # all others are neighbours
        assert mutual_knn(first, second, k) == 1
    assert (nearest(first, k).sum(axis=1) == k).all() and not nearest(first, k).diagonal().any()


def test_points_paired_by_lot_align_by_chance():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 100, 8))
    same = alignment(first, first @ np.linalg.qr(rng.normal(size=(8, 8)))[0], 10)
    assert same.value == 1 and same.p_value == 1 / 201
    assert same.chance == 10 / 99 and abs(same.permuted - same.chance) < 0.005
    apart = alignment(first, second, 10)
    assert abs(apart.value - apart.chance) < 0.03 and apart.p_value > 0.05


def test_ties_are_no_alignment():
    """Of points in two places, paired by lot, chance is what an order of points inflates."""
    rng = np.random.default_rng(0)
    found = [alignment(*np.eye(2)[rng.integers(0, 2, (2, 60))], 5, 20, seed) for seed in range(40)]
    assert abs(np.mean([one.value - one.chance for one in found])) < 0.01
    assert 0.3 < np.mean([one.p_value for one in found]) < 0.7


# Mistakes.


def test_mistakes_are_one_line(probe, model):
    with pytest.raises(ValueError, match=r"vocab_size 9.*this probe is for vocab_size \d+.*make a"):
        probe.train(Summing(SummingConfig(vocab_size=9), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"learning_rate=0 is not positive"):
        ProbeConfig(learning_rate=0)
    with pytest.raises(ValueError, match=r"patch=5 does not divide images of 16 x 16 pixels: cho"):
        ProbeConfig(patch=5)
    with pytest.raises(ValueError, match="steps=0 is below 1"):
        ProbeConfig(steps=0)
    merged = lambda text: [len(text)]  # noqa: E731
    with pytest.raises(ValueError, match="has no token of its own: probe with a tokenizer that"):
        VisualProbe(probe.config, merged, OPTIONS, seed=0)
    points = np.eye(4)
    with pytest.raises(ValueError, match="k=4 neighbours among 4 points: choose from 1 to 3"):
        mutual_knn(points, points, 4)
    with pytest.raises(ValueError, match="4 points beside 3: give two representations"):
        mutual_knn(points, points[:3], 1)
    with pytest.raises(ValueError, match=r"features of shape \(4,\) are no finite matrix"):
        mutual_knn(points[0], points, 1)
    with pytest.raises(ValueError, match="no finite matrix"):
        mutual_knn(points * np.nan, points, 1)
    with pytest.raises(ValueError, match="permutations=0: choose 1 or more"):
        alignment(points, points, 1, permutations=0)
    seeing = SeeingModel(model, (4, 192), 1, 16, 1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\(2, 16, 48\): this projector reads rows of 4 patches"):
        seeing.projector(jnp.zeros((2, 16, 48)))
    with pytest.raises(ValueError, match="TopK.*lets the answer decide what forks before it"):
        abstract_module(
            lambda: SeeingModel(
                architecture_of(BASE)(BASE, rngs=nnx.Rngs(0)), (4, 192), 1, 16, 1,
                rngs=nnx.Rngs(0),
            )
        )  # fmt: skip

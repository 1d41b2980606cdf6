"""`PrefixRank(noise=...)`: choosing by noisy scores in training, and only there."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import BASE, VOCAB, quick_model

from thoughtbubbles import Fork, PrefixRank, Streams, Thoughtbubbles
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable
from train.engine.step import make_train_step

QUIET = dataclasses.replace(
    BASE, num_layers=2, fork_layers=(0, 1), score_originals=False, policy=PrefixRank(1.5)
)
NOISY = dataclasses.replace(QUIET, policy=PrefixRank(1.5, noise=1.0))
ROWS, TOKENS = 40, 12


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, VOCAB, (ROWS, TOKENS), dtype=np.int32)


@jax.jit
def run(model: Thoughtbubbles, tokens, key=None):
    """Logits and, for each fork layer, the token of each stream."""
    output = model.run(tokens, key=key)
    return model.logits(output.streams), [
        jnp.where(streams.alive, streams.token, -1) for streams in output.forks
    ]


def same(ours, theirs) -> bool:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_without_a_key_there_is_no_noise(tokens):
    quiet, noisy = quick_model(QUIET), quick_model(NOISY)
    expected = run(quiet, tokens)
    assert same(run(noisy, tokens), expected)
    assert same(run(quiet, tokens, jax.random.key(0)), expected), "nor where the scale is 0"


def test_each_key_chooses_otherwise_within_the_budget(tokens):
    noisy = quick_model(NOISY)
    quiet, first, again, other = (
        run(noisy, tokens, key)[1]
        for key in (None, jax.random.key(0), jax.random.key(0), jax.random.key(1))
    )
    assert same(first, again)
    for choice in (first, other):
        for before, now in zip(quiet, choice, strict=True):
            assert (np.asarray(before) != np.asarray(now)).any(axis=1).mean() > 0.5
            counts = np.array([[(row == t).sum() for t in range(TOKENS)] for row in now])
            assert (counts >= 1).all(), "originals live"
            assert (counts.cumsum(axis=1) <= 1.5 * (np.arange(TOKENS) + 1)).all()
    assert not same(first[:1], other[:1]) and not same(first[1:], other[1:])


def test_with_noise_later_tokens_still_decide_nothing(tokens):
    noisy, key = quick_model(NOISY), jax.random.key(0)
    for j in (1, 5, 11):
        changed = tokens.copy()
        changed[:, j:] = (changed[:, j:] + 1) % VOCAB
        before, after = (np.asarray(run(noisy, t, key)[0]) for t in (tokens, changed))
        np.testing.assert_array_equal(before[:, :j], after[:, :j])
        assert (before[:, j:] != after[:, j:]).any()


def test_scale_one_draws_in_proportion_to_scores():
    """Two tokens, room for one fork when the second comes: the second forks iff it wins."""
    rows, fork = 20_000, Fork(8, PrefixRank(1.5, noise=1.0), rngs=nnx.Rngs(0))
    fork.score[...] *= 50
    x = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)

    @jax.jit
    def draw(fork):
        streams = Streams.start(jnp.broadcast_to(x, (rows, 2, 8)))
        scores = jnp.exp(fork.candidates(streams).log_score[0, ::2])
        return scores, fork(streams, key=jax.random.key(1)).token

    scores, token = map(np.asarray, draw(fork))
    share = (token[:, 1:] == 1).sum(axis=1).mean() - 1
    expected = scores[1] / scores.sum()
    assert abs(expected - 0.5) > 0.05, "the scores differ"
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / rows)


def losses_of_steps(sizes: tuple[int, ...] = (1, 1, 1), devices: int = 1) -> np.ndarray:
    """Losses of three steps on the same rows, in which nothing is learned."""
    rows = np.random.default_rng(1).integers(0, 32, (16, 13), dtype=np.int32)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:devices])
    optimizer = OptimizerConfig(learning_rate=1e-30)  # so that only noise differs by step
    small = {"num_layers": 1, "fork_layers": (0,), "vocab_size": 32}  # divides over the mesh
    config = dataclasses.replace(NOISY, **small)
    trainable = make_trainable(config, optimizer, steps=10, mesh=mesh)
    step, state = make_train_step(trainable), trainable.init()
    before, found = jax.tree.map(np.array, state.variables), []
    for _ in range(3):
        state, metrics = step(state, place(rows, mesh))
        found.append(float(metrics["loss"]))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.variables, before)
    assert max(jax.tree.leaves(moved)) < 1e-25
    return np.array(found)


def test_the_noise_of_a_step_is_its_own():
    assert np.ptp(losses_of_steps()) > 1e-5


@pytest.mark.experiment  # `python -m pytest -m experiment tests/test_noise.py`
def test_the_noise_of_a_step_is_the_same_on_any_mesh():
    np.testing.assert_allclose(losses_of_steps((2, 2, 2), 8), losses_of_steps(), rtol=1e-6)


@pytest.mark.parametrize("noise", [-1.0, math.nan, math.inf])
def test_a_scale_that_scales_nothing_is_refused(noise):
    with pytest.raises(ValueError, match="choose a finite number, 0 or more"):
        PrefixRank(noise=noise)

"""Fork layers in a Dragon Hatchling: streams read each other as the equations say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hatchling_tiny import GOLDEN, drawn, wide

from thoughtbubbles import PrefixRank, Threshold, TopK
from thoughtbubbles.hatchling import ForkingHatchling, ForkingHatchlingConfig, grow, merge
from thoughtbubbles.testing import assert_decoder_cached_is_parallel, assert_decoder_causal

FORKING = ForkingHatchlingConfig(
    vocab_size=11, embed_dim=8, num_neurons=32, num_layers=3, num_heads=2, fork_layers=(1, 2)
)
ONE_FORK = dataclasses.replace(FORKING, num_layers=2, fork_layers=(1,))
DAMPED = dataclasses.replace(FORKING, damping=True, policy=PrefixRank(2.5))
TOKENS = np.random.default_rng(9).integers(11, size=(2, 7)).astype(np.int32)
run = jax.jit(lambda model, length=None: model.run(TOKENS, length))


def forking(config: ForkingHatchlingConfig) -> ForkingHatchling:
    """A model of random parameters, whose fork scores differ much."""
    model, rng = ForkingHatchling(config, rngs=nnx.Rngs(0)), np.random.default_rng(1)
    noise = lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32)  # noqa: E731
    nnx.update(model, jax.tree.map(noise, nnx.state(model, nnx.Param)))
    for fork in model.forks:
        fork.score[...] = 4 * fork.score[...]
        fork.norm.scale[...] = 1 + fork.norm.scale[...]
        if fork.threshold is not None:
            fork.threshold[...] = jnp.full((), 0.3)
    return model


def layer_of_streams(config, params, streams, row: int) -> np.ndarray:
    """One layer on the streams of a row, one after the other, in float64."""
    x, score, token, alive = (
        np.asarray(values)[row].astype(np.float64)
        for values in (streams.x, np.exp(streams.log_score), streams.token, streams.alive)
    )
    position = np.asarray(streams.positions())[row].astype(np.float64)
    slope = 2.0 ** (-8 * np.arange(1, config.num_heads + 1) / config.num_heads)
    gamma = np.exp(-slope) if config.damping else np.ones(config.num_heads)
    rho, last, found = np.zeros((2, 16, 8)), 0, np.zeros_like(x)

    def norm(x):
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)

    for slot in np.flatnonzero(alive):
        rho *= gamma[:, None, None] ** (token[slot] - last)
        last = token[slot]
        neurons = np.maximum(np.einsum("d,dhn->hn", x[slot], params["dx"]), 0)
        phase = 2 * np.pi * position[slot] * params["frequency"]
        turned = np.stack([-neurons[:, 1::2], neurons[:, ::2]], axis=-1).reshape(neurons.shape)
        q = neurons * np.cos(phase) + turned * np.sin(phase)
        a = np.einsum("hn,hnd->hd", q, rho)
        rho += score[slot] * q[:, :, None] * x[slot]
        y = np.maximum(np.einsum("hd,dhn->hn", norm(a), params["dy"]), 0) * neurons
        o = norm(np.einsum("hn,hnd->d", y, params["e"]))
        found[slot] = norm(x[slot] + score[slot] * o)
    return found


# "rotary": the model that keeps no fork, below.
@pytest.mark.parametrize(
    "config",
    [pytest.param(FORKING, marks=pytest.mark.experiment), DAMPED],
    ids=["rotary", "damped"],
)
def test_streams_read_those_left_of_them_by_their_scores(config):
    model = forking(config)
    output = run(model, np.array([7, 4]))
    params = wide(model)
    assert [int(np.asarray(s.alive)[0].sum()) > 7 for s in output.forks] == [True, True]
    last = output.forks[1]
    for row in range(2):
        alive = np.asarray(output.streams.alive)[row]
        expected = layer_of_streams(config, params, last, row)
        np.testing.assert_allclose(
            np.asarray(output.streams.x)[row][alive], expected[alive], atol=2e-5
        )
        for token in range((7, 4)[row]):
            mine = alive & (np.asarray(last.token)[row] == token)
            total = (np.exp(np.asarray(last.log_score)[row])[mine, None] * expected[mine]).sum(0)
            centred = total - total.mean()
            np.testing.assert_allclose(
                np.asarray(output.hidden)[row, token],
                centred / np.sqrt((centred**2).mean() + 1e-5),
                atol=5e-5,
            )


def test_a_model_that_keeps_no_fork_is_a_hatchling():
    plain_config = dataclasses.replace(GOLDEN, num_layers=3)
    plain = drawn(plain_config)
    params = nnx.to_pure_dict(nnx.state(plain))
    expected = np.asarray(jax.jit(lambda m: m(TOKENS))(plain))
    none = dataclasses.replace(FORKING, fork_layers=())
    bare = ForkingHatchling.from_params(none, {**params, "forks": {}})
    np.testing.assert_allclose(jax.jit(lambda m: m(TOKENS))(bare), expected, atol=1e-6)
    silent = forking(dataclasses.replace(FORKING, policy=PrefixRank(1.0)))
    nnx.update(silent, nnx.state(plain))
    found = jax.jit(lambda m: m(TOKENS))(silent)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    louder = silent.with_policy(PrefixRank(2.0))
    assert np.abs(jax.jit(lambda m: m(TOKENS))(louder) - expected).max() > 1e-2


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(ONE_FORK, damping=True, policy=PrefixRank(2.5)),
        dataclasses.replace(FORKING, policy=Threshold(2.0), fork_layers=(0,), num_layers=1),
    ],
    ids=["damped", "threshold"],
)
def test_a_causal_policy_decodes_with_a_cache(config):
    model = forking(config)
    assert_decoder_causal(model, num_tokens=7)
    assert_decoder_cached_is_parallel(model, num_tokens=7)


def test_a_row_that_outgrows_its_state_is_nan_and_stays_so():
    model = forking(ONE_FORK)
    step = jax.jit(lambda m, state, n: m.advance(state, TOKENS[:, :3], n))
    hidden, state = step(model, model.init_cache(2, 4), np.array([3, 1]))
    assert np.isfinite(hidden[0]).all()
    hidden, state = step(model, state, np.array([3, 1]))
    assert np.isnan(hidden[0]).all() and np.isfinite(hidden[1, :1]).all()
    hidden, _ = step(model, state, np.array([0, 1]))
    assert np.isnan(hidden[0]).all() and np.isfinite(hidden[1, :1]).all()


def test_scores_learn_and_forks_are_in_the_metrics():
    model = forking(ONE_FORK)
    loss = jax.jit(jax.value_and_grad(lambda m: m.loss(TOKENS)[::2], has_aux=True, allow_int=True))
    (_, sums), gradient = loss(model)
    assert all(np.abs(fork.score[...]).max() > 1e-4 for fork in gradient.forks)
    shown = ForkingHatchling.step_metrics(ONE_FORK, jax.device_get(sums))
    assert 1 < shown["fork_1/streams_per_token"] <= 2
    assert 0 < shown["layer_1/y_active"] <= shown["layer_1/x_active"] < 1
    output = run(model)
    streams = model.row_statistics(output)["streams"].sum()
    assert streams == np.asarray(output.streams.alive).sum() > output.tokens == 14
    assert not model.takes_positions and model.fork_policy == PrefixRank()


def test_a_forking_hatchling_grows_and_merges():
    model = forking(ONE_FORK)
    logits = jax.jit(lambda m: m(TOKENS))
    expected = np.asarray(logits(model))
    grown = grow(model, 48)
    np.testing.assert_allclose(logits(grown), expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(merge([model, model]).forks[0].score[...], model.forks[0].score)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "paper"}, "form='paper' has no residual stream of width d"),
        ({"chunk": 4}, "chunk=4 cuts rows, of which fork layers choose as a whole"),
        ({"separator": 4}, "separator=4 cuts rows"),
        ({"fork_layers": (3,)}, "fork layer 3 is out of range for num_layers=3: choose from 0 to"),
        ({"fork_layers": (1, 1)}, r"fork_layers=\(1, 1\) must rise without repeats"),
    ],
)
def test_mistakes_are_one_line(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FORKING, **changes)


def test_what_a_policy_lacks_is_said():
    model = ForkingHatchling(dataclasses.replace(FORKING, policy=TopK(2.0)), rngs=nnx.Rngs(0))
    assert not model.cacheable
    with pytest.raises(
        ValueError, match=r"TopK\(.*can't be cached, its choice looks at the whole row"
    ):
        model.init_cache(1, 4)
    with pytest.raises(ValueError, match="needs fork layers with a threshold"):
        model.with_policy(Threshold(2.0))
    with pytest.raises(ValueError, match="neurons of a model that forks belong to streams"):
        model.activations(jnp.asarray(TOKENS))
    with pytest.raises(ValueError, match="rows that are not one text from left to right"):
        model.hidden_states(jnp.zeros((1, 2, 8)), starts=jnp.zeros((1, 2), bool))

"""Looking into a Dragon Hatchling: neurons, synapses, the test that tells texts apart."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from hatchling_tiny import FORMS, GOLDEN, drawn

from thoughtbubbles.hatchling import ForkingHatchling, ForkingHatchlingConfig
from thoughtbubbles.hatchling.figures import neurons_figure, traces_figure
from thoughtbubbles.hatchling.seeing import (
    Synapses,
    mann_whitney,
    most_active,
    strongest_synapses,
    synapse_matrix,
    synapse_traces,
)

TOKENS = np.random.default_rng(11).integers(11, size=(2, 9)).astype(np.int32)
BOTH = [dataclasses.replace(config, num_neurons=16) for config in (FORMS[0], FORMS[3])]
ALL = Synapses(*np.array(list(itertools.product(range(2), range(8), range(8)))).T)


@pytest.mark.parametrize("config", BOTH, ids=lambda c: f"{c.form}-{c.damping}")
def test_all_synapses_of_a_neuron_together_are_its_gate(config):
    """Sums over sources, weighed by x of the next token, are what opens each y, up to the norm."""
    model = drawn(config)
    seen = jax.device_get(jax.jit(lambda m: m.activations(TOKENS))(model))
    for layer in range(2):
        traces = synapse_traces(model, TOKENS, layer, ALL).reshape(2, 9, 2, 8, 8)
        x, y = seen.x[layer][:, 1:], seen.y[layer][:, 1:]
        drive = np.einsum("bthj,bthji->bthi", x, traces[:, :-1])
        # The norm divides by one number in each head, which two gates of it must agree in.
        opened = np.where(x > 0, y / np.where(x > 0, x, 1), 0)
        assert ((drive > 0) & (x > 0) == (y > 0)).all()
        drive = drive * (y > 0)
        total = np.maximum((drive * drive).sum(axis=-1), 1e-9)
        factor = ((opened * drive).sum(axis=-1) / total)[..., None]
        np.testing.assert_allclose(opened, factor * drive, atol=1e-4 * opened.max())


@pytest.mark.parametrize("config", BOTH, ids=lambda c: f"{c.form}-{c.damping}")
def test_traces_are_entries_of_the_carried_state(config):
    model = drawn(config)
    step = jax.jit(lambda m, state, tokens: m.advance(state, tokens, jnp.ones(2, jnp.int32))[1])
    traces = synapse_traces(model, TOKENS, 1, ALL).reshape(2, 9, 2, 8, 8)
    state = model.init_cache(2, 9)
    for token in range(9):
        state = step(model, state, TOKENS[:, token : token + 1])
        for row, head in itertools.product(range(2), range(2)):
            matrix = synapse_matrix(model, np.asarray(state.synapses)[1, row], token + 1, head)
            scale = np.abs(traces).max()
            np.testing.assert_allclose(traces[row, token, head], matrix, atol=1e-5 * scale)
    found, strength = strongest_synapses(model, TOKENS, 1, 5)
    last = np.abs(traces[:, -1]).mean(axis=0)
    np.testing.assert_allclose(strength, np.sort(last.ravel())[::-1][:5], rtol=1e-3)
    np.testing.assert_allclose(last[found.head, found.source, found.target], strength, rtol=1e-3)


def test_neurons_are_features_of_real_tokens_alone():
    model = drawn(GOLDEN)
    length = np.array([9, 4], np.int32)
    seen = jax.jit(lambda m: m.activations(TOKENS, length))(model)
    read = jax.jit(lambda m: m.run(TOKENS, length))(model)
    assert seen.x.shape == seen.y.shape == (2, 2, 9, 2, 16) and seen.value.shape == (2, 2, 9, 8)
    assert not any(np.asarray(values)[:, 1, 4:].any() for values in seen)
    np.testing.assert_array_equal((seen.x > 0).sum(axis=(1, 2, 3, 4)), read.x_active)
    np.testing.assert_array_equal((seen.y > 0).sum(axis=(1, 2, 3, 4)), read.y_active)
    assert ((seen.y > 0) <= (seen.x > 0)).all() and (seen.y >= 0).all()


def test_golden_neurons_of_the_authors_code():
    from test_hatchling import TOKENS as GOLDEN_TOKENS
    from test_hatchling import made

    seen = jax.jit(lambda m: m.activations(GOLDEN_TOKENS))(made(GOLDEN))
    expected = [2.62192, 2.64547, 2.31096, 1.66368, 0.79123]
    np.testing.assert_allclose(seen.x[0, 0, 1, 0, :5], expected, atol=6e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_mann_whitney_is_scipys_and_that_of_all_pairs(tied):
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.4, size=(23, 3, 2)), rng.normal(size=(31, 3, 2))
    if tied:
        first, second = first.round(), second.round()
    found = mann_whitney(first, second)
    pairs = first[:, None] - second
    np.testing.assert_allclose(found.u, (pairs > 0).sum((0, 1)) + (pairs == 0).sum((0, 1)) / 2)
    np.testing.assert_allclose(found.rank_biserial, np.sign(pairs).mean((0, 1)), atol=1e-12)
    theirs = scipy.stats.mannwhitneyu(first, second, axis=0, method="asymptotic")
    np.testing.assert_allclose(found.u, theirs.statistic)
    np.testing.assert_allclose(found.p_value, theirs.pvalue, rtol=1e-10)


def test_mann_whitney_at_its_ends():
    apart = mann_whitney(np.arange(50.0) + 100, np.arange(50.0))
    assert (apart.u, apart.rank_biserial) == (2500, 1) and apart.p_value < 1e-16
    same = mann_whitney(np.ones(5), np.ones(7))
    assert (same.u, same.rank_biserial, same.p_value) == (17.5, 0, 1)
    assert mann_whitney(-np.ones(2), np.ones(3)).rank_biserial == -1
    for samples, message in (
        ((np.ones(0), np.ones(3)), "samples of 0 and 3 values"),
        ((np.ones((2, 3)), np.ones((2, 4))), r"samples of \(2, 3\) and \(2, 4\)"),
        ((np.array([np.nan]), np.ones(3)), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            mann_whitney(*samples)


def test_figures_show_what_they_are_given(tmp_path):
    model = drawn(GOLDEN)
    seen = jax.device_get(jax.jit(lambda m: m.activations(TOKENS))(model))
    words = [f"{token}\n" for token in TOKENS[0]]
    figure = neurons_figure(seen.x[1, 0], seen.y[1, 0], words, count=10)
    upper, lower = (axis for axis in figure.axes if axis.images)
    assert upper.images[0].get_array().shape == lower.images[0].get_array().shape == (10, 9)
    share = (seen.y[1, 0] > 0).mean()
    assert f"{share:.1%} of all are active" in lower.get_title(loc="left")
    assert [text.get_text() for text in lower.get_xticklabels()][0] == f"{TOKENS[0, 0]}⏎"
    synapses, _ = strongest_synapses(model, TOKENS, 1, 4)
    traces = synapse_traces(model, TOKENS, 1, synapses)
    figure = traces_figure(traces[0], words, synapses)
    lines = figure.axes[0].lines
    np.testing.assert_array_equal(lines[2].get_ydata(), traces[0, :, 2])
    figure.savefig(tmp_path / "traces.png")
    assert most_active(np.array([[0, 3, 1], [0, 1, 2]]), 2).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("layer", "synapses", "message"),
    [
        (2, ALL, "layer=2: choose from 0 to 1"),
        (0, Synapses(*np.array([[2], [0], [0]])), r"head=\[2\]: choose 1 from 0 to 1"),
        (0, Synapses(*np.array([[0], [0], [8]])), r"target=\[8\]: choose 1 from 0 to 7"),
    ],
)
def test_mistakes_are_one_line(layer, synapses, message):
    with pytest.raises(ValueError, match=message):
        synapse_traces(drawn(BOTH[0]), TOKENS, layer, synapses)


def test_rows_of_several_documents_have_no_one_trace():
    model = drawn(dataclasses.replace(GOLDEN, separator=int(TOKENS[0, 3])))
    with pytest.raises(ValueError, match="begins a document inside of a row"):
        synapse_traces(model, TOKENS, 0, Synapses(*np.zeros((3, 1), int)))
    with pytest.raises(ValueError, match="count=0: 2 heads of 16 neurons have 512 synapses"):
        strongest_synapses(drawn(GOLDEN), TOKENS, 0, 0)
    forking = ForkingHatchling(ForkingHatchlingConfig(num_layers=2), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="synapses of a model that forks have the phases of"):
        strongest_synapses(forking, TOKENS, 0, 1)


def test_synapses_may_be_lists_and_none():
    model = drawn(BOTH[0])
    lists = synapse_traces(model, TOKENS, 0, Synapses([0, 1], [3, 2], [1, 7]))  # pyright: ignore
    arrays = Synapses(np.array([0, 1]), np.array([3, 2]), np.array([1, 7]))
    np.testing.assert_array_equal(lists, synapse_traces(model, TOKENS, 0, arrays))
    none = synapse_traces(model, TOKENS, 0, Synapses(*np.zeros((3, 0), int)))
    assert none.shape == (*TOKENS.shape, 0)

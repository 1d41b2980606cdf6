"""Filters on logits, against distributions counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from thoughtbubbles.sampling import (
    Sampling,
    filtered,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    sample,
)

LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.05, 0.25, 0.2], [0.0, 0.0, 0.5, 0.5, 0.0]]))


def kept(logits):
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(logits)]


def test_each_filter_keeps_what_its_definition_says():
    assert kept(keep_top_k(LOGITS, 1)) == [[1], [2, 3]], "a tie stays"
    assert kept(keep_top_k(LOGITS, 3)) == [[1, 3, 4], [2, 3]]
    assert kept(keep_top_k(LOGITS, 99)) == [[0, 1, 2, 3, 4], [2, 3]]
    assert kept(keep_top_p(LOGITS, 0.39)) == [[1], [2, 3]]
    assert kept(keep_top_p(LOGITS, 0.64)) == [[1, 3], [2, 3]]
    assert kept(keep_top_p(LOGITS, 0.66)) == [[1, 3, 4], [2, 3]]
    assert kept(keep_top_p(LOGITS, 1.0))[1] == [2, 3]
    assert kept(keep_top_p(LOGITS, 1e-9)) == [[1], [2, 3]]
    assert kept(keep_min_p(LOGITS, 0.49)) == [[1, 3, 4], [2, 3]]
    assert kept(keep_min_p(LOGITS, 1.0)) == [[1], [2, 3]]
    assert kept(keep_min_p(LOGITS, 0.0)) == kept(LOGITS)
    for survivors in (keep_top_k(LOGITS, 3), keep_top_p(LOGITS, 0.7), keep_min_p(LOGITS, 0.5)):
        same = np.isfinite(survivors)
        np.testing.assert_array_equal(survivors[same], LOGITS[same])


def test_filters_see_what_the_one_before_left():
    """0.4, 0.25, 0.2 after top-k are 0.47, 0.29, 0.24: top-p of 0.5 needs two, of 0.45 one."""
    keep = lambda **options: kept(filtered(LOGITS[:1], Sampling.of(1.0, **options)))[0]  # noqa: E731
    assert keep(top_p=0.45) == [1, 3]
    assert keep(top_k=3, top_p=0.45) == [1]
    assert keep(top_k=3, top_p=0.5, min_p=0.7) == [1]
    # A high temperature comes first: it makes the distribution flat, and more tokens pass.
    assert kept(filtered(LOGITS[:1], Sampling.of(9.0, min_p=0.7))) == [[0, 1, 2, 3, 4]]


def test_a_mass_of_one_is_off():
    """The cumulative sum rounds to 1 before its end: the filter would drop improbable tokens."""
    logits = jnp.linspace(0.0, -40.0, 500)[None]
    assert len(kept(keep_top_p(logits, 1.0))[0]) < 500
    for mass in (1.0, 1 - 1e-9, 1, None):
        assert len(kept(filtered(logits, Sampling.of(1.0, top_p=mass)))[0]) == 500
    assert len(kept(filtered(logits, Sampling.of(1.0, top_p=0.999)))[0]) < 500


def test_samples_have_the_filtered_frequencies():
    sampling = Sampling.of(0.5, top_k=3)
    rows = jnp.broadcast_to(LOGITS[0], (4000, 5))
    drawn = jax.jit(sample)(rows, jax.random.split(jax.random.key(0), 4000), sampling)
    expected = np.array([0, 0.4, 0, 0.25, 0.2]) ** 2
    found = np.bincount(drawn, minlength=5) / 4000
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.03)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_no_token(temperature):
    logits = LOGITS.at[1, 4].set(jnp.nan)
    keys = jax.random.split(jax.random.key(0), 2)
    found = sample(logits, keys, Sampling.of(temperature, top_k=2, top_p=0.9, min_p=0.1))
    assert found[0] in (1, 3) and found[1] == -1


def test_greedy_ignores_filters_and_keys():
    keys = jax.random.split(jax.random.key(0), 2)
    assert sample(LOGITS, keys, Sampling.of(0.0, top_k=1)).tolist() == [1, 2]
    # Divided by it, all positive logits would be infinite.
    assert sample(LOGITS + 9, keys, Sampling.of(1e-38, top_p=0.9)).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: choose 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0 leaves no token"),
        ({"top_k": 2.5}, "top_k=2.5: give a whole number"),
        ({"top_p": 0.0}, "top_p=0.0: choose more than 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": 1.5}, "min_p=1.5: choose from 0 to 1"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling.of(**options)

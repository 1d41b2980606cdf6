"""Packed documents are separate ones, and gradients stop where they are told to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hatchling_tiny import FORMS, GOLDEN, drawn, logits_of, reference, wide

from thoughtbubbles.hatchling import Hatchling
from thoughtbubbles.testing import assert_decoder_cached_is_parallel, assert_decoder_causal

SEPARATOR = 0
# Of the forms, one with damping and one without: what packing adds is the same in all.
BOTH = [FORMS[0], FORMS[3]]
PACKED = [dataclasses.replace(config, separator=SEPARATOR) for config in BOTH]
# `python -m pytest -m experiment tests/test_hatchling_packed.py`
FIRST_IS_MORE = [pytest.param(PACKED[0], marks=pytest.mark.experiment), PACKED[1]]
LENGTHS = (5, 1, 7, 6)


def packed(rows: int = 2) -> np.ndarray:
    """Rows `[rows, 19]` of documents that begin with the separator, the first at other places."""
    tokens = np.random.default_rng(3).integers(1, 11, size=(rows, sum(LENGTHS)))
    for row in range(rows):
        ends = np.cumsum(np.roll(LENGTHS, row))[:-1]
        tokens[row, ends] = SEPARATOR
    return tokens


def documents(row: np.ndarray) -> list[np.ndarray]:
    return np.split(row, np.flatnonzero(row == SEPARATOR))


@pytest.mark.parametrize("config", FIRST_IS_MORE, ids=lambda c: f"{c.form}-{c.damping}")
def test_packed_documents_are_separate_documents(config):
    """In float64 one by one; parallel, and in chunks that begin and end anywhere."""
    rows, params = packed(), wide(drawn(config))
    expected = np.array(
        [
            np.concatenate([reference(config, params, part) for part in documents(row)])
            for row in rows
        ]
    )
    scale = np.abs(expected).max()
    for chunk in (None, 1, 7):
        model = drawn(dataclasses.replace(config, chunk=chunk))
        found = np.asarray(logits_of(model, rows))
        assert np.abs(found - expected).max() < 1e-5 * scale, chunk


def test_a_cache_forgets_at_a_separator_and_no_document_sees_another():
    config = PACKED[1]
    model = drawn(config)
    assert_decoder_cached_is_parallel(model)
    assert_decoder_causal(model)
    rows = packed()
    other = rows.copy()
    first = LENGTHS[0]
    other[0, :first] = 1 + rows[0, :first] % 9
    mine, theirs = (np.asarray(logits_of(model, tokens)) for tokens in (rows, other))
    assert (mine[0, :first] != theirs[0, :first]).any()
    np.testing.assert_array_equal(mine[0, first:], theirs[0, first:])
    step = jax.jit(lambda m, tokens, n: m.advance(m.init_cache(2, 19), tokens, n)[1])
    state = step(model, jnp.asarray(rows), np.array([19, 19]))
    last = [documents(row)[-1] for row in rows]
    assert state.length.tolist() == [len(part) for part in last]
    alone = np.zeros((2, 19), np.int32)
    for row, part in enumerate(last):
        alone[row, : len(part)] = part
    expected = step(model, jnp.asarray(alone), state.length)
    np.testing.assert_allclose(state.synapses, expected.synapses, atol=1e-5)


@pytest.mark.parametrize("config", BOTH, ids=lambda c: f"{c.form}-{c.damping}")
def test_positions_and_visibility_are_documents_too(config):
    """Rows of a conversation packed with others, as fine-tuning gives them."""
    rows = packed()
    document = np.cumsum(rows == SEPARATOR, axis=1)
    began = np.maximum.accumulate(np.where(rows == SEPARATOR, np.arange(19), 0), axis=1)
    visible = (document[:, :, None] == document[:, None]) & np.tri(19, dtype=bool)
    model = drawn(config)
    x = model.embed_tokens(jnp.asarray(rows))
    run = jax.jit(lambda m, **given: m.hidden_states(x, **given))
    found = run(model, positions=np.arange(19) - began, visible=visible)
    expected = run(model, starts=rows == SEPARATOR)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    with pytest.raises(ValueError, match="positions and visible belong together"):
        model.hidden_states(x, positions=began)


@jax.jit
def loss_and_gradient(model: Hatchling, rows):
    (nats, (weight, sums)), gradient = jax.value_and_grad(
        lambda m: (lambda nats, *rest: (nats, rest))(*m.loss(rows)), has_aux=True, allow_int=True
    )(model)
    return nats, weight, sums, nnx.state(gradient, nnx.Param)


@pytest.mark.parametrize("config", PACKED[1:], ids=lambda c: c.form)
def test_a_truncated_gradient_is_that_of_segments_after_constant_states(config):
    rows = np.random.default_rng(5).integers(11, size=(3, 18)).astype(np.int32)
    rows[1, 11:] = -1
    model = drawn(config)
    nats, weight, sums, _ = loss_and_gradient(model, rows)
    truncated = drawn(dataclasses.replace(config, truncate=5))
    found = loss_and_gradient(truncated, rows)
    assert float(found[0]) == pytest.approx(float(nats), rel=1e-6) and found[1] == weight
    jax.tree.map(np.testing.assert_array_equal, found[2], sums)

    def segment(model, state, start):
        part = rows[:, start : start + 6]
        tokens, targets = np.maximum(part[:, :-1], 0), part[:, 1:]
        output, after = model.advance(state, tokens, (part[:, :-1] >= 0).sum(axis=1))
        log_prob = model.log_prob(output, np.maximum(targets, 0))
        return -jnp.where(targets >= 0, log_prob, 0).sum(), after

    step = jax.jit(jax.grad(segment, has_aux=True, allow_int=True), static_argnums=2)
    state, total = model.init_cache(3, 17), None
    for start in (0, 5, 10, 15):
        gradient, state = step(model, state, start)
        gradient = nnx.state(gradient, nnx.Param)
        total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
    for mine, theirs in zip(*map(jax.tree.leaves, (found[3], total)), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.experiment  # through a carried state: test_hatchling.py
def test_a_gradient_that_is_cut_nowhere_is_that_of_the_whole_row():
    rows = np.random.default_rng(6).integers(11, size=(2, 18)).astype(np.int32)
    gradient = {
        (truncate, chunk): jax.tree.leaves(
            loss_and_gradient(
                drawn(dataclasses.replace(GOLDEN, truncate=truncate, chunk=chunk)), rows
            )[3]
        )
        for truncate, chunk in ((None, None), (None, 5), (17, 5), (5, None))
    }
    expected = gradient.pop((None, None))
    cut = gradient.pop((5, None))
    for given in gradient.values():
        for mine, theirs in zip(given, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5 * np.abs(theirs).max())
    assert any(np.abs(a - b).max() > 1e-3 * np.abs(b).max() for a, b in zip(cut, expected))  # noqa: B905


def test_the_cost_of_long_rows_grows_with_their_length():
    flops = {
        (chunk, truncate): dataclasses.replace(
            GOLDEN, chunk=chunk, truncate=truncate
        ).forward_flops(4096)
        for chunk, truncate in ((None, None), (64, None), (None, 64), (64, 256))
    }
    assert flops[64, None] == flops[None, 64] == flops[64, 256] < flops[None, None] / 4


def test_a_row_of_any_length_needs_the_memory_of_a_segment():
    def needed(tokens: int, **changes) -> int:
        config = dataclasses.replace(GOLDEN, **changes)
        model = nnx.eval_shape(lambda: Hatchling(config, rngs=nnx.Rngs(0)))
        rows = jax.ShapeDtypeStruct((1, tokens + 1), jnp.int32)
        return loss_and_gradient.lower(model, rows).compile().memory_analysis().temp_size_in_bytes

    short, long = (needed(tokens, truncate=32) for tokens in (64, 256))
    assert long < 1.2 * short, (short, long)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truncate": 0}, "truncate=0 is below 1: leave it out"),
        ({"separator": 11}, "separator=11 is no token id of vocab_size=11: choose 0 to 10"),
    ],
)
def test_mistakes_are_one_line(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GOLDEN, **changes)

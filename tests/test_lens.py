"""Sites and lenses: against the float64 reference, and the model itself at the last site."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from hatchling_tiny import GOLDEN, drawn
from tiny import SMALL, VOCAB, by_reference, quick_model, random_tokens

from thoughtbubbles import PrefixRank
from thoughtbubbles.hatchling import ForkingHatchling, ForkingHatchlingConfig
from thoughtbubbles.lens import TunedLens, capture, embedding_similarity, logit_lens, mean_lens

TOKENS = random_tokens(2, 6)
MASK = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], bool)
PLAIN = dataclasses.replace(SMALL, fork_layers=(), scan_layers=True)
FORKING_HATCHLING = ForkingHatchlingConfig(
    vocab_size=11, embed_dim=8, num_neurons=32, num_layers=2, num_heads=2, policy=PrefixRank(2.0)
)


@functools.cache
def model_of(kind: str) -> Any:
    if kind == "hatchling":
        return drawn(dataclasses.replace(GOLDEN, form="paper", damping=True))
    if kind == "forking hatchling":
        model = drawn(GOLDEN)
        forking = ForkingHatchling(FORKING_HATCHLING, rngs=nnx.Rngs(0))
        nnx.update(forking, nnx.state(model))
        return forking
    return quick_model({"forking": SMALL, "plain": PLAIN}[kind])


# `python -m pytest -m experiment tests/test_lens.py`: the third goes the way of the others.
KINDS = [
    *("forking", "plain", "forking hatchling"),
    pytest.param("hatchling", marks=pytest.mark.experiment),
]


def everything(model, tokens, mask):
    watch, top = jnp.array([3]), model.vocab_size
    lens = logit_lens(model, tokens, mask, top=top, watch=watch)
    logits = model(tokens, mask)
    edit = {site: lambda x: x + 0 * x for site in model.sites}  # changes nothing
    return logits, jax.nn.log_softmax(logits), *capture(model, tokens, mask, edit=edit), lens


@functools.cache
def read(kind: str) -> Any:
    return jax.device_get(jax.jit(everything)(model_of(kind), TOKENS % 11, MASK))


def in_order(top) -> np.ndarray:
    """Values of all ids, by id."""
    return np.take_along_axis(top.value, np.argsort(top.ids, axis=-1), axis=-1)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    peak = logits.max(axis=-1, keepdims=True)
    return logits - peak - np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("kind", KINDS)
def test_capturing_changes_no_logits_and_the_last_lens_is_the_model(kind):
    logits, log_probs, captured, found, lens = read(kind)
    assert np.abs(captured - logits).max() <= 1e-6
    assert tuple(found) == tuple(lens) == model_of(kind).sites
    last = list(lens.values())[-1]
    assert np.abs(in_order(last.tokens) - log_probs)[MASK].max() <= 1e-6
    for site, reading in lens.items():
        rows = found[site]
        for name in ("token", "alive", "log_score", "depth", "parent"):
            np.testing.assert_array_equal(getattr(rows, name), getattr(reading.rows, name))
        live, streams = rows.alive, reading.streams
        assert (np.diff(streams.value[live], axis=-1) <= 0).all()
        np.testing.assert_array_equal(streams.watched[live][:, 0], in_order(streams)[live][:, 3])
        values = in_order(streams)[live]
        assert (streams.rank[live] == (values > values[:, 3:4]).sum(axis=1, keepdims=True)).all()
        if "fork" not in kind:  # a slot for each token, where the mask says
            np.testing.assert_array_equal(live, MASK)
            np.testing.assert_array_equal(in_order(streams), in_order(reading.tokens))
            assert not reading.divergence.any() and (rows.parent == -1).all()


@pytest.mark.experiment
def test_both_are_exact_where_operations_run_one_by_one():
    """A model of one block: each operation is a program of its own."""
    model = quick_model(dataclasses.replace(SMALL, num_layers=1, fork_layers=(0,)))
    with jax.disable_jit():
        logits = model(TOKENS)
        captured, found = capture(model, TOKENS, edit={"fork_0": lambda x: x + 0 * x})
        lens = logit_lens(model, TOKENS, sites=("block_0",), top=VOCAB)
        log_probs = jax.nn.log_softmax(logits)
    np.testing.assert_array_equal(captured, logits)
    np.testing.assert_array_equal(in_order(jax.device_get(lens["block_0"].tokens)), log_probs)
    assert found["block_0"].x.shape == (2, 9, 16)


def test_lineage_and_divergence_are_those_of_the_reference():
    *_, found, lens = read("forking")
    for row in range(2):
        ids = np.asarray(TOKENS % 11)[row][MASK[row]]
        trace = by_reference(SMALL, ids.tolist())
        assert trace.gap > 1e-4
        streams = [(token, 0, None) for token in range(len(ids))]  # token, depth, parent
        for layer, fork in zip(SMALL.fork_layers, trace.forks, strict=True):
            slot = {kept: index for index, kept in enumerate(fork.kept)}
            streams = [
                (
                    streams[parent][0],
                    streams[parent][1] + is_fork,
                    slot.get(reference.Candidate(parent, False))
                    if is_fork
                    else slot.get(reference.Candidate(streams[parent][2], False)),
                )
                for parent, is_fork in fork.kept
            ]
            rows, live = found[f"block_{layer}"], found[f"block_{layer}"].alive[row]
            offset = np.flatnonzero(MASK[row])[0]
            assert live.sum() == len(streams)
            np.testing.assert_array_equal(
                rows.token[row][live], [t + offset for t, _, _ in streams]
            )
            np.testing.assert_array_equal(rows.depth[row][live], [d for _, d, _ in streams])
            parents = [-1 if p is None else p for _, _, p in streams]
            np.testing.assert_array_equal(rows.parent[row][live], parents)
        params = reference.in_float64(nnx.to_pure_dict(nnx.state(model_of("forking"))))
        p = [reference.softmax(reference.decode(params, SMALL, s.x)) for s in trace.streams]
        last = lens["block_1"]
        np.testing.assert_allclose(in_order(last.streams)[row][live], np.log(p), rtol=0, atol=1e-5)
        for index, parent in enumerate(parents):
            expected = 0.0
            if parent >= 0:
                q, middle = p[parent], (p[index] + p[parent]) / 2
                kl = lambda a, m=middle: (a * np.log(a / m)).sum()  # noqa: E731
                expected = (kl(p[index]) + kl(q)) / 2
                assert expected > 1e-4
            np.testing.assert_allclose(last.divergence[row][index], expected, atol=1e-5)
    assert (found["block_1"].parent >= 0).any()


def test_an_edit_is_seen_by_all_later_sites_and_by_no_earlier_one():
    model, tokens = model_of("plain"), TOKENS

    @jax.jit
    def patched(model, tokens, key):
        noise = lambda x: x + jax.random.normal(key, x.shape)  # noqa: E731
        return capture(model, tokens, edit={"block_0": noise}), capture(model, tokens)

    (noisy, changed), (logits, found) = patched(model, tokens, jax.random.key(0))
    np.testing.assert_allclose(changed["embed"].x, found["embed"].x, atol=1e-6)
    noise = jax.random.normal(jax.random.key(0), found["embed"].x.shape)
    np.testing.assert_allclose(changed["block_0"].x, found["block_0"].x + noise, atol=1e-5)
    assert np.abs(noisy - logits).max() > 0.01


def test_tuned_mean_and_cosine_lenses():
    model = model_of("plain")
    positions = np.zeros_like(MASK)
    positions[0, 3:5], positions[1, [0, 2, 5]] = True, True  # the last is padding

    @jax.jit
    def lenses(model, tuned):
        sites, watch = ["block_0", "block_1"], (2, VOCAB + 5)  # any sequences
        options: Any = {"sites": sites, "top": VOCAB, "watch": watch}
        return (
            logit_lens(model, TOKENS, MASK, tuned=tuned, **options),
            mean_lens(model, TOKENS, positions, MASK, **options),
            embedding_similarity(model, TOKENS, MASK, **options),
            capture(model, TOKENS, MASK, sites=sites)[1],
            logit_lens(model, TOKENS, MASK, tuned=TunedLens.identity(sites, 16), **options),
            logit_lens(model, TOKENS, MASK, **options),
        )

    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(1, 16, 16)) / 4, rng.normal(size=(1, 16))
    tuned = TunedLens(weight.astype(np.float32), bias.astype(np.float32), ("block_0",))
    by_tuned, mean, cosine, found, identity, plain = jax.device_get(lenses(model, tuned))
    params = reference.in_float64(nnx.to_pure_dict(nnx.state(model)))
    decode = lambda x: np.stack([reference.decode(params, PLAIN, row) for row in x])  # noqa: E731
    x = found["block_0"].x[MASK].astype(np.float64)
    expected = log_softmax(decode(x + x @ weight[0] + bias[0]))
    np.testing.assert_allclose(in_order(by_tuned["block_0"].tokens)[MASK], expected, atol=1e-5)
    for lens in (by_tuned, identity):  # a site without a map keeps its residuals
        np.testing.assert_array_equal(lens["block_1"].tokens.value, plain["block_1"].tokens.value)
    np.testing.assert_array_equal(identity["block_0"].tokens.value, plain["block_0"].tokens.value)
    for row, chosen in enumerate(positions & MASK):
        p = np.exp(in_order(plain["block_1"].tokens)[row][chosen].astype(np.float64)).mean(axis=0)
        np.testing.assert_allclose(in_order(mean["block_1"])[row], np.log(p), atol=1e-5)
        assert mean["block_1"].rank[row].tolist() == [(p > p[2]).sum(), VOCAB]
    table = params["embed"] / np.linalg.norm(params["embed"], axis=1, keepdims=True)
    expected = (x / np.linalg.norm(x, axis=1, keepdims=True)) @ table.T
    np.testing.assert_allclose(in_order(cosine["block_0"].tokens)[MASK], expected, atol=1e-5)


def test_neurons_of_a_hatchling_are_sites():
    model, tokens = model_of("forking hatchling"), TOKENS % 11
    assert model.neuron_sites == ("x_0", "y_0", "x_1", "y_1")
    _, found = jax.jit(lambda m: capture(m, tokens, sites=("y_1", "x_1", "x_0")))(model)
    assert found["x_1"].x.shape == (2, 12, 32) and found["x_0"].x.shape == (2, 6, 32)
    x, y = found["x_1"].x, found["y_1"].x
    assert (np.asarray(x) >= 0).all() and not np.asarray(y)[np.asarray(x) == 0].any()
    plain = model_of("hatchling")
    _, found = jax.jit(lambda m: capture(m, tokens, sites=plain.neuron_sites))(plain)
    seen = jax.jit(lambda m: m.activations(tokens))(plain)
    for layer in range(2):
        for name, neurons in (("x", seen.x), ("y", seen.y)):
            expected = neurons[layer].reshape(2, 6, -1)
            np.testing.assert_allclose(found[f"{name}_{layer}"].x, expected, atol=1e-6)


def test_a_mistake_is_one_line():
    model = model_of("plain")
    cases = {
        "no site 'block_9' here: choose from embed, block_0, block_1": lambda: capture(
            model, TOKENS, sites=("block_9",)
        ),
        "the edit of embed makes \\(2,\\) of \\(2, 6, 16\\): keep the shape": lambda: capture(
            model, TOKENS, edit={"embed": lambda x: x[:, 0, 0]}
        ),
        "top=99 of 17 token ids": lambda: logit_lens(model, TOKENS, top=99),
        "tuned lens of width 8 for residuals of width 16": lambda: logit_lens(
            model, TOKENS, tuned=TunedLens.identity(("embed",), 8)
        ),
        "Norm can't be read at sites: it has no sites,": lambda: capture(model.final_norm, TOKENS),
        "no site 'x_0' here": lambda: capture(
            model_of("hatchling"), TOKENS, edit={"x_0": lambda x: x}
        ),
        "sites='embed' is one name": lambda: logit_lens(model, TOKENS, sites="embed"),
        "positions of shape \\(2,\\)": lambda: mean_lens(model, TOKENS, MASK[:, 0]),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()

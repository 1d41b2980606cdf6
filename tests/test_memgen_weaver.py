"""Oracle tests B: what the weaver writes, of what it reads."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import memgen_reference as oracle
import numpy as np
import pytest
from memgen_tiny import (
    CONFIG,
    LORA,
    in_numpy,
    memgen_of,
    pure,
    random_tokens,
    read,
    replaced,
    weaver_config,
)

from memgen import MemGen, Plan
from memgen.insertion import INFERENCE, PROMPT
from memgen.lora import with_dropout

LENGTH = np.array([9, 6], np.int32)
KIND = np.array([PROMPT, INFERENCE], np.int32)
SLOTS = CONFIG.weaver.latents


def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 9, 32)).astype(np.float32)


@jax.jit
def woven(made: MemGen, vectors: jax.Array, length: jax.Array, kind: jax.Array) -> jax.Array:
    return made.weaver.weave(made.weaving(), vectors, length, kind)


def weave(made: MemGen, vectors: np.ndarray, length=LENGTH, kind=KIND) -> np.ndarray:
    return np.asarray(woven(made, vectors, length, kind))


def dense(projection: Any, x: np.ndarray) -> np.ndarray:
    return x @ np.asarray(projection.kernel[...]) + np.asarray(projection.bias[...])


def changed(made: MemGen, bank: str, change) -> MemGen:
    """The MemGen with other queries in one bank."""
    weaver = jax.tree.map(lambda leaf: leaf, made.weaver)
    queries = getattr(weaver, bank).queries
    queries[...] = jnp.asarray(change(np.asarray(queries[...])), jnp.float32)
    return replaced(made, weaver=weaver)


@pytest.mark.parametrize("kind", ["shallow", "foreign"])
def test_b8_latents_are_the_last_outputs_of_one_plain_pass(kind: str):
    made = memgen_of(kind)
    found = weave(made, vectors())
    weaver, backbone = made.weaver, made.weaving()
    banks = jax.jit(lambda weaver: (weaver.prompt(), weaver.inference()))(weaver)
    whole = np.zeros((2, 9 + SLOTS, 32), np.float32)
    ends = []
    for row, (length, queries) in enumerate(zip(LENGTH, banks, strict=True)):
        ends.append(length + len(queries))
        whole[row, :length] = dense(weaver.to_weaver, vectors()[row, :length])
        whole[row, length : ends[row]] = queries
    for row, hidden in enumerate(np.asarray(read(backbone, whole))):

        def projected(h):
            latents = dense(weaver.to_reasoner, h)
            size = np.sqrt((latents**2).mean(axis=-1, keepdims=True))
            return latents / size * np.asarray(weaver.gain[...])

        count = len(banks[row])
        expected = projected(hidden[ends[row] - count : ends[row]])
        np.testing.assert_allclose(found[row, :count], expected, rtol=1e-6, atol=1e-6)
        assert np.abs(found[row, :count] - projected(hidden[:count])).max() > 0.01


@pytest.mark.parametrize("match_scale", [True, False])
def test_b8_latents_are_those_of_the_oracle(match_scale: bool):
    made = memgen_of("plain", weaver_config(match_scale=match_scale))
    weaver, params = pure(made.weaver), pure(made.reasoner.model)
    lora = made.config.weaver.lora
    merged = oracle.merged(params, weaver["adapter"], lora.alpha / lora.rank)
    decoder = oracle.thoughtbubbles(merged, made.reasoner.model.config)
    found = weave(made, vectors())
    for row, (length, kind) in enumerate(((9, "prompt"), (6, "inference"))):
        context = np.asarray(vectors()[row, :length], np.float64)
        expected = oracle.weave(weaver, decoder, context, kind)
        np.testing.assert_allclose(found[row, : len(expected)], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["shallow", "rank"])
def test_b9_only_what_stands_before_is_seen(kind: str):
    made, x = memgen_of(kind), vectors()
    found = weave(made, x)
    later, earlier = x.copy(), x.copy()
    later[1, 6:] = np.nan
    assert (weave(made, later) == found).all()
    earlier[:, 2] += 0.1
    earlier = weave(made, earlier)
    assert (np.abs(earlier - found).max(axis=(1, 2)) > 1e-4).all()


def test_b10_padding_does_not_matter():
    """Rows are padded on the right and nowhere else."""
    made = memgen_of()
    found = weave(made, vectors())
    for pads in (3, 17):
        padded = np.pad(vectors(), ((0, 0), (0, pads), (0, 0)), constant_values=7.0)
        np.testing.assert_allclose(weave(made, padded), found, atol=1e-5)


def test_b11_queries_are_normalised():
    # Queries of size 1 or more, so that the norm's epsilon is small beside them.
    made = changed(memgen_of(), "prompt", lambda q: 8 * q)
    found = weave(made, vectors())
    factor, shift = np.array([[0.5], [2.0], [3.0]]), np.array([[1.0], [-2.0], [0.3]])
    moved = changed(made, "prompt", lambda q: factor * q + shift)
    np.testing.assert_allclose(weave(moved, vectors())[0], found[0], rtol=0, atol=1e-4)
    other = changed(made, "prompt", lambda q: -q)
    assert np.abs(weave(other, vectors())[0] - found[0]).max() > 0.01


def test_b12_a_slot_does_not_see_later_ones():
    made = memgen_of()
    fewer = memgen_of(config=weaver_config(prompt_latents=2))
    weaver = jax.tree.map(lambda leaf: leaf, made.weaver)
    weaver.config = fewer.weaver.config
    queries = np.asarray(weaver.prompt.queries[...])[:2]
    weaver.prompt.queries = type(weaver.prompt.queries)(jnp.asarray(queries))
    found = weave(replaced(fewer, weaver=weaver), vectors())
    assert found.shape == (2, 2, 32)
    np.testing.assert_allclose(found[0], weave(made, vectors())[0, :2], atol=1e-6)


def test_b13_the_order_of_the_context_matters():
    made, x = memgen_of(), vectors()
    swapped = x[:, [0, 3, 2, 1, *range(4, 9)]]
    assert np.abs(weave(made, swapped) - weave(made, x)).max(axis=(1, 2)).min() > 1e-4


def test_b14_a_weaver_of_another_width():
    made = memgen_of("shallow", weaver_width=48)
    assert made.weaver.to_weaver.kernel.shape == (32, 48)
    assert made.weaver.prompt.queries.shape == (SLOTS, 48)
    weaver = pure(made.weaver)
    assert made.weaver_backbone is not None
    config = made.weaver_backbone.model.config
    params = oracle.merged(pure(made.weaver_backbone.model), weaver["adapter"], 2.0)
    decoder = oracle.thoughtbubbles(params, config)
    expected = oracle.weave(weaver, decoder, np.float64(vectors()[0]), "prompt")
    np.testing.assert_allclose(weave(made, vectors())[0], expected, atol=1e-5)


@jax.jit
def latents_of(made: MemGen, tokens: jax.Array, plan: Plan, key: jax.Array | None) -> jax.Array:
    return made.weave(tokens, plan, key).latents


def woven_latents(made: MemGen, tokens: jax.Array, plan: Plan, key: Any = None) -> np.ndarray:
    return np.asarray(latents_of(made, tokens, plan, key))


POINT = np.array([[3, 6, 9], [2, -1, -1]], np.int32)
KINDS = np.array([[PROMPT, INFERENCE, INFERENCE]] * 2, np.int32)


@pytest.mark.parametrize("see", [True, False])
def test_b16_earlier_latents_are_seen_or_not(see: bool):
    made = memgen_of(config=weaver_config(latents_see_latents=see))
    tokens = random_tokens(2, 12, seed=4)
    plan = in_numpy(Plan.of(POINT, KINDS, made.config))
    found = woven_latents(made, tokens, plan)
    other = changed(made, "prompt", lambda q: -q)
    moved = woven_latents(other, tokens, plan)
    assert np.abs(moved[0, 0] - found[0, 0]).max() > 0.01
    if see:
        assert np.abs(moved[0, 1, :2] - found[0, 1, :2]).max() > 1e-4
        return
    assert (moved[:, 1:] == found[:, 1:]).all()
    vectors = np.asarray(made.reasoner.model.embed[...])[np.asarray(tokens)]
    for event in range(3):
        alone = weave(made, vectors, np.maximum(POINT[:, event], 0), KINDS[:, event])
        width, rows = plan.width[:, event], POINT[:, event] >= 0
        for row in np.flatnonzero(rows):
            np.testing.assert_allclose(
                found[row, event, : width[row]], alone[row, : width[row]], atol=1e-5
            )


def test_dropout_reaches_the_weaver_in_training_only():
    """And each event has its own."""
    made = memgen_of(config=weaver_config(lora=dataclasses.replace(LORA, dropout=0.5)))
    tokens = random_tokens(2, 12, seed=4)
    plan = in_numpy(Plan.of(POINT, KINDS, made.config))
    quiet = woven_latents(made, tokens, plan)
    key, other = jax.random.key(0), jax.random.key(1)
    noisy = woven_latents(made, tokens, plan, key)
    assert np.abs(noisy - quiet).max() > 1e-3
    assert (noisy == woven_latents(made, tokens, plan, key)).all()
    assert (noisy != woven_latents(made, tokens, plan, other)).any()
    assert with_dropout(made.weaver.adapter, None) is made.weaver.adapter

    # An event as the first of its row, or as the second.
    def both(key: jax.Array | None) -> list[np.ndarray]:
        plans = (
            in_numpy(Plan.of(np.array([point] * 2), KINDS * 0, made.config))
            for point in ([3, -1, -1], [-1, 3, -1])
        )
        return [
            woven_latents(made, tokens, plan, key)[:, event] for event, plan in enumerate(plans)
        ]

    np.testing.assert_allclose(*both(None), atol=1e-6)
    first, second = both(key)
    assert (np.abs(first - second).max(axis=(1, 2)) > 1e-3).all()

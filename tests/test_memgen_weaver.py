"""Oracle tests B: what the weaver writes, of what it reads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import memgen_reference as oracle
import numpy as np
import pytest
from memgen_tiny import (
    CONFIG,
    LORA,
    memgen_of,
    pure,
    random_tokens,
    replaced,
    rollout,
    weaver_config,
    whole_rows,
)

from memgen import AlwaysInvoke, MemGen, Plan, plan_from_decisions
from memgen.insertion import INFERENCE, PROMPT
from memgen.lora import with_dropout

LENGTH = jnp.array([9, 6])
KIND = jnp.array([PROMPT, INFERENCE])
SLOTS = CONFIG.weaver.latents


@functools.cache
def stream(width: int = 9, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (2, 9, 32)) * (jnp.arange(9) < width)[:, None]


@jax.jit
def weave(made: MemGen, stream: jax.Array, length: jax.Array = LENGTH, kind: jax.Array = KIND):
    return made.weaver.weave(made.weaving(), stream, length, kind)


def changed(made: MemGen, bank: str, change) -> MemGen:
    """The MemGen with other queries in one bank."""
    weaver = jax.tree.map(lambda leaf: leaf, made.weaver)
    queries = getattr(weaver, bank).queries
    queries[...] = change(queries[...])
    return replaced(made, weaver=weaver)


@pytest.mark.parametrize("kind", ["plain", "foreign"])
def test_b8_latents_are_the_last_outputs_of_one_plain_pass(kind: str):
    made = memgen_of(kind)
    found = weave(made, stream())
    weaver, backbone = made.weaver, made.weaving()
    for row, (length, bank) in enumerate(((9, weaver.prompt), (6, weaver.inference))):
        context = stream()[row, :length] @ weaver.to_weaver.kernel[...] + weaver.to_weaver.bias[...]
        whole = jnp.concatenate([context, bank()])[None]
        hidden = jax.jit(lambda b, x: b.read(x))(backbone, whole)[0]

        def projected(h):
            latents = h @ weaver.to_reasoner.kernel[...] + weaver.to_reasoner.bias[...]
            size = jnp.sqrt((latents**2).mean(axis=-1, keepdims=True))
            return latents / size * weaver.gain[...]

        count = bank.queries.shape[0]
        np.testing.assert_allclose(
            found[row, :count], projected(hidden[-count:]), rtol=1e-6, atol=1e-6
        )
        assert np.abs(found[row, :count] - projected(hidden[:count])).max() > 0.01


@pytest.mark.parametrize("match_scale", [True, False])
def test_b8_latents_are_those_of_the_oracle(match_scale: bool):
    made = memgen_of(config=weaver_config(match_scale=match_scale))
    weaver, params = pure(made.weaver), pure(made.reasoner.model)
    lora = made.config.weaver.lora
    merged = oracle.merged(params, weaver["adapter"], lora.alpha / lora.rank)
    decoder = oracle.thoughtbubbles(merged, made.reasoner.model.config)
    found = weave(made, stream())
    for row, (length, kind) in enumerate(((9, "prompt"), (6, "inference"))):
        context = np.asarray(stream()[row, :length], np.float64)
        expected = oracle.weave(weaver, decoder, context, kind)
        np.testing.assert_allclose(found[row, : len(expected)], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "rank"])
def test_b9_only_what_stands_before_is_seen(kind: str):
    made, x = memgen_of(kind), stream()
    found = weave(made, x)
    later = x.at[1, 6:].set(jnp.nan)
    assert (weave(made, later) == found).all()
    earlier = weave(made, x.at[:, 2].add(0.1))
    assert (np.abs(earlier - found).max(axis=(1, 2)) > 1e-4).all()


def test_b10_padding_does_not_matter():
    """Rows are padded on the right and nowhere else."""
    made = memgen_of()
    found = weave(made, stream())
    for pads in (3, 17):
        padded = jnp.pad(stream(), ((0, 0), (0, pads), (0, 0)), constant_values=7.0)
        np.testing.assert_allclose(weave(made, padded), found, atol=1e-5)


def test_b11_queries_are_normalised():
    # Queries of size 1 or more, so that the norm's epsilon is small beside them.
    made = changed(memgen_of(), "prompt", lambda q: 8 * q)
    found = weave(made, stream())
    factor = jnp.array([[0.5], [2.0], [3.0]])
    moved = changed(made, "prompt", lambda q: factor * q + jnp.array([[1.0], [-2.0], [0.3]]))
    np.testing.assert_allclose(weave(moved, stream())[0], found[0], rtol=0, atol=1e-4)
    other = changed(made, "prompt", lambda q: -q)
    assert np.abs(weave(other, stream())[0] - found[0]).max() > 0.01


def test_b12_a_slot_does_not_see_later_ones():
    made = memgen_of()
    fewer = memgen_of(config=weaver_config(prompt_latents=2))
    weaver = jax.tree.map(lambda leaf: leaf, made.weaver)
    weaver.config = fewer.weaver.config
    weaver.prompt.queries = type(weaver.prompt.queries)(weaver.prompt.queries[...][:2])
    found = weave(replaced(fewer, weaver=weaver), stream())
    assert found.shape == (2, 2, 32)
    np.testing.assert_allclose(found[0], weave(made, stream())[0, :2], atol=1e-6)


def test_b13_the_order_of_the_context_matters():
    made, x = memgen_of(), stream()
    swapped = x.at[:, 1].set(x[:, 3]).at[:, 3].set(x[:, 1])
    assert np.abs(weave(made, swapped) - weave(made, x)).max(axis=(1, 2)).min() > 1e-4


def test_b14_a_weaver_of_another_width():
    made, response = rollout("plain", CONFIG, AlwaysInvoke(), 48)
    assert made.weaver.to_weaver.kernel.shape == (32, 48)
    assert made.weaver.prompt.queries.shape == (SLOTS, 48)
    assert weave(made, stream()).shape == (2, SLOTS, 32)
    weaver = pure(made.weaver)
    assert made.weaver_backbone is not None
    config = made.weaver_backbone.model.config
    params = oracle.merged(pure(made.weaver_backbone.model), weaver["adapter"], 2.0)
    decoder = oracle.thoughtbubbles(params, config)
    embed = np.asarray(made.reasoner.embed_tokens(jnp.arange(100)), np.float64)
    expected = oracle.weave(weaver, decoder, embed[[1, 2, 3]], "prompt")
    np.testing.assert_allclose(response.latents[0, 0], expected, atol=1e-5)


@jax.jit
def woven_latents(made: MemGen, tokens: jax.Array, plan: Plan) -> jax.Array:
    return made.weave(tokens, plan).latents


@pytest.mark.parametrize("kind", ["plain", "rank", "foreign"])
def test_b15_cached_weaving_is_weaving_all_of_it(kind: str):
    """Queries are read and forgotten; a row of 37 tokens is read in several chunks."""
    made, response = rollout(kind, CONFIG, AlwaysInvoke())
    tokens, prompt = whole_rows([[1, 2, 3], [9], list(_LONG)], response)
    plan = plan_from_decisions(response.decisions, prompt, CONFIG)
    recomputed = woven_latents(made, tokens, plan)
    assert ((plan.point >= 0).sum(axis=1) > 1).any()
    for row, event in zip(*np.nonzero(plan.point >= 0), strict=True):
        width = plan.width[row, event]
        np.testing.assert_allclose(
            response.latents[row, event, :width], recomputed[row, event, :width], atol=1e-5
        )


_LONG = [int(i) for i in np.random.default_rng(1).integers(0, 100, 37)]
POINT = jnp.array([[3, 6, 9], [2, -1, -1]], jnp.int32)


@pytest.mark.parametrize("see", [True, False])
def test_b16_earlier_latents_are_seen_or_not(see: bool):
    made = memgen_of(config=weaver_config(latents_see_latents=see))
    tokens = random_tokens(2, 12, seed=4)
    kind = jnp.array([[PROMPT, INFERENCE, INFERENCE]] * 2)
    plan = Plan.of(POINT, kind, made.config)
    found = woven_latents(made, tokens, plan)
    other = changed(made, "prompt", lambda q: -q)
    moved = woven_latents(other, tokens, plan)
    assert np.abs(moved[0, 0] - found[0, 0]).max() > 0.01
    if see:
        assert np.abs(moved[0, 1, :2] - found[0, 1, :2]).max() > 1e-4
        return
    assert (moved[:, 1:] == found[:, 1:]).all()
    vectors = made.reasoner.embed_tokens(tokens)
    for event in range(3):
        alone = weave(made, vectors, jnp.maximum(POINT[:, event], 0), kind[:, event])
        width, rows = plan.width[:, event], POINT[:, event] >= 0
        for row in np.flatnonzero(rows):
            np.testing.assert_allclose(
                found[row, event, : width[row]], alone[row, : width[row]], atol=1e-5
            )


def test_dropout_reaches_the_weaver_in_training_only():
    made = memgen_of(config=weaver_config(lora=dataclasses.replace(LORA, dropout=0.5)))
    tokens = random_tokens(2, 12, seed=4)
    plan = Plan.of(POINT, jnp.array([[PROMPT, INFERENCE, INFERENCE]] * 2), made.config)
    weave = jax.jit(lambda made, key: made.weave(tokens, plan, key).latents)
    quiet = woven_latents(made, tokens, plan)
    noisy = weave(made, jax.random.key(0))
    assert np.abs(noisy - quiet).max() > 1e-3
    assert (noisy == weave(made, jax.random.key(0))).all()
    assert (noisy != weave(made, jax.random.key(1))).any()
    assert with_dropout(made.weaver.adapter, None) is made.weaver.adapter


def test_each_event_has_its_own_dropout():
    made = memgen_of(config=weaver_config(lora=dataclasses.replace(LORA, dropout=0.5)))
    tokens = random_tokens(1, 12, seed=4)
    kind = jnp.full((1, 2), PROMPT)
    weave = jax.jit(lambda made, plan, key: made.weave(tokens, plan, key).latents)
    first, second = (
        Plan.of(jnp.array([points]), kind, made.config) for points in ([3, -1], [-1, 3])
    )
    quiet = [weave(made, plan, None) for plan in (first, second)]
    np.testing.assert_allclose(quiet[0][:, 0], quiet[1][:, 1], atol=1e-6)
    noisy = [weave(made, plan, jax.random.key(0)) for plan in (first, second)]
    assert np.abs(noisy[0][:, 0] - noisy[1][:, 1]).max() > 1e-3

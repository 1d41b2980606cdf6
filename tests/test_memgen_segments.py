"""What stands before an event is computed once: in training texts, and with an event's queries."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from memgen_tiny import PROMPT_LATENTS, memgen_of, random_tokens, weaver_config

from memgen import MemGen, Plan, WeaverParam
from memgen.insertion import INFERENCE, PROMPT
from memgen.segments import Schedule, weave_in_segments
from memgen.session import CHUNK, DecoderState, take
from thoughtbubbles.attention import cache_spans

POINT = np.array([[3, 6, 19], [-1, 0, 14], [5, -1, -1]], np.int32)
KIND = np.array([PROMPT, INFERENCE, INFERENCE], np.int32)[None].repeat(3, axis=0)
LENGTH, EVENTS, SLOTS = 20, 3, PROMPT_LATENTS
SHORT = Schedule(4 + SLOTS, 8)
"""Segments so short that rows need several in front of an event, and other rows none."""


def latents_of(made: MemGen, tokens: jax.Array, plan: Plan, segments: bool) -> jax.Array:
    """Latents that are inserted, zeros elsewhere."""
    if segments:
        vectors = made.reasoner.embed_tokens(tokens)
        found = weave_in_segments(made.weaver, made.weaving(), made.reasoner, vectors, plan, SHORT)
    else:
        found = made.weave(tokens, plan).latents
    real = jnp.arange(SLOTS) < plan.width[..., None]
    return jnp.where(real[..., None], found, 0)


@pytest.mark.parametrize(
    "context", [pytest.param("embeddings", marks=pytest.mark.experiment), "hidden"]
)
def test_segments_are_one_pass_for_each_event(context: Any):
    """Latents, and gradients of all that the weaver trains, through latents that see latents."""
    made, tokens = memgen_of("shallow", weaver_config(context=context)), random_tokens(3, LENGTH)
    plan = Plan.of(jnp.asarray(POINT), jnp.asarray(KIND), made.config)
    assert not Schedule.of(LENGTH, EVENTS, SLOTS).saves(LENGTH, EVENTS, SLOTS), "the other way"
    graphdef, trained, rest = nnx.split(made, WeaverParam, ...)
    weights = jax.random.normal(jax.random.key(0), (3, EVENTS, SLOTS, 32))

    def loss(trained, segments: bool):
        latents = latents_of(nnx.merge(graphdef, trained, rest), tokens, plan, segments)
        return (latents * weights).sum(), latents

    def both(trained):
        return [jax.value_and_grad(loss, has_aux=True)(trained, way) for way in (True, False)]

    ((_, found), ours), ((_, expected), theirs) = jax.jit(both)(trained)
    used = POINT >= 0
    assert (np.abs(np.asarray(expected)).max(axis=(2, 3)) > 0.01).tolist() == used.tolist()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    size = lambda tree: float(jnp.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(tree))))  # noqa: E731
    assert size(jax.tree.map(jnp.subtract, ours, theirs)) < 1e-5 * size(theirs)


def test_rounds_suffice_and_are_few():
    rng = np.random.default_rng(0)
    for length, events, slots in ((256, 6, 8), (40, 1, 3), (1024, 6, 8), (64, 20, 1), (300, 2, 40)):
        schedule = Schedule.of(length, events, slots)
        assert schedule.rounds <= 3 * events + length // CHUNK
        for _ in range(200):
            point = np.sort(rng.choice(length, events, replace=False))
            done = rounds = 0
            for start in point + slots * np.arange(events):
                while True:
                    left, rounds = start - done, rounds + 1
                    done += min(left, schedule.size)
                    if left + slots <= schedule.size:
                        break
            assert rounds <= schedule.rounds
    assert Schedule.of(256, 6, 8).saves(256, 6, 8)
    assert not Schedule.of(256, 1, 8).saves(256, 1, 8), "one event is one pass"


def test_queries_are_computed_with_what_stands_before_them_and_leave_no_trace():
    """Rows that lag far behind, a little, exactly as far as one round reaches, and not at all."""
    decoder = memgen_of("shallow").reasoner
    width, count = 5, jnp.array([5, 3, 4, 2, 5])
    lag = jnp.array([2 * CHUNK + 9, 7, CHUNK + width - 4, 0, CHUNK + 1])
    rows = jnp.array([True, True, True, True, False])
    x = jax.random.normal(jax.random.key(0), (5, 2 * CHUNK + 9, 32))
    queries = jax.random.normal(jax.random.key(1), (5, width, 32))
    fetch = lambda index: take(x, index)  # noqa: E731

    @jax.jit
    def both(decoder, lag, count):
        state = DecoderState.start(decoder, 5, x.shape[1] + 2 * width)
        found, after = state.extend_and_query(decoder, fetch, lag, rows, queries, count)
        again, _ = decoder.extend(after.cache, queries, count)
        plain = state.extend_to(decoder, fetch, lag, rows)
        expected, _ = decoder.extend(plain.cache, queries, count)
        return found, again, expected, after.length

    found, again, expected, length = map(np.asarray, both(decoder, lag, count))
    for row in range(4):
        assert length[row] == lag[row]
        real = slice(int(count[row]))
        np.testing.assert_allclose(found[row, real], expected[row, real], atol=1e-5)
        np.testing.assert_allclose(again[row, real], expected[row, real], atol=1e-5)


def test_forks_forget_nothing():
    decoder: Any = memgen_of("one fork by rank").reasoner
    assert not decoder.can_forget
    with pytest.raises(ValueError, match=r"fork layers \(1,\) forget no token"):
        decoder.extend_keeping(decoder.init_cache(1, 4), jnp.zeros((1, 2, 32)), [2], [1])


def test_no_span_of_a_cache_is_more_than_half_of_it():
    """To take a prefix out of a cache costs a copy of it in each block and step."""
    assert cache_spans(200) == [200] and cache_spans(296) == [296]
    assert cache_spans(512) == [256, 512] and cache_spans(1100) == [256, 512, 1100]

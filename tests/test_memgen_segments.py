"""What stands before an event is computed once: in training texts, and with an event's queries."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from memgen_tiny import LORA, PROMPT_LATENTS, memgen_of, random_tokens, weaver_config

import memgen.model
from memgen import MemGen, Plan, WeaverParam, segments
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


SIZES = 4, 256, 6


def test_rows_are_read_in_segments_where_that_saves(monkeypatch):
    """And where no cache is computed anew, and dropout, if there is any, draws nothing."""
    dropping = weaver_config(lora=dataclasses.replace(LORA, dropout=0.1))
    hidden, embeddings = weaver_config(context="hidden"), weaver_config()
    assert memgen_of("shallow").schedule(SIZES, dropout=True) == Schedule.of(256, 6, SLOTS)
    assert memgen_of("shallow", dropping).schedule(SIZES, dropout=False)
    assert not memgen_of("shallow", dropping).schedule(SIZES, dropout=True)
    assert not memgen_of("shallow").schedule((4, 40, 6), dropout=False), "short rows"
    assert not memgen_of("shallow").schedule((4, 256, 0), dropout=False), "no events"
    for kind in ("foreign", "one fork by rank", "hatchling"):
        assert not memgen_of(kind).schedule(SIZES, dropout=False)
    # A weaver of its own can forget; the reasoner's cache is there with context="hidden" alone.
    assert memgen_of("one fork by rank", embeddings, 48).schedule(SIZES, dropout=False)
    assert not memgen_of("one fork by rank", hidden, 48).schedule(SIZES, dropout=False)
    assert memgen_of("shallow", hidden).schedule(SIZES, dropout=False)
    cache = 4 * 2 * 2 * (256 + 6 * SLOTS) * 8 * 4 + 4 * 4  # keys and values of 2 heads; lengths
    kept = cache * Schedule.of(256, 6, SLOTS).rounds
    monkeypatch.setattr(segments, "MOST_KEPT", kept // 2)
    assert not memgen_of("shallow").schedule(SIZES, dropout=False)
    assert memgen_of("shallow").schedule(SIZES, dropout=False, shards=2)


def test_what_weaves_by_the_schedule(monkeypatch):
    made, called = memgen_of("shallow"), []

    def weave(weaver, decoder, reasoner, vectors, plan, schedule):
        called.append(schedule)
        return weave_in_segments(weaver, decoder, reasoner, vectors, plan, schedule)

    def shapes_of(length: int, events: int) -> Any:
        point = np.broadcast_to(np.arange(events), (3, events))
        plan = Plan.of(jnp.asarray(point), jnp.asarray(np.minimum(point, 1)), made.config)
        weave = lambda made, tokens, key: made.weave(tokens, plan, key)  # noqa: E731
        return jax.eval_shape(weave, made, random_tokens(3, length), jax.random.key(0))

    monkeypatch.setattr(memgen.model, "weave_in_segments", weave)
    for length, events in ((LENGTH, EVENTS), (LENGTH, 0), (256, 6)):
        woven = shapes_of(length, events)
        assert woven.latents.shape == (3, events, SLOTS, 32)
        assert woven.inputs_embeds.shape == (3, length + events * SLOTS, 32)
    assert called == [Schedule.of(256, 6, SLOTS)]


def test_a_row_that_outgrew_the_cache_stays_nan():
    decoder: Any = memgen_of("shallow").reasoner

    @jax.jit
    def twice(decoder, x, length, kept):
        first, cache = decoder.extend_keeping(decoder.init_cache(2, 4), x, length, kept)
        second, _ = decoder.extend(cache, x[:, :1], jnp.ones_like(kept))
        return first[:, 0, 0], second[:, 0, 0]

    x = jax.random.normal(jax.random.key(0), (2, 5, 32))
    for found in twice(decoder, x, jnp.array([5, 3]), jnp.array([1, 1])):
        assert np.isnan(found).tolist() == [True, False]


def test_forks_forget_nothing():
    decoder: Any = memgen_of("one fork by rank").reasoner
    assert not decoder.can_forget
    with pytest.raises(ValueError, match=r"fork layers \(0,\) forget no token"):
        decoder.extend_keeping(decoder.init_cache(1, 4), jnp.zeros((1, 2, 32)), [2], [1])


def test_no_span_of_a_cache_is_more_than_half_of_it():
    """To take a prefix out of a cache costs a copy of it in each block and step."""
    assert cache_spans(200) == [200] and cache_spans(296) == [296]
    assert cache_spans(512) == [256, 512] and cache_spans(1100) == [256, 512, 1100]

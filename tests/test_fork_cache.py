"""Each step of cached forking that one can forget is refused, by name and with both values."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from thoughtbubbles import (
    Fork,
    PrefixRank,
    Streams,
    TopK,
    join_segments,
    left_align,
    merge,
    restore_alignment,
    split_segments,
    token_slots,
)

ROWS, WIDTH, MAX = 2, 4, 8
X = jax.device_put(np.random.default_rng(0).normal(size=(ROWS, 3, WIDTH)).astype(np.float32))
ONE = jax.device_put(np.array([1, 1], np.int32))
FORK, LATER = (Fork(WIDTH, PrefixRank(2.0), rngs=nnx.Rngs(seed)) for seed in range(2))
EMPTY = FORK.init_cache(ROWS, MAX)
LATE = LATER.init_cache(ROWS, MAX, before=EMPTY)
START = Streams.start(X, first=EMPTY.length)


@jax.jit
def twice(streams: Streams, cache, late) -> Any:
    streams, first, cache = FORK.extend(streams, cache)
    streams, second, late = LATER.extend(streams, late)
    return streams, first, second, cache, late


FORKED, _, SLOTS, FILLED, LATE_FILLED = twice(START, EMPTY, LATE)
MISTAKES = {
    "not causal": (
        lambda: Fork(WIDTH, TopK(1.5), rngs=nnx.Rngs(0)).init_cache(2, 8),
        "TopK(ratio=1.5, streams=None) can't be cached",
    ),
    "policy state": (
        lambda: FORK.extend(START, PrefixRank(2.0).init_state(ROWS, MAX)),
        "extend from a RankState: give the ForkCache of fork.init_cache",
    ),
    "a size": (lambda: FORK.init_cache(0, 8), "batch=0: choose 1 or more"),
    "sizes of two": (
        lambda: LATER.init_cache(ROWS, 9, before=EMPTY),
        "max_tokens=9 behind a fork layer of batch=2, max_tokens=8",
    ),
    "before=": (
        lambda: LATER.extend(FORKED, EMPTY),
        "streams of 3 tokens for a cache behind 0 fork layers, which give 3",
    ),
    "other fork layer's": (
        lambda: FORK.extend(START, LATE),
        "3 streams of 3 tokens for a cache behind 1 fork layers, which give 6",
    ),
    "first=": (
        lambda: FORK.extend(Streams.start(X), FILLED),
        "Streams.start(x, length, first=cache.length)",
    ),
    "an old first": (
        lambda: FORK.extend(START, FILLED),
        "begin at tokens [0, 0] for a cache of [3, 3] tokens",
    ),
    "an old cache": (
        lambda: FORK.extend(Streams.start(X, first=FILLED.length), EMPTY),
        "begin at tokens [3, 3] for a cache of [0, 0] tokens",
    ),
    "extend": (lambda: FORK(Streams.start(X, first=FILLED.length)), "fork them by Fork.extend"),
    "fresh": (
        lambda: FORK.extend(Streams.start(X, first=FILLED.length), FILLED, fresh=True),
        "fresh=True with a cache of [3, 3] tokens",
    ),
    "rows": (
        lambda: FORK.extend(Streams.start(X[:1], first=EMPTY.length[:1]), EMPTY),
        "streams of 1 rows for a cache of 2",
    ),
    "overflow": (
        lambda: FORK.extend(START, FORK.init_cache(ROWS, 2)),
        "a row would grow to 3 tokens, the cache has max_tokens=2",
    ),
    "other policy": (
        lambda: Fork(WIDTH, PrefixRank(1.5), rngs=nnx.Rngs(0)).extend(START, EMPTY),
        "noise=0.0), the fork layer has PrefixRank(ratio=1.5",
    ),
    "slots of tokens": (
        lambda: SLOTS.write(jnp.zeros((ROWS, MAX)), jnp.zeros((ROWS, 12))),
        "a cache of shape (2, 8) for 2 rows of 16 slots",
    ),
    "entries": (
        lambda: SLOTS.write(jnp.zeros((ROWS, 16)), jnp.zeros((ROWS, 3))),
        "entries of shape (2, 3) for new streams (2, 12)",
    ),
    "token_slots": (
        lambda: token_slots(FORKED, MAX),
        "behind a fork layer: take the slots that Fork.extend returns",
    ),
    "lengths": (
        lambda: Streams.start(X, np.array([99, -1])),
        "lengths [99, -1] of 3 tokens: choose 0 to 3",
    ),
    "shape of lengths": (
        lambda: Streams.start(X, np.array([1, 2, 3])),
        "length of shape (3,) for 2 rows",
    ),
    "two axes": (
        lambda: Streams.start(X[0]),
        "residuals of shape (3, 4): Streams.start takes [batch, tokens, width]",
    ),
    "copies": (lambda: Streams.start(X, copies=0), "copies=0 is below 1"),
    "width": (
        lambda: FORK(Streams.start(jnp.zeros((2, 3, 6)))),
        "residuals of width 6 in a fork layer of embed_dim=4",
    ),
    "an array to fork": (
        lambda: FORK(X),
        "a fork layer takes Streams, not (2, 3, 4): Streams.start(x)",
    ),
    "an array to merge": (lambda: merge(X), "merge takes Streams, not (2, 3, 4)"),
    "mask": (
        lambda: left_align(X, np.ones((2, 4), bool)),
        "a mask of shape (2, 4) for tokens of shape (2, 3, 4)",
    ),
    "segment ids": (
        lambda: split_segments(X, np.array([[1, 2, 3], [1, 1, 0]]), 2),
        "segment ids from 0 to 3 with num_segments=2",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_forgotten_step_is_refused_in_one_line(name: str):
    call, message = MISTAKES[name]
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        call()
    assert "\n" not in str(raised.value)


@jax.jit
def extended(streams: Streams, cache) -> Any:
    return FORK.extend(streams, cache)


@pytest.mark.parametrize(
    ("length", "first"), [(2, 3), (1, 2), (4, 3), (-1, 3)], ids=["right", "first", "long", "below"]
)
def test_what_jit_does_not_know_becomes_nan_in_its_row_for_good(length: int, first: int):
    lengths, firsts = np.array([2, length], np.int32), np.array([3, first], np.int32)
    start = Streams.start(X, ONE, first=FILLED.length)
    streams, _, cache = extended(start.replace(length=lengths, first=firsts), FILLED)
    right = (length, first) == (2, 3)
    assert np.isfinite(streams.x[0]).all() and np.isfinite(streams.x[1]).all() == right
    again = start.replace(length=np.array([1, 1], np.int32), first=cache.length)
    streams, _, _ = extended(again, cache)
    assert np.isfinite(streams.x[0]).all() and np.isfinite(streams.x[1]).all() == right


def test_slots_follow_each_other_and_see_what_is_left_of_them():
    slots = SLOTS
    alive = np.asarray(FORKED.alive)
    assert slots.capacity == LATE.slots == 16
    assert (np.asarray(LATE_FILLED.used) == alive.sum(axis=1)).all()
    index, visible = np.asarray(slots.index()), np.asarray(slots.visible())
    assert (index[alive] == np.nonzero(alive)[1]).all() and (index[~alive] == 16).all()
    assert (visible == (np.arange(16) <= np.arange(12)[:, None])).all()


def test_attenuation_is_that_of_the_equations():
    p = np.exp(np.asarray(FORKED.log_score))
    np.testing.assert_allclose(FORKED.attention_bias(16), np.log(p) / 4, atol=1e-6)
    np.testing.assert_allclose(FORKED.attention_bias(), np.log(p), atol=1e-6)
    np.testing.assert_allclose(FORKED.attenuate(FORKED.x), p[..., None] * FORKED.x, atol=1e-6)
    assert FORKED.attenuate(FORKED.x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_texts_of_a_row_are_split_and_joined():
    rng = np.random.default_rng(1)
    ids = np.array([[1, 1, 2, 2, 2, 0], [2, 1, 0, 1, 1, 3]])
    values = rng.normal(size=(2, 6, 3)).astype(np.float32)
    rows, length = split_segments(jnp.asarray(values), ids, 3)
    assert length.tolist() == [2, 3, 0, 3, 1, 1]
    for row, text in ((0, 1), (0, 2), (1, 1), (1, 3)):
        mine = values[row][ids[row] == text]
        np.testing.assert_array_equal(rows[3 * row + text - 1][: len(mine)], mine)
    joined = np.asarray(join_segments(rows, ids))
    np.testing.assert_array_equal(joined, np.where(ids[..., None] > 0, values, 0))
    joined = np.asarray(
        jax.jit(lambda v, ids: join_segments(split_segments(v, ids, 2)[0], ids))(values, ids)
    )
    assert np.isnan(joined[1, 5]).all() and np.isfinite(joined[0]).all()


def test_a_mask_may_be_of_integers():
    mask = np.array([[0, 1, 1], [1, 0, 1]])
    aligned, length, rank = left_align(X, mask)
    assert length.tolist() == [2, 2]
    restored = restore_alignment(aligned, mask, rank)
    np.testing.assert_array_equal(restored, np.where(mask[..., None], X, 0))

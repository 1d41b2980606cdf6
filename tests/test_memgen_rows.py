"""An event is computed in the rows that weave: taken out of the session, put back, no others."""

import dataclasses
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memgen_tiny import (
    CONFIG,
    LORA,
    NEW,
    NOBODY,
    PROMPT_LATENTS,
    VOCAB,
    answer,
    in_numpy,
    memgen_of,
    replaced,
    rollout,
    weaver_config,
)
from memgen_tiny import PROMPTS as SHARED

from memgen import AlwaysInvoke, NeverInvoke, TriggerConfig, begin, make_request
from memgen import decoding as loop_module
from memgen import events as events_module
from memgen.backbone import check_cache
from memgen.events import WeaverBatchSize
from memgen.request import pad_prompts, row_keys
from memgen.row_group import RowGroup
from memgen.session import CHUNK, DecoderState
from thoughtbubbles import Backbone
from train.devices.mesh import MeshConfig, batch_sharding, make_mesh, replicated

ROWS = 4
PROMPTS = [[1, 2, 3], [9], [4, 40, 8, 6, 61], [17, 5]]
PATTERNS = [[bool(number >> row & 1) for row in range(ROWS)] for number in range(2**ROWS)]
STREAMS = dataclasses.replace(
    weaver_config(context="hidden"), trigger=TriggerConfig("stream", lora=LORA)
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TheseInvoke:
    """Whenever they are asked, these rows invoke and no others."""

    rows: jax.Array
    learned = False

    def __call__(self, logits, keys):
        return self.rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByKey:
    """Keeps about half of all memory, by the row's key, or all of it."""

    everything: jax.Array

    def __call__(self, latents, real, keys):
        return self.everything | jax.vmap(jax.random.bernoulli)(keys)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class OfPrompts:
    """Keeps the memory of prompts, by its number of latents."""

    def __call__(self, latents, real, keys):
        return real.sum(axis=1) == PROMPT_LATENTS


@dataclasses.dataclass(frozen=True)
class FirstToken:
    """A retriever that says a row's first token again: once, or twice if it is odd."""

    max_snippet_tokens = 2

    def retrieve(self, ids, length, asks):
        first = np.asarray(ids)[:, 0]
        return np.stack([first, first], axis=1), np.where(asks, 1 + first % 2, 0).astype(np.int32)


def told(everything):
    """What is asked of events, always of one shape."""
    return {"keep_memory": ByKey(jnp.asarray(everything)), "retriever": FirstToken()}


def these(made, pattern, **how):
    return make_request(made, NEW, TheseInvoke(jnp.array(pattern)), **{"stop": NOBODY, **how})


def opened(made, prompts=PROMPTS, sharding=None, request=None):
    tokens, length = pad_prompts(prompts, VOCAB)
    if sharding is not None:
        tokens, length = jax.device_put((tokens, length), sharding)
    keys, room = row_keys(0, prompts), tokens.shape[1] + 16
    return begin(made, tokens, length, keys, room, request=request)


def assert_same(response, alone, pattern):
    for row, weaves in enumerate(pattern):
        expected = alone[row, weaves]
        assert response.texts[row] == expected.texts[0]
        assert response.decisions[row].tolist() == expected.decisions[0].tolist()
        assert response.points[row].tolist() == expected.points[0].tolist()
        np.testing.assert_allclose(response.log_probs[row], expected.log_probs[0], atol=1e-4)
        np.testing.assert_allclose(response.latents[row], expected.latents[0], atol=1e-4)


def alone_of(made, **how):
    """Each prompt by itself, with memory and without."""
    return {
        (row, weaves): in_numpy(
            answer(made, [prompt], policy=TheseInvoke(jnp.array([weaves])), **how)
        )
        for row, prompt in enumerate(PROMPTS)
        for weaves in (False, True)
    }


WAITING = WeaverBatchSize(rows=3)  # at times some of three do not wait
AT_ONCE = [pytest.param(WeaverBatchSize(n), marks=pytest.mark.experiment) for n in (1, 2, ROWS)]


@pytest.mark.parametrize("weaver_batch_size", [WAITING, *AT_ONCE], ids=str)
def test_whichever_rows_weave_each_is_what_it_is_alone(weaver_batch_size: WeaverBatchSize):
    """All patterns; three rows once they wait, or as long as they may; one; one of each half; all.

    What is told of a row is its own, at the events in the loop too: its key, by which all memory or
    some is kept, and its snippet.
    """
    made = memgen_of("shallow", STREAMS)
    alone, some = (alone_of(made, **told(everything)) for everything in (True, False))
    with_memory, without = (
        np.array([alone[row, weaves].log_probs[0] for row in range(ROWS)])
        for weaves in (True, False)
    )
    assert (np.abs(with_memory - without).max(axis=1) > 0.01).all(), "memory matters in every row"
    later = np.concatenate([some[row, True].decisions[0, 1:] for row in range(ROWS)])
    assert {0, 1} <= set(later.tolist()), "in the loop some is kept, some is not"
    for everything, expected in ((True, alone), (False, some)):
        for pattern in PATTERNS if everything else PATTERNS[-1:]:
            request = these(made, pattern, **told(everything))
            session = opened(made, request=request)
            response, _ = loop_module.respond(made, session, request, 16, weaver_batch_size)
            assert_same(in_numpy(response), expected, pattern)


@pytest.mark.experiment
def test_rows_spread_over_devices_weave_where_they_are():
    """And give what they give in a batch of one device, whether all weave there or none."""
    policies = {True: AlwaysInvoke(), False: NeverInvoke()}
    shared = {
        weaves: in_numpy(rollout("shallow", CONFIG, policies[weaves])[1]) for weaves in policies
    }
    place = [0, 1, 1, 0] * 2
    prompts = [SHARED[at] for at in place]
    alone = {
        (row, weaves): jax.tree.map(lambda leaf, at=at: leaf[at : at + 1], shared[weaves])
        for row, at in enumerate(place)
        for weaves in policies
    }
    made, mesh = memgen_of("shallow"), make_mesh(MeshConfig(), jax.devices()[:2])
    spread = batch_sharding(mesh)
    made_there = jax.device_put(made, replicated(mesh))
    given = made_there, opened(made_there, prompts, spread), these(made, PATTERNS[1] * 2)
    for weaver_batch_size in (WeaverBatchSize(2), WeaverBatchSize(2, rows=2)):
        text = str(loop_module._respond.lower(*given, 16, weaver_batch_size).compile().as_text())
        told = re.findall(r" = (.*) (?:all-\w+|reduce-scatter|collective-permute)\S*\(", text)
        kinds = {kind for types in told for kind in re.findall(r"\w+\[[\d,]*\]", types)}
        assert kinds == {"pred[]", "s32[]"}, "devices tell each other how many are left, no rows"
    for pattern in PATTERNS[::3]:
        session = opened(made_there, prompts, spread)
        assert loop_module.weaver_batch_size_for(session) == WeaverBatchSize(2)
        response, session = loop_module.respond(made_there, session, these(made, pattern * 2), 16)
        assert loop_module.weaver_batch_size_for(session) == WeaverBatchSize(2), (
            "the next response is not another program"
        )
        assert_same(in_numpy(response), alone, pattern * 2)


@pytest.mark.parametrize(
    ("parts", "each", "rows"),
    [(1, 1, [5]), (2, 1, [2, 5]), (1, 2, [5, 2]), (1, 3, [5, 2, 0]), (2, 2, [2, 0, 5, 3])],
)
def test_a_group_of_rows_is_taken_out_and_put_back(parts, each, rows):
    """Rows 2 and 5 wait, row 5 for longer; others are taken where more are asked for."""
    tree = [np.arange(np.prod(shape)).reshape(shape) for shape in ((6, 3), (4, 6, 2), (5,))]
    axes = [0, 1, None]
    waiting = jnp.array([0, 0, 1, 0, 0, 3])
    group = RowGroup.next(waiting, parts, each)
    for taken, leaf, axis in zip(group.take(tree, axes), tree, axes, strict=True):
        np.testing.assert_array_equal(taken, leaf if axis is None else leaf.take(rows, axis))
    new = [leaf + 1 for leaf in group.take(tree, axes)]
    for found, leaf, axis in zip(group.put(tree, new, axes), tree, axes, strict=True):
        expected = leaf + 1 if axis is None else leaf.copy()
        if axis is not None:
            np.moveaxis(expected, axis, 0)[rows] += 1
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("waited", "live", "due"),
    [
        ([], 9, False),
        ([], 0, False),
        ([1, 2, 1], 64, False),
        ([1, 2, 1, 4], 64, True),  # a whole group
        ([1, 2, 1], 3, True),  # all that generate
        ([1, 8], 64, False),
        ([1, 9], 64, True),  # nobody waits for more than eight steps
    ],
)
def test_rows_weave_once_enough_of_them_wait_or_one_has_waited_long(waited, live, due):
    waiting = jnp.zeros(64, jnp.int32).at[jnp.arange(len(waited))].set(jnp.array(waited, jnp.int32))
    assert WeaverBatchSize(2, rows=2).due(waiting, jnp.arange(64) < live) == due
    assert WeaverBatchSize(2).due(waiting, jnp.arange(64) < live) == bool(waited), "a group of one"


@pytest.mark.parametrize(
    "wrong", [WeaverBatchSize(3), WeaverBatchSize(0), WeaverBatchSize(1, 0)], ids=str
)
def test_a_weaver_batch_size_that_does_not_fit_is_one_line(wrong: WeaverBatchSize):
    with pytest.raises(
        ValueError, match=r"WeaverBatchSize\(.* of a batch of 4 rows: give a number"
    ):
        wrong.check(4)
    for fits in (WeaverBatchSize(2, 2), WeaverBatchSize(2), WeaverBatchSize(3, 2)):
        fits.check(4)


@pytest.mark.parametrize(("rows", "expected"), [(7, 1), (15, 1), (16, 2), (64, 8)])
def test_an_accelerator_weaves_an_eighth_of_the_rows_at_a_time(rows, expected, monkeypatch):
    """A CPU one row of each shard."""
    session, found = opened(memgen_of("shallow")), []
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)

        def under_a_trace(count):
            found.append(loop_module.weaver_batch_size_for(session.replace(count=count)))

        jax.eval_shape(under_a_trace, jnp.zeros(rows, jnp.int32))
    assert found == [WeaverBatchSize(), WeaverBatchSize(1, expected)]


class Stacked:
    """A decoder that stacks the keys of its layers, and counts for all rows together."""

    def init_cache(self, batch, max_len):
        return {"keys": jnp.zeros((5, batch, max_len, 4)), "next": jnp.int32(0)}

    def cache_batch_axes(self, cache):
        return {"keys": 1, "next": None}


def test_a_decoder_names_the_axis_of_rows_in_its_cache():
    decoder, cache = Stacked(), Stacked().init_cache(3, 8)
    check_cache(decoder)
    keys = cache["keys"] + jnp.arange(3)[:, None, None]
    state = DecoderState(cache | {"keys": keys}, jnp.arange(3), jnp.zeros((3, 2)))
    part = RowGroup.next(jnp.array([0, 1, 0]), 1, 1)
    taken = part.take(state, state.batch_axes(decoder))
    assert taken.cache["keys"].shape == (5, 1, 8, 4) and (taken.cache["keys"] == 1).all()
    assert taken.length.tolist() == [1] and taken.cache["next"].shape == ()


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ({"keys": (-4, 8)}, r"\['keys'\] the shape \(8, 8\) for 2 rows and \(12, 8\) for 3"),
        ({"keys": (5, -1, 8)}, "which is not axis 0: name the axis"),
        ({"keys": (8,)}, "which is not axis 0: name the axis"),
    ],
)
def test_a_cache_whose_rows_are_elsewhere_is_refused(cache, message):
    """Sizes below 0 count rows."""

    class Wrong:
        def init_cache(self, batch, max_len):
            size = lambda shape: [-n * batch if n < 0 else n for n in shape]  # noqa: E731
            return {name: jnp.zeros(size(shape)) for name, shape in cache.items()}

    with pytest.raises(ValueError, match=message):
        check_cache(Wrong())


def test_only_rows_that_are_there_are_taken():
    made, keys = memgen_of("shallow"), row_keys(0, PROMPTS[:1])
    session = opened(made)
    for row in (-1, ROWS):
        with pytest.raises(ValueError, match=f"row {row} of a session of 4: choose from 0 to 3"):
            session.take_rows(made, jnp.array([row]), keys)


def test_rows_that_are_taken_are_copies():
    """Generation donates the buffers of the new session, not those of the old one and the keys."""
    made, keys, rows = memgen_of("shallow"), row_keys(0, PROMPTS), jnp.arange(ROWS)
    state = DecoderState(Stacked().init_cache(ROWS, 8), rows, jnp.zeros((ROWS, 2)))
    session = opened(made).replace(reasoner=state, weaver=None, trigger=None)
    taken = session.take_rows(replaced(made, reasoner=Stacked()), rows, keys)
    for leaf in jax.tree.leaves(taken):
        leaf.delete()
    assert not any(leaf.is_deleted() for leaf in [keys, *jax.tree.leaves(session)])


def test_a_row_without_a_response_draws_later_as_if_it_had_not_been_asked():
    made = memgen_of("shallow")
    limit, decoders = jnp.array([3, 0, 3, 0]), events_module.Decoders(made, None, None)
    loop = loop_module._start(decoders, limit, make_request(made, 3), opened(made), 16)
    assert loop.done.tolist() == [False, True, False, True]
    assert loop.session.responses.tolist() == [1, 0, 1, 0]


def test_equal_prompts_are_counted_in_one_pass():
    prompts: Any = [[1, 2], [3], [1, 2], np.array([1, 2]), [3]]
    fold = jax.random.fold_in
    for row, repeat in enumerate((0, 0, 1, 2, 1)):
        ids = np.array(prompts[row], np.int32)
        expected = fold(fold(jax.random.key(5), zlib.crc32(ids.tobytes())), repeat)
        assert row_keys(5, prompts)[row] == expected
    many: Any = [np.arange(500)] * 2000  # comparing all pairs would take a minute
    assert row_keys(0, many).shape == (2000,)


def test_an_event_costs_what_its_rows_cost(monkeypatch):
    """Places that decoders read: a token in every row, then those of events, which weave at once.

    They are those of the rows that weave, or of all rows if more than half of them do, or if one
    does before its first token.
    """
    counted, extend = [], Backbone.extend

    def counting(self, cache, x, length, **how):
        places = x.shape[0] * x.shape[1]
        jax.debug.callback(lambda: counted.append(places))
        return extend(self, cache, x, length, **how)

    monkeypatch.setattr(Backbone, "extend", counting)
    made = memgen_of("shallow")
    inner: Any = loop_module._respond
    program = jax.jit(
        lambda *given: inner.__wrapped__(*given, 16, WeaverBatchSize())
    )  # traced anew
    event = CHUNK + 2 * PROMPT_LATENTS  # catching up, queries, and latents in the reasoner
    later = []
    for weaving in range(ROWS + 1):
        session = opened(made)
        jax.effects_barrier()
        counted.clear()
        pattern = [row < weaving for row in range(ROWS)]
        response, _ = jax.block_until_ready(program(made, session, these(made, pattern)))
        jax.effects_barrier()
        later.append(int((response.points > 0).sum()))
        together = [int((response.points == at).sum()) for at in range(NEW)]
        assert together[0] == weaving
        passes = [
            [ROWS] if some > ROWS // 2 or (some and at == 0) else [1] * some
            for at, some in enumerate(together)
        ]
        rows = sum(passes, [])
        assert sum(counted) == ROWS * NEW + sum(rows) * event
        # Queries are computed with the text before them: two calls an event.
        assert len(counted) == NEW + 2 * len(rows)
    assert later[0] == 0 < later[1]


def test_a_row_that_weaves_alone_does_not_wait_for_long(monkeypatch):
    """No other row ever joins it: it is idle for some steps an event, or until others end.

    What it would say while it waits is not said, and ends nothing.
    """
    steps, extend = [], Backbone.extend

    def counting(self, cache, x, length, **how):
        if x.shape[:2] == (ROWS, 1):
            jax.debug.callback(lambda: steps.append(1))
        return extend(self, cache, x, length, **how)

    made, pattern = memgen_of("shallow"), [True, False, False, False]
    at_prompts = these(made, pattern, keep_memory=OfPrompts())
    forgets, _ = loop_module.respond(made, opened(made), at_prompts, 16)
    expected = {
        stop: loop_module.respond(made, opened(made), these(made, pattern, stop=stop), 16)[0]
        for stop in (NOBODY, (forgets.texts[0][1],))  # what row 0 would say while it waits first
    }
    monkeypatch.setattr(Backbone, "extend", counting)
    monkeypatch.setattr(events_module, "PATIENCE", 2)
    inner: Any = loop_module._respond
    program = jax.jit(lambda *given: inner.__wrapped__(*given, 16, WeaverBatchSize(rows=3)))
    counts = []
    for stop, alone in expected.items():
        steps.clear()
        request = these(made, pattern, stop=stop)
        found, _ = jax.block_until_ready(program(made, opened(made), request))
        jax.effects_barrier()
        counts.append(len(steps))
        assert found.texts == alone.texts
        assert found.points.tolist() == alone.points.tolist()
    assert found.points[0, 1] == 1 and found.count[0] > 1
    step, points = 0, expected[NOBODY].points[0].tolist()
    for at in range(NEW):
        step += 1 + (min(2, NEW - step) if at and at in points else 0)
    assert NEW < counts[0] == step

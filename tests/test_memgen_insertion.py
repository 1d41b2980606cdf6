"""Oracle tests C: where latents stand, which outputs predict which tokens, and the loss."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import memgen_reference as oracle
import numpy as np
import pytest
from memgen_tiny import (
    BOUNDARY,
    CONFIG,
    VOCAB,
    in_numpy,
    memgen_of,
    predictors,
    random_tokens,
    weaver_config,
)

from memgen import MemGenConfig, Plan, plan_from_decisions, plan_insertions, token_log_probs
from memgen.insertion import (
    INFERENCE,
    PROMPT,
    assemble,
    check_one_response,
    predictor_index,
    token_index,
    woven_length,
)
from memgen.losses import sft_loss

TWO_EACH = weaver_config(prompt_latents=2, inference_latents=2)
POINTS = [[3, 6, 9], [5, 7, -1], [2, -1, -1]]
TOKENS = np.asarray(random_tokens(3, 12, seed=5))
SUPERVISED = np.arange(12) >= np.array([[3], [5], [2]])


def plan_of(points: Any, config: MemGenConfig = CONFIG) -> Plan:
    point = np.array(points, np.int32)
    kind = np.broadcast_to(np.arange(point.shape[1]) > 0, point.shape).astype(np.int32)
    return in_numpy(Plan.of(point, kind, config))


def events_of(plan: Plan, row: int) -> list[tuple[int, int]]:
    pairs = zip(plan.point[row].tolist(), plan.width[row].tolist(), strict=True)
    return [(point, width) for point, width in pairs if point >= 0]


NONE = [-1, -1, -1]
PLACES = [*POINTS, [0, 4, 11], NONE, [-1, 1, 2]]


@jax.jit
def places(plan: Plan, length: jax.Array) -> tuple[jax.Array, ...]:
    """Of tokens, of what predicts them, and lengths of streams; rows of 12 tokens."""
    return token_index(plan, 12), predictor_index(plan, 12), woven_length(plan, length)


def test_c17_worked_example():
    plan = plan_of([[3, 5, -1], *[NONE] * 5], TWO_EACH)
    tokens, predict, total = in_numpy(places(plan, np.full(6, 8)))
    assert tokens[0, :8].tolist() == [0, 1, 2, 5, 6, 9, 10, 11]
    assert plan.start[0].tolist() == [3, 7, 0]  # latents at 3, 4 and 7, 8
    assert total[0] == 12
    assert predict[0, 3:8].tolist() == [4, 5, 8, 9, 10]


@pytest.mark.parametrize("config", [CONFIG, TWO_EACH], ids=["3 and 2", "2 and 2"])
def test_c18_outputs_kept_are_those_before_tokens(config: MemGenConfig):
    plan = plan_of(PLACES, config)
    _, found, _ = in_numpy(places(plan, np.full(6, 12)))
    assert found.shape == (6, 12)
    for row in range(6):
        assert found[row].tolist() == oracle.predictors(12, events_of(plan, row))


def test_c19_positions_are_consecutive():
    """A row has no holes: the tokens and latents of its input sequence are 0 to L'-1, each once."""
    plan = plan_of(PLACES)
    tokens, _, total = in_numpy(places(plan, np.full(6, 12)))
    for row, first in enumerate(np.asarray(plan.start)):
        starts = zip(first.tolist(), plan.width[row].tolist(), strict=True)
        latents = [start + slot for start, width in starts for slot in range(width)]
        assert sorted([*tokens[row].tolist(), *latents]) == list(range(int(total[row])))


def test_c24_gathered_stream_is_the_concatenation():
    rng = np.random.default_rng(0)
    plan = plan_of(PLACES)
    vectors = rng.normal(size=(6, 12, 4)).astype(np.float32)
    latents = rng.normal(size=(6, 3, 3, 4)).astype(np.float32)
    inputs_embeds = np.asarray(jax.jit(assemble)(vectors, latents, plan))
    for row in range(6):
        widths = plan.width[row].tolist()
        events = [
            (point, latents[row, event, : widths[event]])
            for event, point in enumerate(plan.point[row].tolist())
            if point >= 0
        ]
        expected = oracle.concatenated(vectors[row], events)
        assert np.array_equal(inputs_embeds[row, : len(expected)], expected)


@jax.jit
def loss_of(made, tokens, loss_mask, plan):
    return sft_loss(made, tokens, loss_mask, plan)


@functools.partial(jax.jit, static_argnames=("chunk", "temperature"))
def scored(reasoner, hidden, tokens, **how):
    return token_log_probs(reasoner, hidden, tokens, SUPERVISED, **how)


@pytest.fixture(scope="module")
def hidden():
    return predictors(memgen_of(), TOKENS, plan_of(POINTS))


def test_c20_c25_loss_is_the_mean_over_tokens(hidden):
    made, plan = memgen_of(), plan_of(POINTS)
    total, weight = loss_of(made, TOKENS, SUPERVISED, plan)
    logits = np.asarray(made.reasoner.unembed(hidden), np.float64)

    def picked(logits):
        top = logits.max(axis=-1, keepdims=True)
        log_probs = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
        return np.take_along_axis(log_probs, np.asarray(TOKENS)[..., None], axis=2)[..., 0]

    mask = SUPERVISED
    assert weight == mask.sum() and len(set(mask.sum(axis=1))) == 3
    np.testing.assert_allclose(total / weight, -picked(logits)[mask].mean(), rtol=1e-6)
    of_rows = np.mean([-row[on].mean() for row, on in zip(picked(logits), mask, strict=True)])
    assert abs(of_rows - total / weight) > 1e-3
    for chunk in (1, 5, 12, 100):
        found = scored(made.reasoner, hidden, TOKENS, chunk=chunk)
        np.testing.assert_allclose(found, np.where(mask, picked(logits), 0), atol=1e-5)
    hot = scored(made.reasoner, hidden, TOKENS, temperature=2.0)
    np.testing.assert_allclose(hot, np.where(mask, picked(logits / 2), 0), atol=1e-5)


def test_c21_padding_and_unsupervised_targets_do_not_matter(hidden):
    made, plan = memgen_of(), plan_of(POINTS)
    # A target that is not supervised is anything at all, an ignore index too.
    garbage = np.where(SUPERVISED, TOKENS, -100)
    wanted = scored(made.reasoner, hidden, TOKENS, chunk=5)
    assert (scored(made.reasoner, hidden, garbage, chunk=5) == wanted).all()
    # A target that is supervised is an id of the vocabulary, also where no later token reads it.
    last = SUPERVISED & np.roll(~SUPERVISED, -1, axis=1)
    for wrong in (-1, VOCAB):
        found = scored(made.reasoner, hidden, np.where(last, wrong, TOKENS), chunk=5)
        assert (np.isnan(found) == last).all()
        assert np.isnan(loss_of(made, np.where(last, wrong, TOKENS), SUPERVISED, plan)[0])
    short = SUPERVISED & (np.arange(12) < 10)
    totals = []
    for fill in (TOKENS, random_tokens(3, 12, seed=9), 0, -100, VOCAB + 9):
        padded = np.where(np.arange(12) < 10, TOKENS, fill)
        totals.append(loss_of(made, padded, short, plan)[0])
    np.testing.assert_allclose(totals, [totals[0]] * 5, rtol=1e-6)


def test_c22_selected_points():
    marks, boundary = SUPERVISED, jnp.asarray(BOUNDARY)
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, VOCAB, (3, 12))
    tokens[:, 4:9] = [[6, 1, 6, 12, 2], [12, 18, 1, 6, 3], [1, 6, 6, 12, 12]]
    candidates = [
        [i for i in range(1, 12) if marks[row, i] and marks[row, i - 1]
         and BOUNDARY[tokens[row, i - 1]]]
        for row in range(3)
    ]  # fmt: skip
    assert min(map(len, candidates)) >= 3

    planned = jax.jit(plan_insertions, static_argnums=3)

    def points(count: int, key=None, **changes) -> list[list[int]]:
        config = dataclasses.replace(CONFIG, max_inference_events=count, **changes)
        plan = in_numpy(planned(tokens, SUPERVISED, boundary, config, key))
        assert plan.kind[:, 0].tolist() == [PROMPT] * 3
        assert (plan.kind[:, 1:] == INFERENCE).all()
        return [[p for p in row if p >= 0] for row in plan.point.tolist()]

    first = [3, 5, 2]
    for count in (0, 1, 2, 20):
        expected = [[s, *found[:count]] for s, found in zip(first, candidates, strict=True)]
        assert points(count) == expected
    key = jax.random.key(0)
    everywhere = points(20, key, insertion="random", insertion_prob=1.0)
    assert everywhere == points(20)
    assert points(20, key, insertion="random", insertion_prob=0.0) == [[s] for s in first]
    some = points(20, key, insertion="random", insertion_prob=0.5)
    assert everywhere != some != [[s] for s in first]
    with pytest.raises(ValueError, match="insertion='random' draws boundaries: pass a key"):
        points(2, insertion="random")
    check_one_response(SUPERVISED)
    for bad, count in ((SUPERVISED & False, 0), (SUPERVISED & (np.arange(12) != 7), 2)):
        with pytest.raises(ValueError, match=f"row 0 has {count} responses in its") as caught:
            check_one_response(bad)
        assert "\n" not in str(caught.value)


def test_random_places_are_the_rows_own():
    """Of the key and its text: not of its neighbours, nor of what it is padded with."""
    rng = np.random.default_rng(3)
    tokens = rng.choice(np.flatnonzero(BOUNDARY), (40, 24))
    loss_mask = np.broadcast_to((np.arange(24) >= 4) & (np.arange(24) < 20), tokens.shape)
    config = dataclasses.replace(CONFIG, max_inference_events=20, insertion="random")

    @jax.jit
    def drawn(key, tokens, loss_mask):
        return plan_insertions(tokens, loss_mask, BOUNDARY, config, key).point

    def points(*given):
        return np.asarray(drawn(*given)).tolist()

    key = jax.random.key(0)
    whole = points(key, tokens, loss_mask)
    assert points(key, tokens[::-1], loss_mask[::-1]) == whole[::-1]
    padded = np.pad(tokens, ((0, 0), (0, 9)), constant_values=5)
    padded[:, 20:] = rng.integers(1, VOCAB, padded[:, 20:].shape)
    assert points(key, padded, np.pad(loss_mask, ((0, 0), (0, 9)))) == whole
    assert len(set(map(tuple, whole))) == 40, "rows differ"
    assert points(jax.random.key(1), tokens, loss_mask) != whole
    rate = np.mean([len([p for p in row if p > 4]) for row in whole]) / 15
    assert abs(rate - 0.5) < 4 * (0.25 / (40 * 15)) ** 0.5


def test_the_plan_of_a_response_has_its_decisions():
    decisions = jnp.array([[1, -1, 0, 1, -1], [0, 1, -1, 1, -1], [1, -1, -1, -1, -1]], jnp.int8)
    plan = plan_from_decisions(decisions, jnp.array([4, 2, 7]), CONFIG)
    assert plan.point.tolist() == [[4, 7, -1], [-1, 3, 5], [7, -1, -1]]
    assert plan.kind.tolist() == [[PROMPT, INFERENCE, INFERENCE]] * 3
    assert plan.width.tolist() == [[3, 2, 0], [0, 2, 2], [3, 0, 0]]


def test_c23_batched_is_row_by_row():
    made = memgen_of()
    together = np.asarray(predictors(made, TOKENS, plan_of(POINTS)))
    for row, points in enumerate(POINTS):
        alone = np.asarray(predictors(made, TOKENS[row : row + 1], plan_of([points])))
        np.testing.assert_allclose(together[row, 1:], alone[0, 1:], atol=1e-5)


def test_points_of_a_plan_ascend():
    for points in ([[5, 3, -1]], [[3, 3, -1]], [[1, 2, 3], [4, -1, 4]]):
        with pytest.raises(ValueError, match=r"points \[.*\] of a plan do not ascend") as caught:
            plan_of(points)
        assert "\n" not in str(caught.value)
    assert plan_of([[3, -1, 5]]).start.tolist() == [[3, 0, 8]]


def test_a_plan_fits_its_memgen():
    """Wider than the weaver writes, or for other rows: one line each."""
    made = memgen_of()
    wide = plan_of(POINTS, weaver_config(prompt_latents=8))
    with pytest.raises(ValueError, match="a plan of 8 latents.* 3") as caught:
        made.weave(TOKENS, wide)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="plan of 2 rows for tokens of 3") as caught:
        made.weave(TOKENS, plan_of(POINTS[:2]))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="point 12 .* 12 tokens"):
        made.weave(TOKENS, plan_of([*POINTS[:2], [2, 12, -1]]))

"""Long prompts: read in blocks as if at once, without arrays of tokens by tokens, at any position.

Limits are lowered, so that short rows count as long; shapes are those of no other test, whose
programs were compiled under other limits.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from memgen_tiny import PROMPTS, memgen_of
from tiny import SMALL, by_reference, quick_model

from memgen import decoding
from memgen.decoding import begin
from memgen.request import pad_prompts, row_keys
from thoughtbubbles import PrefixRank, Thoughtbubbles, attention, prefill, ranking
from thoughtbubbles.decoding import generate
from thoughtbubbles.hatchling import Hatchling, HatchlingConfig
from thoughtbubbles.hatchling.attention import Reach, turns_of
from thoughtbubbles.positions import rotary_angles
from thoughtbubbles.ranking import at_least
from train.data import ByteTokenizer
from train.evaluation.scoring import Row, Scorer
from train.models.load import LanguageModel

PLAIN = dataclasses.replace(SMALL, vocab_size=257, fork_layers=(), num_layers=1, num_kv_heads=1)
FORKS = dataclasses.replace(SMALL, num_layers=1, fork_layers=(0,), policy=PrefixRank(1.5))
LENGTHS = np.array([75, 33, 1], np.int32)


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32 tokens for one row or more, for whatever is longer; tiles of 8 by 24."""
    for name, value in {"BLOCK": 32, "LARGEST_WHOLE": 0, "LONGEST_WHOLE": 0}.items():
        monkeypatch.setattr(prefill, name, value)
    for name, value in {"LARGEST_PROBABILITIES": 0, "QUERY_TILE": 8, "KEY_TILE": 24}.items():
        monkeypatch.setattr(attention, name, value)


def rows_of(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (3, 75)).astype(np.int32)


def hatchling() -> Hatchling:
    return Hatchling(HatchlingConfig(17, 8, 32, 1, 2, separator=3), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "config", [pytest.param(PLAIN, marks=pytest.mark.experiment), FORKS], ids=["plain", "forks"]
)
def test_blocks_give_the_logits_of_the_reference(config: Any, short_blocks):
    rows, told = rows_of(config.vocab_size), []
    model = quick_model(config)
    assert prefill.in_blocks(model, 3, 75) and not prefill.in_blocks(model, 3, 32)
    progress = lambda done, total: told.append((done, total))  # noqa: E731
    logits, cache = prefill.prefill(model, rows, LENGTHS, 96, progress)
    assert told == [(32, 75), (64, 75), (75, 75)]
    np.testing.assert_array_equal(cache.length, LENGTHS)
    for row, length in enumerate(LENGTHS):
        expected = by_reference(config, rows[row, :length].tolist()).logits[-1]
        np.testing.assert_allclose(logits[row], expected, atol=1e-4)


def test_a_state_is_read_in_blocks(short_blocks):
    model, rows = hatchling(), rows_of(17)
    expected = jax.jit(lambda model: model.logits_at(model.run(rows, LENGTHS), LENGTHS - 1))(model)
    logits, _ = prefill.prefill(model, rows, LENGTHS, 96)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_texts_and_scores_are_those_of_whole_rows(short_blocks):
    model = quick_model(PLAIN)
    lm, prompts = LanguageModel(model, ByteTokenizer()), rows_of(250)[:2].tolist()
    prompts[1] = prompts[1][:40]
    texts = generate(model, prompts, 3)
    scorer = Scorer(lm, 2, max_length=80, quiet=True)
    scores = scorer.score([Row(p + t, len(p) - 30) for p, t in zip(prompts, texts, strict=True)])
    for prompt, text, score in zip(prompts, texts, scores, strict=True):
        logits = by_reference(PLAIN, prompt + text).logits[len(prompt) - 31 : -1]
        assert logits[30:].argmax(axis=-1).tolist() == text
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        picked = log_probs[np.arange(33), (prompt + text)[len(prompt) - 30 :]]
        assert score.log_prob == pytest.approx(picked.sum(), abs=1e-4)
        assert score.tokens == 33 and not score.greedy


def test_a_session_is_begun_in_blocks(monkeypatch: pytest.MonkeyPatch):
    made, told = memgen_of(), []
    prompts = [*PROMPTS, PROMPTS[-1][:16]]
    tokens, length = pad_prompts(prompts, made.reasoner.vocab_size)
    args = made, tokens, length, row_keys(0, prompts), 64
    whole = begin(*args)
    monkeypatch.setattr(decoding, "LONGEST_WHOLE", 0)
    monkeypatch.setattr(decoding, "SMALLEST_BLOCK", 16)
    monkeypatch.setattr(decoding, "BLOCK", 16)
    blocks = begin(*args, progress=lambda done, total: told.append((done, total)))
    assert told == [(16, 37), (32, 37), (37, 37)]
    for name in ("tokens", "count", "vectors", "hidden"):
        if (expected := getattr(whole, name)) is not None:
            live = np.arange(expected.shape[1]) < length[:, None] if expected.ndim > 1 else True
            found = getattr(blocks, name)
            for rows in (found, expected):
                assert np.isfinite(rows).all()
            mask = np.reshape(live, np.shape(live) + (1,) * (expected.ndim - np.ndim(live)))
            np.testing.assert_allclose(found * mask, expected * mask, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(blocks.reasoner.length, whole.reasoner.length)
    np.testing.assert_allclose(blocks.reasoner.hidden, whole.reasoner.hidden, atol=1e-5)
    mesh = jax.make_mesh((2,), ("rows",), (AxisType.Auto,), devices=jax.devices()[:2])
    rows = jax.device_put(args[1:4], NamedSharding(mesh, PartitionSpec("rows")))
    split = begin(made, *rows, 64)
    assert split.tokens.sharding.shard_shape(split.tokens.shape)[0] == len(prompts) // 2
    sizes = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(split.reasoner)]
    assert sizes != [leaf.shape for leaf in jax.tree.leaves(split.reasoner)]
    traced = jax.jit(lambda length: begin(made, tokens, length, *args[3:]).count)(length)
    np.testing.assert_array_equal(traced, whole.count)


def test_tiles_are_the_softmax(short_blocks):
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=s) for s in ((2, 20, 4, 8), (2, 2, 50, 8), (2, 2, 50, 8)))
    bias, first = rng.normal(size=(2, 50)), np.array([30, 3])
    bias[0, :26] = -np.inf  # more than the first tile
    bias[1, 0] = np.nan  # a mistake that must be seen
    arrays = [np.float32(a) for a in (query, key, value, bias)]
    found = jax.jit(attention.attend_cached)(*arrays, first, jnp.array([20, 20]))
    key, value = (np.repeat(a, 2, axis=1) for a in (key, value))
    logits = np.einsum("bqhk,bhnk->bhqn", query / math.sqrt(8), key) + bias[:, None, None]
    last = first[:, None] + np.arange(20)
    logits = np.where(np.arange(50) <= last[:, None, :, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhqn,bhnk->bqhk", weights, value)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.isnan(found[1]).all()


def test_tiles_have_the_gradient_of_the_softmax(short_blocks, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    arrays = [np.float32(rng.normal(size=s))
              for s in ((2, 20, 4, 8), (2, 2, 50, 8), (2, 2, 50, 8), (2, 50))]  # fmt: skip
    weigh, first = rng.normal(size=arrays[0].shape), np.array([30, 3])

    def slopes() -> Any:
        weighed = lambda *floats: (attention.attend_cached(*floats, first) * weigh).sum()  # noqa: E731
        return jax.jit(jax.grad(weighed, (0, 1, 2, 3)))(*arrays)

    found = slopes()
    monkeypatch.setattr(attention, "LARGEST_PROBABILITIES", 2**30)
    for mine, other in zip(found, slopes(), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


def test_earlier_keys_win_ties(monkeypatch: pytest.MonkeyPatch):
    rows = [[3, 1, 2, *[-np.inf] * 3], [np.inf] * 2 + [-np.inf] * 4]
    keys: Any = np.array(rows, np.float32)
    new: Any = np.array([[2, 4, -np.inf], [np.inf, 0, -np.inf]], np.float32)
    used: Any = np.array([4, 2])  # the fourth key of row 0 is one that is -inf
    assert at_least(keys, used, new).tolist() == [[2, 0, 4], [2, 2, 2]]

    keys = np.round(np.random.default_rng(0).normal(size=(2, 30)), 1).astype(np.float32)
    token, index = np.repeat([np.arange(15)] * 2, 2, axis=1), np.array([[20, 21, 25, 26, 29]] * 2)
    new = [np.take_along_axis(rows, index, axis=1) for rows in (keys, token)]
    monkeypatch.setattr(ranking, "LARGEST_PAIRS", 60)  # two entries at a time
    few: Any = [jnp.asarray(rows) for rows in (keys, token, *new, index)]
    found = ranking.ranks_among(*few, window=5)
    for row, position in np.ndindex(index.shape):
        mine = index[row, position]
        here = (token[row] <= token[row, mine]) & (token[row] > token[row, mine] - 5)
        key = keys[row, mine]
        better = (keys[row] > key) | ((keys[row] == key) & (np.arange(30) < mine))
        assert found[row, position] == (here & better).sum()


@pytest.mark.parametrize(
    "config",
    [pytest.param(PLAIN, marks=pytest.mark.experiment), FORKS],
    ids=["plain", "forks"],
)
def test_no_array_of_tokens_by_tokens(config: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "LARGEST_PROBABILITIES", 2**20)
    tokens, size = 2**15, 64
    model = nnx.eval_shape(lambda: Thoughtbubbles(config, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(lambda: model.init_cache(1, tokens))
    shape, integer = jax.ShapeDtypeStruct, np.dtype("int32")
    logits = shape((1, config.vocab_size), np.float32)
    args = model, cache, logits, shape((1, size), integer), shape((1,), integer)
    compiled: Any = prefill._read_block.lower(*args).compile()
    shapes = re.findall(r"\b(?:f32|s32|pred)\[([\d,]+)\]", compiled.as_text())
    largest = max(math.prod(map(int, dims.split(","))) for dims in shapes)
    held = max(leaf.size for leaf in jax.tree.leaves(cache))
    assert largest <= max(held, 2**19) < size * tokens, "nothing is larger than the cache's arrays"
    memory = compiled.memory_analysis()
    own = sum(leaf.size * 4 for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= own, "the cache is extended where it is"
    assert memory.temp_size_in_bytes < 0.6 * own


def test_caches_of_long_texts_hold_little_more():
    for tokens in (5000, 16_128, 16_385, 100_128, 1_000_000):
        assert tokens <= prefill.long_cache(tokens) < 1.13 * tokens
    assert [prefill.block_size(rows) for rows in (1, 2, 3, 16, 64)] == [512, 256, 128, 32, 32]


def test_rotary_positions_are_exact_far_into_a_text():
    whole = np.array([[4095, 4096, 100_001, 131_071, 1_000_003, 16_777_217]], np.int32)
    part = np.array([[0, -1 / 3, -2 / 3, -1 / 7, -0.5, -1 / 3]], np.float32)
    exact = (whole + part.astype(np.float64))[..., None] * 1e4 ** (-np.arange(0, 64, 2) / 64)
    cos, sin = jax.jit(lambda w, p: rotary_angles(w, 64, 1e4, offset=p))(whole, part)
    error = np.maximum(np.abs(cos - np.cos(exact)), np.abs(sin - np.sin(exact))).max(axis=-1)[0]
    assert error[0] < 4095 * 2.0**-24 and (error[1:] < 5e-7).all(), error

    frequency = np.array([[0.1591, 0.01, 1e-4, 3e-8]], np.float32)  # turns of a Hatchling's neurons
    none: Any = jnp.zeros(())
    reach = Reach(jnp.asarray(whole), none, none, None, None, None, none, jnp.asarray(part))
    cos, sin = turns_of(reach, jnp.asarray(frequency))
    assert cos.shape == (1, 1, 6, 4)  # heads, rows, positions, neurons
    exact = 2 * np.pi * (whole + part.astype(np.float64))[..., None] * frequency.astype(float)
    error = np.maximum(np.abs(cos - np.cos(exact)), np.abs(sin - np.sin(exact)))[0, 0, 1:]
    assert (error < 1e-6).all(), error

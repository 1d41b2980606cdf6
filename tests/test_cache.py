"""Cached decoding is the blockwise forward pass, however a row is cut into chunks.

More models and 4096 steps: `python -m pytest -m experiment tests/test_cache.py`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BASE, VOCAB, forked, quick_model, random_tokens

from thoughtbubbles import ModelConfig, PrefixRank, Thoughtbubbles, Threshold, TopK, cache
from thoughtbubbles.bubbles import bubbles_of
from thoughtbubbles.cache import decode_step, extend, init_cache, prefill

ROWS, TOKENS, CHUNK = 14, 12, 5
TWO_FORKS = dataclasses.replace(BASE, num_layers=3, fork_layers=(1, 2), policy=PrefixRank(2.0))
LLAMA = {
    "norm": "rmsnorm", "mlp": "swiglu", "num_kv_heads": 1, "qk_norm": True, "tied_head": False,
    "biases": "qkv", "mlp_dim": 24, "head_dim": 10,
}  # fmt: skip
WITHOUT = {"value_scaling": False, "key_bias": False, "fractional_positions": False}
MODELS = {
    "plain": dataclasses.replace(TWO_FORKS, fork_layers=()),
    "copies": dataclasses.replace(TWO_FORKS, fork_layers=(), copies=3, merge="rightmost"),
    "rank": dataclasses.replace(BASE, policy=PrefixRank(1.5)),
    "window, burst": dataclasses.replace(
        TWO_FORKS,
        policy=PrefixRank(2.0, window=4, burst=2),
        merge="probability",
        score_originals=False,
    ),
    "threshold": dataclasses.replace(BASE, policy=Threshold(2.0, burst=2), merge="rightmost"),
    "no gate": dataclasses.replace(
        TWO_FORKS,
        policy=Threshold(2.0, gate=False, burst=1),
        scan_layers=True,
        score_originals=False,
    ),
    "llama": dataclasses.replace(
        TWO_FORKS, **LLAMA, merge="probability", remat="full", score_originals=False
    ),
    "without": dataclasses.replace(
        TWO_FORKS, **WITHOUT, policy=PrefixRank(3.0), fork_layers=(0, 2), score_bias="none"
    ),
}
# What a cache is tested with: every option in one of them at least, and fewer layers.
FEW: dict[str, Any] = {"num_layers": 2, "fork_layers": (0, 1)}
CACHED = {
    "plain": {**LLAMA, "num_layers": 2},
    "copies": {"num_layers": 2},
    "rank": {**FEW, "score_bias": "none", "scan_layers": True},
    "window, burst": {**FEW, "remat": "full", "score_bias": "none"},
    "threshold": {**FEW, **LLAMA},
    "no gate": {**FEW, **WITHOUT, "policy": Threshold(2.0, gate=False, burst=1, offset=0.2)},
}
CACHED = {name: dataclasses.replace(MODELS[name], **few) for name, few in CACHED.items()}


def model_of(name: str) -> Thoughtbubbles:
    """Thresholds low enough for some to fork thrice."""
    lower = lambda path, leaf: leaf / 3 if "threshold" in jax.tree_util.keystr(path) else leaf  # noqa: E731
    return jax.tree_util.tree_map_with_path(lower, quick_model(CACHED[name]))


@jax.jit
def blockwise(model: Thoughtbubbles, tokens: jax.Array):
    output = model.run(tokens)
    return model.logits(output.streams), [bubbles_of(streams) for streams in output.forks]


all_logits = jax.jit(Thoughtbubbles.logits)


def texts(num_tokens: int = TOKENS) -> np.ndarray:
    """Random rows, and two of one token repeated, where scores tie."""
    tokens = np.array(random_tokens(ROWS, num_tokens))
    tokens[3], tokens[ROWS - 1] = 4, 9
    return tokens


def assert_same_bubbles(found: cache.Trace, expected) -> None:
    for fork, (streams, score) in enumerate(expected):
        np.testing.assert_array_equal(found.streams[:, fork, :TOKENS], streams)
        np.testing.assert_allclose(found.score[:, fork, :TOKENS], score, atol=1e-5)


# No option that another one does not have; of "no gate" those are in `test_model_reference.py`.
EXPERIMENTS = ("plain", "rank", "no gate")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.experiment] * (name in EXPERIMENTS)) for name in CACHED],
)
def test_any_split_of_a_row_gives_the_blockwise_logits(name):
    model, tokens = model_of(name), texts()
    logits, bubbles = jax.tree.map(np.asarray, blockwise(model, tokens))
    if bubbles:
        counts = bubbles[-1][0]
        assert len(np.unique(counts)) > 2, "this model decides nothing"
    rows, rng = np.arange(ROWS), np.random.default_rng(0)

    # A prefill of 1, 2, ... 12 tokens, then single steps, in which rows rest now and then.
    length = 1 + rows % TOKENS
    last, filled = prefill(model, init_cache(model, ROWS, 16), tokens, length)
    np.testing.assert_allclose(last, logits[rows, length - 1], atol=1e-4)
    while (length < TOKENS).any():
        active = (length < TOKENS) & (rng.random(ROWS) < 0.8)
        at = np.minimum(length, TOKENS - 1)
        last, filled = decode_step(model, filled, tokens[rows, at], active)
        last = np.asarray(last)
        np.testing.assert_allclose(last[active], logits[rows, at][active], atol=1e-4)
        assert (last[active].argmax(axis=1) == logits[rows, at][active].argmax(axis=1)).all()
        assert (last[~active] == 0).all()
        length = length + active
        np.testing.assert_array_equal(filled.length, length)
    assert_same_bubbles(filled.trace, bubbles)

    # Chunks of random lengths from the first token on, some of them empty.
    length, chunked = np.zeros(ROWS, int), init_cache(model, ROWS, 16)
    while (length < TOKENS).any():
        size = np.minimum(rng.integers(0, CHUNK + 1, ROWS), TOKENS - length)
        at = np.minimum(length[:, None] + np.arange(CHUNK), TOKENS - 1)
        real = np.arange(CHUNK) < size[:, None]
        # Padding of an id that no vocabulary has, such as that of ignored labels.
        chunk = np.where(real, np.take_along_axis(tokens, at, axis=1), -100)
        streams, chunked = extend(model, chunked, chunk, size)
        found = np.asarray(all_logits(model, streams))
        np.testing.assert_allclose(found[real], logits[rows[:, None], at][real], atol=1e-4)
        length = length + size
    assert_same_bubbles(chunked.trace, bubbles)
    for ours, theirs in zip(chunked.forks, filled.forks, strict=True):
        np.testing.assert_array_equal(ours.used, theirs.used)


def test_a_long_cache_is_read_in_spans():
    """More slots than one span, so that steps go from one compiled span to the next."""
    config = dataclasses.replace(CACHED["window, burst"], fork_layers=(0,))
    model, tokens = quick_model(config), np.asarray(random_tokens(2, 300))
    logits = np.asarray(blockwise(model, tokens)[0])
    last, filled = prefill(model, init_cache(model, 2, 400), tokens[:, :100], np.array([90, 100]))
    np.testing.assert_allclose(last, logits[[0, 1], [89, 99]], atol=1e-4)
    found, filled = steps(model, filled, tokens[0, 90:290], tokens[1, 100:])
    assert (np.asarray(filled.forks[0].used) > 512).all()
    np.testing.assert_allclose(found, np.stack([logits[0, 90:290], logits[1, 100:]]), atol=1e-4)


@jax.jit
def steps(model, filled, *rows):
    """Logits `[B, N, V]` after each token of the rows, one at a time."""

    def step(filled, token):
        logits, filled = decode_step(model, filled, token)
        return filled, logits

    filled, logits = jax.lax.scan(step, filled, jnp.stack(rows, axis=1))
    return logits.swapaxes(0, 1), filled


@pytest.mark.experiment
def test_four_thousand_steps_end_where_the_blockwise_pass_does():
    config = ModelConfig(
        vocab_size=VOCAB, embed_dim=16, num_layers=1, num_heads=2, fork_layers=(0,),
        policy=PrefixRank(1.5, window=8),
    )  # fmt: skip
    model, tokens = quick_model(config), random_tokens(1, 4096)
    found, filled = steps(model, init_cache(model, 1, 4096), tokens[0])
    logits, [(streams, score)] = blockwise(model, tokens)
    np.testing.assert_allclose(found, logits, atol=1e-4)
    np.testing.assert_array_equal(filled.trace.streams[:, 0], streams)
    np.testing.assert_allclose(filled.trace.score[:, 0], score, atol=1e-5)
    assert int(streams.sum()) > 1.3 * 4096


def test_overflow_is_refused_before_any_work(monkeypatch):
    model = model_of("window, burst")
    filled = prefill(model, init_cache(model, ROWS, 16), texts())[1]
    monkeypatch.setattr(cache, "_extend", lambda *args: pytest.fail("it has begun"))
    with pytest.raises(ValueError, match="a row would grow to 17 tokens, the cache has max_tokens"):
        extend(model, filled, texts()[:, :CHUNK])
    with pytest.raises(ValueError, match="prefill of a row that has 12 tokens: use extend"):
        prefill(model, filled, texts()[:, :1])
    with pytest.raises(ValueError, match=r"lengths .*6.* of 5 tokens: choose 0 to 5"):
        extend(model, filled, texts()[:, :CHUNK], jnp.full(ROWS, 6))
    with pytest.raises(ValueError, match=r"lengths .*-2.* of 5 tokens: choose 0 to 5"):
        extend(model, filled, texts()[:, :CHUNK], jnp.full(ROWS, -2))
    with pytest.raises(ValueError, match=r"tokens \(2, 5\) for a cache of 14 rows"):
        extend(model, filled, texts()[:2, :CHUNK])


def test_overflow_under_a_trace_is_nan_for_good_and_for_its_row_alone():
    model, tokens, traced = model_of("window, burst"), texts(), jax.jit(prefill)
    expected = np.asarray(blockwise(model, tokens)[0])
    others = np.arange(ROWS) != 2
    length = np.where(others, 1, 3)
    last, filled = traced(model, init_cache(model, ROWS, 10), tokens[:, :3], length)
    np.testing.assert_allclose(last, expected[np.arange(ROWS), length - 1], atol=1e-4)
    rows = [row[n : n + 9] for row, n in zip(tokens, length, strict=True)]
    found = np.asarray(steps(model, filled, *rows)[0])
    np.testing.assert_allclose(found[others], expected[others, 1:10], atol=1e-4)
    np.testing.assert_allclose(found[2, :7], expected[2, 3:10], atol=1e-4)
    assert np.isnan(found[2, 7:]).all()

    length = np.where(others, 1, -1)
    wrong, filled = traced(model, init_cache(model, ROWS, 10), tokens[:, :3], length)
    after = np.asarray(steps(model, filled, *tokens[:, 1:10])[0])
    np.testing.assert_allclose(np.asarray(wrong)[others], expected[others, 0], atol=1e-4)
    np.testing.assert_allclose(after[others], expected[others, 1:10], atol=1e-4)
    assert np.isnan(wrong[2]).all() and np.isnan(after[2]).all(), "nothing has a negative length"


def test_a_cache_belongs_to_its_config():
    """Another budget midway would leave a past that the new policy did not decide."""
    model = model_of("window, burst")
    filled = prefill(model, init_cache(model, ROWS, 16), texts())[1]
    other = model.with_policy(PrefixRank(1.5))
    for call in (extend, prefill):
        with pytest.raises(
            ValueError, match="cache was made for policy=PrefixRank.*has policy="
        ) as e:
            call(other, filled, texts()[:, :1])
        assert "\n" not in str(e.value) and "ratio=2.0" in str(e.value) and "1.5" in str(e.value)
    scanned = dataclasses.replace(CACHED["window, burst"], scan_layers=True, remat="none")
    jax.eval_shape(decode_step, quick_model(scanned), filled, texts()[:, 0])


def test_top_k_can_not_be_cached():
    with pytest.raises(ValueError, match="looks at the whole row: use model.with_policy"):
        init_cache(quick_model(BASE), 1, 16)
    with pytest.raises(ValueError, match="max_tokens=0"):
        init_cache(quick_model(TWO_FORKS), 1, 0)


def test_with_policy_is_a_dial_on_the_same_arrays():
    trained, tokens, length = model_of("threshold"), random_tokens(4, TOKENS), np.full(4, TOKENS)
    alive = lambda model: np.asarray(forked(model, tokens, length)[-1][0].alive).sum()  # noqa: E731
    fewer = trained.with_policy(Threshold(2.0, offset=0.4))
    assert alive(fewer) < alive(trained) <= alive(trained.with_policy(Threshold(3.0, burst=2)))
    assert alive(trained.with_policy(TopK(1.0))) == 4 * TOKENS
    assert trained.config.policy == Threshold(2.0, burst=2) and fewer.config.policy.offset == 0.4
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (fewer, trained)), strict=True))
    ranked = trained.with_policy(PrefixRank(1.5))
    assert ranked.forks[0].threshold is None and trained.forks[0].threshold is not None
    with pytest.raises(ValueError, match="Threshold.* needs fork layers with a threshold, a model"):
        model_of("rank").with_policy(Threshold(1.5))

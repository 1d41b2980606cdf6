"""Generation, with a cache and by recomputation, and bubble maps."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import BASE, SMALL, VOCAB, bubbles_by_reference, by_reference, quick_model

from thoughtbubbles import PrefixRank, Thoughtbubbles, Threshold, decoding
from thoughtbubbles.bubbles import BubbleMap, bubble_map
from thoughtbubbles.decoding import generate, generate_with_bubbles

# Three rows, most of them of up to six tokens and six new ones: few shapes, so few programs.
PROMPTS = [[1, 2, 3], [5, 4, 5, 6, 7, 5], [7]]
# Weights and a head that choose texts of many tokens.
SEED, TOPK = 31, dataclasses.replace(SMALL, tied_head=False)
CAUSAL = dataclasses.replace(TOPK, policy=PrefixRank(2.0))
PLAIN = dataclasses.replace(TOPK, fork_layers=())
NEVER = [VOCAB, VOCAB]  # stops that never come, as many as tests have that do


def model_of(config):
    return quick_model(config, SEED)


def by_hand(config, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(by_reference(config, ids, SEED).logits[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "kind",
    ["residual", "probability", pytest.param("rightmost", marks=pytest.mark.experiment)],
)
def test_greedy_is_recomputation_by_hand(kind):
    config = dataclasses.replace(TOPK, merge=kind)
    found = generate(model_of(config), PROMPTS, 6)
    assert min(len(set(text)) for text in found) > 2
    assert found == [by_hand(config, prompt, 6) for prompt in PROMPTS]


DRAWN = {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "seed": 2}


# Without forks: `test_rl_sampler.py`.
@pytest.mark.parametrize(
    "config", [CAUSAL, pytest.param(PLAIN, marks=pytest.mark.experiment)], ids=["forks", "plain"]
)
def test_a_cache_changes_no_text(config):
    model = model_of(config)
    greedy = generate(model, PROMPTS, 9)
    assert greedy == [by_hand(config, prompt, 9) for prompt in PROMPTS]
    sampled = generate(model, PROMPTS, 9, **DRAWN)
    assert sampled == generate(model, PROMPTS, 9, cached=False, **DRAWN)
    assert sampled != greedy


def test_a_row_ends_where_it_would_end_alone():
    """Rows stop at different steps; those that are done wait for the others."""
    model = model_of(CAUSAL)
    draw = functools.partial(generate, model, max_new_tokens=12, temperature=2.0)
    free = draw(PROMPTS, stop=NEVER)
    stop = [free[0][1], free[1][5]]
    rows = draw(PROMPTS, stop=stop)
    ends = [next((i for i, t in enumerate(row) if t in stop), 11) + 1 for row in free]
    assert rows == [row[:end] for row, end in zip(free, ends, strict=True)]
    assert len(set(map(len, rows))) > 1
    for row, prompt in zip(rows, PROMPTS, strict=True):  # the same programs, other neighbours
        assert draw([[9] * 5, [2], prompt], stop=stop)[2] == row
    assert generate(model, PROMPTS, 0) == [[], [], []]


def test_bubbles_of_generated_text_are_those_of_the_text():
    model = model_of(CAUSAL)
    stop = generate(model, PROMPTS, 9, stop=NEVER)[1][4:6]
    found = generate_with_bubbles(model, PROMPTS, 9, stop=stop)
    assert [g.tokens for g in found] == generate(model, PROMPTS, 9, stop=stop)
    assert len({len(g.tokens) for g in found}) > 1
    for generation in found:
        streams, score = bubbles_by_reference(CAUSAL, generation.prompt + generation.tokens, SEED)
        np.testing.assert_array_equal(generation.streams, streams)
        np.testing.assert_allclose(generation.score, score, atol=1e-5)
    assert all(len(np.unique(g.streams)) > 1 for g in found[:2])
    assert generate_with_bubbles(model, PROMPTS, 0)[0].streams.shape == (2, 3)


def test_the_policy_is_a_dial():
    model = model_of(CAUSAL)
    more = generate_with_bubbles(model, PROMPTS, 9)
    less = generate_with_bubbles(model, PROMPTS, 9, policy=PrefixRank(1.0))
    assert all((g.streams == 1).all() for g in less)
    assert sum(g.streams[-1].sum() for g in more) > sum(g.streams[-1].sum() for g in less)
    assert generate(model, PROMPTS, 9, policy=PrefixRank(1.0)) == [g.tokens for g in less]
    with pytest.raises(ValueError, match="Threshold.* needs fork layers with a threshold"):
        generate(model, PROMPTS, 9, policy=Threshold(1.5))


def test_programs_are_compiled_for_buckets():
    """Prompts of up to 16 tokens, and texts of up to 64: one prefill and one loop."""
    model = model_of(dataclasses.replace(PLAIN, merge="rightmost"))  # nobody else's
    sizes = lambda: (decoding._begin._cache_size(), decoding._continue._cache_size())  # noqa: E731
    before = sizes()
    for length, new in ((1, 3), (9, 9), (16, 48)):
        generate(model, [[3] * length], new, stop=[0])
    assert sizes() == (before[0] + 1, before[1] + 1)
    generate(model, [[3] * 17], 40, stop=[0])
    assert sizes() == (before[0] + 2, before[1] + 1), "a longer prompt needs no other loop"


def test_nan_logits_are_an_error():
    """Of the row that has them; a row whose own tokens make no NaN goes on."""
    broken = model_of(PLAIN).with_policy(PLAIN.policy)
    broken.embed[...] = broken.embed[...].at[3].set(jnp.nan)
    for cached in (True, False):
        with pytest.raises(ValueError, match="prompt 0: the logits after 3 tokens are NaN"):
            generate(broken, PROMPTS, 9, cached=cached, **DRAWN)


def test_top_k_is_recomputed():
    for call in (
        lambda m: generate(m, [[1]], 2, cached=True),
        lambda m: generate_with_bubbles(m, [[1]], 2),
    ):
        with pytest.raises(
            ValueError, match="TopK.*can't be cached, its choice looks at the whole"
        ):
            call(model_of(BASE))


def test_unequal_prompts_give_what_each_gives_alone():
    model = model_of(TOPK)
    draw = functools.partial(generate, model, max_new_tokens=6, temperature=1.0)
    together = draw(PROMPTS, seed=3)
    assert draw(PROMPTS[1:2], seed=3) == together[1:2]
    for prompt, text in zip(PROMPTS, together, strict=True):  # other neighbours, another place
        assert draw([[9] * 6, [2], prompt], seed=3)[2] == text
    assert draw(PROMPTS, seed=4) != together


def test_equal_prompts_give_different_samples():
    rows = generate(model_of(TOPK), [[1] * 6] * 3, 6, temperature=2.0)
    assert len({tuple(row) for row in rows}) == 3


def test_equal_prompts_are_counted_by_their_ids():
    """Of any kind of array; comparing all pairs would take a minute."""
    prompts: Any = [(1, 2), jnp.array([1, 2]), [np.int64(1), 2], (3,), [jnp.array(1), 2]]
    keys = jax.random.key_data(decoding._row_keys(0, [tuple(prompt) for prompt in prompts]))
    assert len(np.unique(keys, axis=0)) == len(prompts)
    alone = jax.random.key_data(decoding._row_keys(0, [(1, 2)] * 4))
    np.testing.assert_array_equal(keys[jnp.array([0, 1, 2, 4])], alone)
    assert len(decoding._row_keys(0, [tuple(range(300))] * 4000)) == 4000


def test_different_prompts_draw_different_samples():
    """Rows of an untrained model agree as often as chance has it: no shared noise."""
    model = Thoughtbubbles(PLAIN, rngs=nnx.Rngs(0))
    rows = np.array(generate(model, [[a, 1] for a in range(8)], 20, temperature=1.0, cached=False))
    agree = [(rows[a] == rows[b]).mean() for a in range(8) for b in range(a)]
    assert np.mean(agree) < 0.2


def test_stop_ends_a_row_and_choices_bound_the_ids():
    model = model_of(TOPK)
    free = generate(model, PROMPTS, 6)[0]
    stop = free[2]
    stopped = generate(model, PROMPTS, 6, stop=[stop])[0]
    assert stopped == free[: free.index(stop) + 1]
    rows = generate(model, [[1] * 6, [2], [3]], 6, temperature=5.0, valid_vocab_size=4)
    assert max(map(max, rows)) < 4
    assert generate(model, [[1] * 12, [2], [3]], 0) == [[], [], []]
    assert generate(model, [], 3) == []


def test_prompt_mistakes():
    with pytest.raises(ValueError, match=f"token id {VOCAB}, vocab_size={VOCAB}"):
        generate(model_of(BASE), [[1], [VOCAB]], 2)
    with pytest.raises(ValueError, match="prompt 0 holds token id -3"):
        generate(model_of(BASE), [[-3, 1]], 2)
    with pytest.raises(ValueError, match="max_new_tokens=-2"):
        generate(model_of(BASE), [[1]], -2)
    with pytest.raises(ValueError, match="max_new_tokens=4294967296: choose from 0 to"):
        generate(model_of(BASE), [[1]], 2**32)
    with pytest.raises(ValueError, match="seed=9223372036854775808: .* at most 64 bits"):
        generate(model_of(BASE), [[1]], 2, seed=2**63)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generate(model_of(BASE), [[]], 2)
    with pytest.raises(ValueError, match=f"valid_vocab_size=0: .* to vocab_size={VOCAB}"):
        generate(model_of(BASE), [[1]], 2, valid_vocab_size=0)
    with pytest.raises(ValueError, match="valid_vocab_size=3.5: give a whole number"):
        generate(model_of(BASE), [[1]], 2, valid_vocab_size=3.5)  # pyright: ignore


IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def test_bubble_map_reads_the_streams():
    found = bubble_map(model_of(TOPK), IDS, [chr(97 + i) for i in IDS])
    streams, score = bubbles_by_reference(TOPK, IDS, SEED)
    assert found.streams.shape == found.score.shape == (2, 11)
    np.testing.assert_array_equal(found.streams, streams)
    np.testing.assert_allclose(found.score, score, atol=1e-5)
    assert found.tokens == tuple(chr(97 + i) for i in IDS) and found.fork_layers == (0, 1)


def test_each_block_of_a_bubble_map_is_of_the_fork_layer_before_it():
    streams, score = np.array([[1, 2], [3, 4]]), np.array([[0.5, 0.4], [0.3, 0.2]])
    config = dataclasses.replace(BASE, num_layers=5, fork_layers=(1, 3))
    found = BubbleMap.of(config, streams, score, ["a", "b"])
    assert found.streams.tolist() == [[1, 1], [1, 2], [1, 2], [3, 4], [3, 4]]
    np.testing.assert_allclose(found.score[:, 0], [1, 0.5, 0.5, 0.3, 0.3])


def test_bubble_map_in_a_terminal_and_as_a_figure(tmp_path):
    model = model_of(TOPK)
    whole = bubble_map(model, IDS, ["abc"] * 11)
    assert len(whole.text(width=20).split("\n\n")) == 3
    parts = {"streams": whole.streams[:, :3], "score": whole.score[:, :3]}
    found = dataclasses.replace(whole, **parts, tokens=("ab", "\n", "c"))
    lines = found.text(width=40).splitlines()
    assert lines[0] == "        ab⏎c"
    counts = found.streams[1]
    assert lines[2] == f"fork 1  {counts[0]} {counts[1]}{counts[2]}"
    many = dataclasses.replace(found, streams=np.array([[12, 4, 16]] * 2))
    assert many.text(width=40).splitlines()[:2] == ["        ab⏎ c", "fork 0  124 16"]
    assert found.figure().get_suptitle() == "Streams of each token, and their scores"
    found.figure().savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="2 ids and 1 texts"):
        bubble_map(model, [1, 2], ["a"])


@pytest.mark.parametrize(("count", "written"), [(60, ["0", "3"]), (100, [])])
def test_a_figure_has_a_colour_for_each_number_of_streams(count: int, written: list[str]):
    streams = np.ones((2, count), np.int32)
    streams[1, 4], streams[1, 7] = 3, 0
    score = np.where(streams > 0, 0.5, 0).astype(np.float32)
    figure = BubbleMap(streams, score, ("a",) * count, (1,)).figure("a run")
    assert figure.get_suptitle() == "a run"
    numbers, scores = figure.axes[:2]
    assert sorted(text.get_text() for text in numbers.texts) == written
    [image] = numbers.images
    assert len({image.to_rgba(n) for n in range(4)}) == image.cmap.N == 4
    assert numbers.get_xticks().tolist() == scores.get_xticks().tolist() == list(range(count))
    assert (np.asarray(image.get_array()) == streams).all()

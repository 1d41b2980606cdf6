"""Generation, with a cache and by recomputation, and bubble maps."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import BASE, VOCAB, heavy_model, logits_of, random_tokens, run

from thoughtbubbles import PrefixRank, Thoughtbubbles, Threshold, decoding
from thoughtbubbles.bubbles import BubbleMap, bubble_map
from thoughtbubbles.decoding import generate, generate_with_bubbles

PROMPTS = [[1, 2, 3], [5, 4, 5, 6, 7, 5], [7]]
CAUSAL = dataclasses.replace(BASE, num_layers=3, fork_layers=(1, 2), policy=PrefixRank(2.0))
PLAIN = dataclasses.replace(CAUSAL, fork_layers=())


def by_hand(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_of(model, jnp.array([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["residual", "probability", "rightmost"])
def test_greedy_is_recomputation_by_hand(kind):
    model = heavy_model(dataclasses.replace(BASE, merge=kind))
    assert generate(model, PROMPTS, 4) == [by_hand(model, prompt, 4) for prompt in PROMPTS]


@pytest.mark.parametrize("config", [CAUSAL, PLAIN], ids=["forks", "plain"])
def test_a_cache_changes_no_text(config):
    model, prompts = heavy_model(config), [*PROMPTS[:2], [4, 4, 4, 4]]
    assert generate(model, prompts, 9) == generate(model, prompts, 9, cached=False)
    drawn = {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "seed": 2}
    sampled = generate(model, prompts, 9, **drawn)
    assert sampled == generate(model, prompts, 9, cached=False, **drawn)
    assert sampled != generate(model, prompts, 9)


def test_a_row_ends_where_it_would_end_alone():
    """Rows stop at different steps; those that are done wait for the others."""
    model = heavy_model(CAUSAL)
    draw = functools.partial(generate, model, max_new_tokens=12, temperature=2.0)
    free = draw(PROMPTS)
    stop = [free[0][1], free[1][5]]
    rows = draw(PROMPTS, stop=stop)
    ends = [next((i for i, t in enumerate(row) if t in stop), 11) + 1 for row in free]
    assert rows == [row[:end] for row, end in zip(free, ends, strict=True)]
    assert len(set(map(len, rows))) > 1
    for row, prompt in zip(rows, PROMPTS, strict=True):  # the same programs, other neighbours
        assert draw([[9] * 5, [2], prompt], stop=stop)[2] == row
    assert generate(model, PROMPTS, 0) == [[], [], []]


def test_bubbles_of_generated_text_are_those_of_the_text():
    model = heavy_model(CAUSAL)
    stop = generate(model, PROMPTS, 9)[1][4:5]
    found = generate_with_bubbles(model, PROMPTS, 9, stop=stop)
    assert [g.tokens for g in found] == generate(model, PROMPTS, 9, stop=stop)
    for generation in found:
        ids = generation.prompt + generation.tokens
        texts = [chr(97 + token) for token in ids]
        ours = BubbleMap.of(model.config, generation.streams, generation.score, texts)
        theirs = bubble_map(model, ids, texts)
        np.testing.assert_array_equal(ours.streams, theirs.streams)
        np.testing.assert_allclose(ours.score, theirs.score, atol=1e-5)
        assert ours.tokens == theirs.tokens and ours.fork_layers == theirs.fork_layers
    assert all(len(np.unique(g.streams)) > 1 for g in found[:2])
    assert generate_with_bubbles(model, PROMPTS, 0)[0].streams.shape == (2, 3)


def test_the_policy_is_a_dial():
    model = heavy_model(CAUSAL)
    more = generate_with_bubbles(model, PROMPTS, 9, policy=PrefixRank(3.0))
    less = generate_with_bubbles(model, PROMPTS, 9, policy=PrefixRank(1.0))
    assert all((g.streams == 1).all() for g in less)
    assert sum(g.streams[-1].sum() for g in more) > sum(g.streams[-1].sum() for g in less)
    assert generate(model, PROMPTS, 9, policy=PrefixRank(1.0)) == [g.tokens for g in less]
    with pytest.raises(ValueError, match="Threshold.* needs fork layers with a threshold"):
        generate(model, PROMPTS, 9, policy=Threshold(1.5))


def test_programs_are_compiled_for_buckets():
    """Prompts of up to 16 tokens, and texts of up to 64: one prefill and one loop."""
    model = heavy_model(dataclasses.replace(CAUSAL, merge="rightmost"))
    sizes = lambda: (decoding._begin._cache_size(), decoding._continue._cache_size())  # noqa: E731
    before = sizes()
    for length, new in ((1, 3), (9, 9), (16, 48)):
        generate(model, [[3] * length], new, stop=[0])
    assert sizes() == (before[0] + 1, before[1] + 1)
    generate(model, [[3] * 17], 40, stop=[0])
    assert sizes() == (before[0] + 2, before[1] + 1), "a longer prompt needs no other loop"


def test_nan_logits_are_an_error():
    """A row whose own tokens make no NaN goes on; the embedding is the head too, so none does."""
    broken = heavy_model(PLAIN).with_policy(PLAIN.policy)
    broken.embed[...] = broken.embed[...].at[3].set(jnp.nan)
    for cached in (True, False):
        with pytest.raises(ValueError, match="prompt 0: the logits after 3 tokens are NaN"):
            generate(broken, PROMPTS, 9, cached=cached)


def test_top_k_is_recomputed():
    for call in (
        lambda m: generate(m, [[1]], 2, cached=True),
        lambda m: generate_with_bubbles(m, [[1]], 2),
    ):
        with pytest.raises(
            ValueError, match="TopK.*can't be cached, its choice looks at the whole"
        ):
            call(heavy_model(BASE))


def test_unequal_prompts_give_what_each_gives_alone():
    model = heavy_model(BASE)
    together = generate(model, PROMPTS, 6, temperature=1.0, seed=3)
    assert together == [generate(model, [p], 6, temperature=1.0, seed=3)[0] for p in PROMPTS]
    assert generate(model, PROMPTS, 6, temperature=1.0, seed=4) != together


def test_equal_prompts_give_different_samples():
    rows = generate(heavy_model(BASE), [[1]] * 4, 8, temperature=2.0)
    assert len({tuple(row) for row in rows}) == 4


def test_different_prompts_draw_different_samples():
    """Rows of an untrained model agree as often as chance has it: no shared noise."""
    model = Thoughtbubbles(BASE, rngs=nnx.Rngs(0))
    rows = np.array(generate(model, [[a, 1] for a in range(8)], 20, temperature=1.0))
    agree = [(rows[a] == rows[b]).mean() for a in range(8) for b in range(a)]
    assert np.mean(agree) < 0.2


def test_stop_ends_a_row_and_choices_bound_the_ids():
    model = heavy_model(BASE)
    [free] = generate(model, [[1, 2]], 6)
    stop = free[2]
    [stopped] = generate(model, [[1, 2]], 6, stop=[stop])
    assert stopped == free[: free.index(stop) + 1]
    rows = generate(model, PROMPTS, 20, temperature=5.0, choices=4)
    assert max(map(max, rows)) < 4
    assert generate(model, [[1]], 0) == [[]]
    assert generate(model, [], 3) == []


def test_prompt_mistakes():
    with pytest.raises(ValueError, match=f"token id {VOCAB}, vocab_size={VOCAB}"):
        generate(heavy_model(BASE), [[1], [VOCAB]], 2)
    with pytest.raises(ValueError, match="prompt 0 holds token id -3"):
        generate(heavy_model(BASE), [[-3, 1]], 2)
    with pytest.raises(ValueError, match="max_new_tokens=-2"):
        generate(heavy_model(BASE), [[1]], -2)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generate(heavy_model(BASE), [[]], 2)
    with pytest.raises(ValueError, match=f"choices=0: choose from 1 to vocab_size={VOCAB}"):
        generate(heavy_model(BASE), [[1]], 2, choices=0)


def test_bubble_map_reads_the_streams():
    model, ids = heavy_model(BASE), random_tokens(1, 11)[0].tolist()
    found = bubble_map(model, ids, [chr(97 + i) for i in ids])
    forks = run(model, jnp.array([ids])).forks
    assert found.streams.shape == found.score.shape == (4, 11)
    assert (found.streams[0] == 1).all() and (found.score[0] == 1).all()
    for layer, streams in zip(BASE.fork_layers, forks, strict=True):
        tokens = np.asarray(streams.token[0])[np.asarray(streams.alive[0])]
        assert (found.streams[layer] == np.bincount(tokens, minlength=11)).all()
    assert (found.score[3] < found.score[1]).all()


def test_bubble_map_in_a_terminal_and_as_a_figure(tmp_path):
    model = heavy_model(BASE)
    found = bubble_map(model, [1, 2, 3], ["ab", "\n", "c"])
    lines = found.text(width=40).splitlines()
    assert lines[0] == "        ab⏎c"
    counts = found.streams[1]
    assert lines[1] == f"fork 1  {counts[0]} {counts[1]}{counts[2]}"
    assert len(bubble_map(model, [1] * 9, ["abc"] * 9).text(width=20).split("\n\n")) == 3
    many = dataclasses.replace(found, streams=np.array([[12, 4, 16]] * 4))
    assert many.text(width=40).splitlines()[:2] == ["        ab⏎ c", "fork 1  124 16"]
    found.figure().savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="2 ids and 1 texts"):
        bubble_map(model, [1, 2], ["a"])

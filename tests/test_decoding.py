"""Generation by recomputation, and bubble maps."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import BASE, VOCAB, heavy_model, logits_of, random_tokens, run

from thoughtbubbles import Thoughtbubbles
from thoughtbubbles.bubbles import bubble_map
from thoughtbubbles.decoding import generate

PROMPTS = [[1, 2, 3], [5, 4, 5, 6, 7, 5], [7]]


def by_hand(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_of(model, jnp.array([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["residual", "probability", "rightmost"])
def test_greedy_is_recomputation_by_hand(kind):
    model = heavy_model(dataclasses.replace(BASE, merge=kind))
    assert generate(model, PROMPTS, 4) == [by_hand(model, prompt, 4) for prompt in PROMPTS]


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

"""Scores of continuations: by brute force, whatever shares the batch, however long the text."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest
from letters import Letters
from tiny import SMALL, by_reference, quick_model

from thoughtbubbles import ModelConfig, PrefixRank, Threshold, TopK
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.evaluation.scoring import Row, Score, Scorer, score_rows
from train.models.load import LanguageModel, load_weights

WIDTH = 16
PLAIN = dataclasses.replace(SMALL, fork_layers=())


def language_model(config: ModelConfig) -> LanguageModel:
    return LanguageModel(quick_model(config), Letters())


def logits_before(config: ModelConfig, ids: list[int], place: int) -> np.ndarray:
    """Logits `[V]` of `ids[place]`, by the reference from nothing but what stands before it."""
    return by_reference(config, ids[:place]).logits[-1]


def brute_force(config: ModelConfig, row: Row) -> Score:
    total, greedy = 0.0, True
    for place in range(row.start, len(row.ids)):
        logits = logits_before(config, row.ids, place)
        total += logits[row.ids[place]] - np.log(np.exp(logits).sum())
        greedy &= int(logits.argmax()) == row.ids[place]
    return Score(float(total), greedy, len(row.ids) - row.start)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(SMALL, policy=PrefixRank(1.5, window=3)),
        SMALL,
        # `python -m pytest -m experiment tests/test_scoring.py`
        *(
            pytest.param(config, marks=pytest.mark.experiment)
            for config in (
                PLAIN,
                dataclasses.replace(SMALL, policy=Threshold(1.5)),
                dataclasses.replace(SMALL, merge="probability"),
            )
        ),
    ],
    ids=lambda config: f"{config.policy}-{config.merge}-{len(config.fork_layers)}",
)
def test_scores_are_brute_force(config):
    pairs = [
        ("abc de", " fgh"),
        ("o", "nm lkj ihg"),
        ("", "abc"),
        ("ab  ", "c"),
        ("", "cabdefghonmlk"),
    ]
    scorer = Scorer(language_model(config), batch_size=4)
    rows = [scorer.row(*pair) for pair in pairs]
    rows.append(Row([16, *greedy_text(config)], 1))
    assert max(len(row.ids) for row in rows) - 1 <= WIDTH
    scores, wanted = scorer.score(rows), [brute_force(config, row) for row in rows]
    assert [score[1:] for score in scores] == [score[1:] for score in wanted]
    assert [s.log_prob for s in scores] == pytest.approx([w.log_prob for w in wanted], abs=1e-4)
    assert [score.greedy for score in scores][-1] and not scores[0].greedy
    assert scorer(pairs) == scores[:-1]


def greedy_text(config: ModelConfig) -> list[int]:
    ids = [16]
    for _ in range(4):
        ids.append(int(logits_before(config, ids, len(ids)).argmax()))
    return ids[1:]


def test_a_row_does_not_depend_on_its_batch():
    """Nor on its place in it: other lengths, other companions, alone."""
    scorer = Scorer(language_model(PLAIN), batch_size=4)
    rng = np.random.default_rng(0)
    rows = [Row(rng.integers(0, 17, n).tolist(), int(rng.integers(1, n))) for n in range(2, 40)]
    whole, alone = scorer.score(rows), [scorer.score([row])[0] for row in rows]
    mixed = rng.permutation(len(rows))
    back = np.argsort(mixed)
    shuffled = scorer.score([rows[index] for index in mixed])
    for found in (alone, [shuffled[index] for index in back]):
        assert [score[1:] for score in found] == [score[1:] for score in whole]
        assert [s.log_prob for s in found] == pytest.approx(
            [s.log_prob for s in whole], rel=1e-6, abs=1e-6
        )


def test_programs_are_few():
    """One for each power of two in length, however many lengths there are."""
    before = score_rows._cache_size()
    scorer = Scorer(language_model(PLAIN), batch_size=3, max_length=50)
    scorer.score([Row([0] * length, 1) for length in range(2, 52)])
    assert score_rows._cache_size() - before == 3  # 16, 32, and 50 itself
    scorer.score([Row([1] * 20, start) for start in range(1, 20)])
    assert score_rows._cache_size() - before == 3


def test_spaces_go_to_the_continuation_and_the_whole_is_encoded():
    scorer = Scorer(load_weights("tests/fixtures/pretrained/llama"))
    tokenizer = scorer._lm.tokenizer
    words = lambda ids: [tokenizer.decode([token]) for token in ids]  # noqa: E731
    row = scorer.row("in ", "the end")
    assert words(row.ids[row.start :]) == [" the", " ", "e", "n", "d"]
    assert scorer.row("in", " the end") == row
    assert row.start == len(scorer.encode("in")) and row.ids[: row.start] == scorer.encode("in")
    for nothing in ("", "  "):
        row = scorer.row(nothing, "the")
        assert row.ids[: row.start] == scorer.encode("") == [tokenizer.separator]
        assert tokenizer.decode(row.ids) == nothing + "the"
    with pytest.raises(ValueError, match="'h' of 't' has no token of its own"):
        scorer.row("t", "h")
    with pytest.raises(ValueError, match="'' of 'the' has no token of its own: it is empty"):
        scorer.row("the", "")


def test_a_token_that_ends_every_text_is_left_out():
    tokenizers = pytest.importorskip("tokenizers")
    lm = load_weights("tests/fixtures/pretrained/llama")
    tokenizer: Any = lm.tokenizer
    end = tokenizer.eos
    ending = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    ending.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.id(end))]
    )
    ended = PretrainedTokenizer(ending.to_str(), stop_tokens=[end])
    scorer, plain = Scorer(LanguageModel(lm.model, ended)), Scorer(lm)
    assert ended.prompt("in") == tokenizer.prompt("in") and ended.prompt("") == [ended.separator]
    assert scorer.row("in", " the end") == plain.row("in", " the end")
    assert scorer.row("", "the").ids == [ended.separator, *plain.row("", "the").ids[1:]]


def test_long_contexts_lose_their_beginning():
    """The model reads `max_length` ids, and the last one is scored, not read."""
    scorer = Scorer(language_model(PLAIN), max_length=8)
    assert scorer.row("abcdefg", "h") == Row([16, *range(8)], 8) and scorer.truncated == 0
    assert scorer.row("abcdefgh", "ij") == Row([*range(1, 10)], 7) and scorer.truncated == 1
    [score], [wanted] = scorer([("abcdefghij", "klm")]), scorer.score([Row([*range(4, 13)], 6)])
    assert score == wanted
    with pytest.raises(ValueError, match="has 9 tokens, the model reads 8 at a time"):
        scorer.row("a", "bcdefghij")
    with pytest.raises(ValueError, match="batch_size=16 max_length=0: choose 1 or more"):
        Scorer(language_model(PLAIN), max_length=0)


@pytest.mark.parametrize("policy", [None, TopK(1.5)], ids=str)
def test_rolling_scores_each_token_once_with_all_the_context_there_is_room_for(policy):
    config = PLAIN if policy is None else dataclasses.replace(SMALL, policy=policy)
    scorer = Scorer(language_model(config), max_length=4)
    text = "abcdefghij"
    windows = [Row([16, 0, 1, 2, 3], 1), Row([3, 4, 5, 6, 7], 1), Row([5, 6, 7, 8, 9], 3)]
    long, nothing, short = scorer.rolling([text, "", "ab"])
    assert long.log_prob == pytest.approx(sum(s.log_prob for s in scorer.score(windows)), rel=1e-6)
    assert long.tokens == 10 and nothing == Score(0, True, 0)
    assert short == scorer([("", "ab")])[0]
    assert Scorer(language_model(config)).rolling([text])[0].log_prob != pytest.approx(
        long.log_prob
    )


def test_nan_is_told():
    broken = jax.tree.map(lambda leaf: leaf * math.nan, quick_model(PLAIN))
    with pytest.raises(ValueError, match="the logits are NaN"):
        Scorer(LanguageModel(broken, Letters()))([("a", "b")])

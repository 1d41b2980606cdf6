"""Label shares: the paper's table, weights that hit targets, rules and classifier, the command."""

import itertools
import json
import shlex
import sys

import numpy as np
import pytest

from train import mixture
from train.cli.command import run_command
from train.data import DataError
from train.data.labels import (
    Classifier,
    Segment,
    by_rules,
    divided,
    read_labelled,
    score,
    segments,
    standard_library_segments,
)
from train.data.mixture import parse_mixture
from train.data.shares import label_shares, solve_weights, with_share
from train.mixture import MixtureConfig, readable

# arXiv 2509.26625: share of segments, source by source.
MATRIX = {
    "web": {"reasoning": 0.100, "visual": 0.269},
    "encyclopedia": {"reasoning": 0.034, "visual": 0.124},
    "academic": {"reasoning": 0.833, "visual": 0.053},
    "literature": {"reasoning": 0.091, "visual": 0.335},
    "math": {"reasoning": 0.929, "visual": 0.080},
    "code": {"reasoning": 0.973, "visual": 0.037},
}
MIX0 = dict(zip(MATRIX, (0.5, 0.025, 0.025, 0.2, 0.05, 0.2), strict=True))
MIXED = {"reasoning": 0.5, "visual": 0.16}
MIX6 = dict(zip(MATRIX, (0.4, 0.08, 0.05, 0.02, 0.1, 0.35), strict=True))


@pytest.mark.parametrize(
    ("weights", "reasoning", "visual"), [(MIX0, 0.331, 0.217), (MIX6, 0.520, 0.148)]
)
def test_shares_of_the_papers_mixtures(weights, reasoning, visual):
    shares = label_shares(weights, MATRIX)
    assert shares["reasoning"] == pytest.approx(reasoning, abs=5e-4)
    assert shares["visual"] == pytest.approx(visual, abs=5e-4)


def test_weights_that_hit_their_targets_are_those_nearest_to_preferred_ones():
    assert solve_weights(MATRIX, {"reasoning": 0.6, "visual": 0.15}, near=MIX6).distance < 1e-6
    solution = solve_weights(MATRIX, MIXED, near=MIX6)
    assert solution.distance < 1e-6 and sum(solution.weights.values()) == pytest.approx(1)
    # The reference: least squares with equality constraints; no weight is 0 here.
    names = list(MATRIX)
    rows = np.array([[MATRIX[n][label] for n in names] for label in MIXED] + [[1.0] * len(names)])
    start = np.array([MIX6[n] for n in names])
    step = np.linalg.lstsq(rows, np.array([0.5, 0.16, 1.0]) - rows @ start, rcond=None)[0]
    assert (start + step).min() > 0
    found = np.array([solution.weights[n] for n in names])
    np.testing.assert_allclose(found, start + step, atol=1e-5)
    for factor in (100, 0.01, 1e307):  # per cent, or counts: proportions are what matters
        near = {name: factor * weight for name, weight in MIX6.items()}
        scaled = solve_weights(MATRIX, MIXED, near=near).weights
        assert scaled == pytest.approx(solution.weights, abs=1e-9)
    same = solve_weights(MATRIX, label_shares(MIX0, MATRIX), near=MIX0)
    assert same.weights == pytest.approx(MIX0, abs=1e-6)


@pytest.mark.parametrize("wanted", [(0.9, 0.4), (0.0, 0.0), (1.0, 0.0), (0.2, 0.9)])
def test_what_cannot_be_hit_is_missed_by_as_little_as_can_be(wanted):
    """No pair or triple of sources on a fine grid comes nearer."""
    targets = dict(zip(("reasoning", "visual"), wanted, strict=True))
    solution = solve_weights(MATRIX, targets)
    corners = np.array([[s["reasoning"], s["visual"]] for s in MATRIX.values()])
    grid = [(a, b, 50 - a - b) for a in range(51) for b in range(51 - a)]
    best = min(
        np.linalg.norm(np.array(grid) / 50 @ corners[list(three)] - wanted, axis=1).min()
        for three in itertools.combinations(range(6), 3)
    )
    found = np.array([solution.shares["reasoning"], solution.shares["visual"]])
    assert np.linalg.norm(found - wanted) <= best + 1e-6
    assert solution.distance == pytest.approx(np.abs(found - wanted).max())
    assert min(solution.weights.values()) >= 0


def test_a_category_gets_its_share_and_the_rest_keeps_its_proportions():
    for share in (0, 0.25, 0.5, 0.75, 1):
        weights = with_share(MIX0, ["math", "code"], share)
        assert sum(weights.values()) == pytest.approx(1)
        assert weights["math"] + weights["code"] == pytest.approx(share)
        assert weights["code"] == pytest.approx(4 * weights["math"])
        assert weights["web"] == pytest.approx(2.5 * weights["literature"])
        assert weights == with_share(MIX0, ["math", "code", "math"], share)
    tiny = with_share({"a": 1.0, "b": 1e-17}, ["a"], 0.5)  # too little to change the sum
    assert tiny == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solve_weights(MATRIX, {"visual": 1.2}), "a share of 1.2 of visual"),
        (lambda: solve_weights(MATRIX, {"auditory": 0.2}), "no source has the label auditory"),
        (lambda: solve_weights(MATRIX, {}), "no share is wanted: give that of one of"),
        (lambda: solve_weights(MATRIX, {"visual": 0.2}, {"x": 1}), "no source x to prefer: choose"),
        (lambda: solve_weights(MATRIX, MIXED, {"web": -1}), "a preferred weight of -1 of web"),
        (lambda: solve_weights(MATRIX, MIXED, {"web": np.nan}), "a preferred weight of nan of web"),
        (lambda: solve_weights(MATRIX, MIXED, {"web": 0}), "all preferred weights are 0: give a"),
        (lambda: solve_weights(MATRIX, MIXED, {}), "all preferred weights are 0: give a"),
        (lambda: with_share(MIX0, ["maths"], 0.5), "no source maths in the mixture"),
        (lambda: with_share({"a": 0.1, "b": 0.2, "c": 0.7}, ["c", "b", "a"], 0.5), "no proportion"),
        (lambda: with_share(MIX0, ["math"], 2), "a share of 2 of math"),
        (lambda: with_share({"a": 1, "b": 0}, ["b"], 0.5), "have weight 0"),
        (lambda: divided([Segment("one", frozenset())]), "cannot be divided"),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(DataError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_segments_cover_documents():
    assert list(segments(["abcdefghij", "k", " " * 9], 4)) == ["abcd", "efgh", "ij"]
    short = ["a", "bcdefg", " ", "h", "i"]  # "a", "h" and "i" are one text
    assert list(segments(short, 4)) == ["bcde", "fg", "a\n\nh"]
    assert list(segments(["a", "h", "i"], 6)) == ["a\n\nh\n\n"]


def test_scores():
    assert score([True, True, False, False], [True, False, True, False]).accuracy == 0.5
    assert score([True, True, False, False], [True, False, True, False]).f1 == 0.5
    assert score([False], [False]).f1 == 0 and score([True], [True]).f1 == 1


def test_rules_know_clear_cases():
    proof = "Suppose x = 2. Then x + x = 4, because 2 + 2 = 4; hence, if y = x, then y + y = 4."
    scene = "The tall man looked at the dark sky; a red light gleamed above the long white house."
    assert by_rules(proof, "reasoning") and not by_rules(proof, "visual")
    assert by_rules(scene, "visual") and not by_rules(scene, "reasoning")


def test_the_classifier_beats_the_more_frequent_answer_on_held_out_segments():
    """Python's tokenizer says which segments of the standard library are prose."""
    examples = standard_library_segments(300)
    train, held_out = divided(examples)
    classifier = Classifier(train, ["code", "prose"])
    has = ["prose" in example.labels for example in held_out]
    most = max(sum(has), len(has) - sum(has)) / len(has)
    found = score(["prose" in classifier(example.text) for example in held_out], has)
    assert found.accuracy > most + (1 - most) / 3, (found, most)
    assert not {e.text for e in train} & {e.text for e in held_out}


def test_the_command_prints_accuracy_shares_and_a_corpus(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    texts = {
        "sums": lambda: " ".join(f"{a} + {b} = {a + b};" for a, b in rng.integers(0, 9, (60, 2))),
        "scenes": lambda: " ".join(rng.choice([*"ab", "red", "ball", "blue", "sky", "on"], 120)),
    }
    lines = []
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        for number in range(20):
            (tmp_path / name / f"{number}.txt").write_text(text() * 3)
        label = {"sums": "reasoning", "scenes": "visual"}[name]
        lines += [{"text": text(), "labels": [label]} for _ in range(40)]
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--sources", f"{tmp_path}/sums", f"{tmp_path}/scenes", "--segments", "20"]
    words += ["--shares", "reasoning=0.7", "--cache-dir", f"{tmp_path}/cache"]
    for more in ([], ["--labelled", str(labelled)]):
        monkeypatch.setattr(sys, "argv", ["mixture", *words, *more])
        run_command(mixture.main, MixtureConfig)
        shown = capsys.readouterr().out
        assert (
            f"""--data.corpus 'mix({{"{tmp_path}/sums": 0.7, "{tmp_path}/scenes": 0.3}})'"""
            in shown
        )
        assert "the nearest mixture has reasoning 70.0%: it hits" in shown
    monkeypatch.setattr(sys, "argv", ["mixture", *words, "--shares", "reasonings=0.7"])
    with pytest.raises(SystemExit):  # before anything is labelled
        run_command(mixture.main, MixtureConfig)
    told = capsys.readouterr()
    assert "no source has the label reasonings: choose from code, prose" in told.err
    assert "shares of labels" not in told.out
    assert "reasoning: classifier 100.0% right (F1 1.00), rules 100.0%" in shown
    labelled.write_text('{"text": "a", "labels": "visual"}\n')
    with pytest.raises(DataError, match="line 1: the field \"labels\" is 'visual': give a list"):
        read_labelled(labelled)
    for options, message in (
        ({}, "nothing to do"),
        ({"shares": ("a=1",), "labelled": "x"}, "name"),
        ({"shares": ("a=.1", "a=.2"), "sources": ("x",)}, "shares name a twice"),
    ):
        with pytest.raises(ValueError, match=message):
            MixtureConfig(**options)


@pytest.mark.parametrize("name", ["files(path='/a b')", 'files(path="/x")', "~/it's", "stdlib"])
def test_the_line_to_paste_is_read_by_the_shell_and_back(name: str):
    matrix = {name: {"a": 1.0}, "other": {"a": 0.0}}
    shown = readable(solve_weights(matrix, {"a": 0.5}), {"a": 0.5}).splitlines()[-1]
    option, corpus = shlex.split(shown)
    assert option == "--data.corpus" and list(parse_mixture(corpus).sources) == [name, "other"]

"""The study of what text teaches about images: a tiny run that is resumed and reported."""

import dataclasses
import random
import re
from pathlib import Path

import numpy as np
import pytest
from test_visual_probe import Summing, SummingConfig

from thoughtbubbles import ARCHITECTURES
from train.experiments import mixtures, visual_priors
from train.experiments.study import by_key, read_results
from train.experiments.visual_priors import VisualPriors
from train.probes import scenes
from train.probes.visual import CONDITIONS, ProbeConfig

ROOT = Path(__file__).resolve().parents[1]
PROBE = ProbeConfig(steps=1, batch=4, tokens=1, hidden=4, questions=3)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Few short documents of each source, and a decoder that has next to nothing to compile."""
    rng = random.Random(0)
    words = [f"{rng.random()} " * 20 for _ in range(120)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(mixtures, "library", lambda prose: (f"{prose} {text}" for text in words))
    monkeypatch.setattr(mixtures, "sums", lambda: iter(words))
    monkeypatch.setattr(visual_priors, "TEXTS", 120)
    model = SummingConfig(vocab_size=visual_priors.VOCAB, embed_dim=8)
    monkeypatch.setattr(visual_priors, "MODEL", model)
    monkeypatch.setitem(ARCHITECTURES, "summing", Summing)


def test_the_study_is_resumed_and_reported(small, tmp_path, capsys):
    out = tmp_path / "visual_priors.jsonl"
    shares = (1.0, 0.0)
    config = VisualPriors(seeds=(0,), shares=shares, steps=2, rows=4, probe=PROBE, out=str(out))
    visual_priors.main(config)
    lines = out.read_text()
    visual_priors.main(config)
    assert out.read_text() == lines
    first, second = read_results(out)
    assert (first["share"], second["share"]) == (1.0, 0.0)
    assert set(first["losses"]) == set(visual_priors.BASE)
    assert set(first["answers"]) == set(scenes.ANSWERS)
    for of_kind in first["answers"].values():
        assert set(of_kind) == set(CONDITIONS)
        assert all(0 <= low <= rate <= high <= 1 for rate, low, high in of_kind.values())
    assert first["weights"]["scenes"] == 1 and second["weights"]["scenes"] == 0
    assert first["losses"] != second["losses"]
    assert first["alignment"]["chance"] == 10 / 255 and first["date"] and first["jax"]
    assert first["probe"].startswith("steps 1, batch 4, learning_rate 0.003, patch 8")
    capsys.readouterr()
    visual_priors.main(dataclasses.replace(config, report=str(out)))
    table = capsys.readouterr().out
    assert "share of scenes, 2 steps, 4,096 tokens" in table and "steps 1, batch 4," in table
    assert "\n| 0% | 0 | colour | " in table and "\n| 100% | 0 | count | " in table


def test_several_seeds_have_a_standard_error():
    rates = dict.fromkeys(CONDITIONS, [0.5, 0.4, 0.6])
    run = {"category": "code", "share": 0.5, "steps": 10, "rows": 1, "neighbours": 3, "probe": "p"}
    run |= {"losses": dict.fromkeys(visual_priors.BASE, 1.0)}
    run |= {"alignment": {"value": 0.1, "permuted": 0.05, "p_value": 0.01}}
    runs = [
        run | {"seed": seed, "answers": dict.fromkeys(scenes.ANSWERS, rates | {"image": image})}
        for seed, image in enumerate(([0.8, 0.7, 0.9], [0.6, 0.5, 0.7]))
    ]
    lines = visual_priors.report(runs).splitlines()
    row = "| 50% | 0 1 | colour | 0.700 ± 0.100 | 0.500 ± 0.000 |"
    assert any(line.startswith(row) for line in lines)
    lines = visual_priors.report(runs[:1]).splitlines()
    assert any(line.startswith("| 50% | 0 | colour | 0.800 [0.70, 0.90] |") for line in lines)


def test_the_page_shows_what_was_found():
    """Rows of the page are those of the report, and its claims hold in the file."""
    results = read_results(ROOT / "docs/results/visual_priors.jsonl")
    page = (ROOT / "docs/mixtures.md").read_text().partition("## What text teaches")[2]
    rows = [line for line in page.splitlines() if re.match(r"\| \d+% \|", line)]
    assert len(rows) == 15 and set(rows) <= set(visual_priors.report(results).splitlines())
    aligned = {}
    for (steps, share), runs in by_key(results, "steps", "share").items():
        assert [run["seed"] for run in runs] == [0, 1, 2]
        for run in runs:
            taught = steps > 0 and share > 0
            assert (run["answers"]["count"]["image"][0] == 1) == taught
        for kind in ("colour", "shape"):
            assert 0.225 < np.mean([run["answers"][kind]["image"][0] for run in runs]) < 0.285
        aligned[steps, share] = np.mean([run["alignment"]["value"] for run in runs])
    untrained = aligned.pop((0, 0.2))
    assert len(aligned) == 5 and max(aligned.values()) < untrained


def test_no_text_is_of_a_held_out_scene(small):
    held_out = {scenes.scene(1, "validation", index).shown for index in range(1000)}
    first = visual_priors.FIRST_TEXT
    told = [scenes.scene(0, "train", first + index) for index in range(visual_priors.TEXTS)]
    assert [one.text() for one in told] == list(visual_priors.texts())
    assert not held_out & {one.shown for one in told}


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown source 'maths': choose from code, prose, sums"):
        VisualPriors(category="maths")
    with pytest.raises(ValueError, match="a share of 2 of scenes"):
        VisualPriors(shares=(2.0,))
    with pytest.raises(ValueError, match="neighbours=256 among 256 scenes: choose from 1 to 255"):
        VisualPriors(neighbours=256)
    with pytest.raises(ValueError, match="steps=-1 is below 0"):
        VisualPriors(steps=-1)

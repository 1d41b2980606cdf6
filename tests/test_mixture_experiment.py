"""The study of mixtures: its sources, its probes, and a tiny run that is resumed and reported."""

import dataclasses
import random

import numpy as np
import pytest

from thoughtbubbles import ModelConfig
from train.data import DataConfig, SplitCorpus
from train.data.labels import prose_characters
from train.data.prepared import prepare_documents
from train.experiments import mixtures


def test_brackets_are_nested():
    kinds = dict(zip("([{", ")]}", strict=True))
    for row in mixtures.brackets(20):
        assert len(row) == mixtures.SEQ_LEN + 1
        opened = []
        for sign in bytes(row.tolist()).decode():
            if sign in kinds:
                opened.append(kinds[sign])
            elif sign in kinds.values():
                assert sign == opened.pop()


def test_repeats_are_read_twice():
    rows = mixtures.repeats(5)
    first, second = rows[:, 1 : mixtures.SEQ_LEN // 2 + 1], rows[:, mixtures.SEQ_LEN // 2 + 1 :]
    assert np.array_equal(first, second) and rows.shape == (5, mixtures.SEQ_LEN + 1)


def test_code_and_prose_of_a_file_share_no_sign():
    text = 'def f():\n    """Says\n    nothing."""\n    return "a # b"  # c\n'
    is_prose = prose_characters(text)
    prose = "".join(sign for sign, of in zip(text, is_prose, strict=True) if of)
    assert prose == '"""Says\n    nothing."""# c'
    a, _, b, _, c = next(mixtures.sums()).split("\n")[0].split()
    assert int(a) + int(b) == int(c)


@pytest.mark.slow
def test_the_study_is_resumed_and_reported(tmp_path, monkeypatch, capsys):
    rng = random.Random(0)

    def small():
        config = DataConfig(seq_len=mixtures.SEQ_LEN, validation=0.3, cache_dir=str(tmp_path))
        words = {name: [f"{name} {rng.random()} " * 9 for _ in range(30)] for name in mixtures.BASE}
        return {
            name: prepare_documents(SplitCorpus(name, lambda of=of: iter(of), 0.3), config)
            for name, of in words.items()
        }

    model = ModelConfig(vocab_size=320, embed_dim=8, num_layers=1, num_heads=1)
    monkeypatch.setattr(mixtures, "packed_sources", small)
    monkeypatch.setattr(mixtures, "MODEL", model)
    out = tmp_path / "mixtures.jsonl"
    config = mixtures.Mixtures(seeds=(0,), steps=2, rows=4, shares=(0.0, 1.0), out=str(out))
    mixtures.main(config)
    lines = out.read_text().splitlines()
    mixtures.main(config)
    assert out.read_text().splitlines() == lines and len(lines) == 2
    capsys.readouterr()
    mixtures.main(dataclasses.replace(config, report=str(out)))
    table = capsys.readouterr().out
    assert "share of code, 2 steps, 4,096 tokens" in table
    assert "\n| 0% | 0 |" in table and "\n| 100% | 0 |" in table


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown source 'maths': choose from code, prose, sums"):
        mixtures.Mixtures(category="maths")
    with pytest.raises(ValueError, match="a share of 2 of code"):
        mixtures.Mixtures(shares=(2.0,))

"""Experiments with Hatchlings: merging languages, and quality beside decoders of their size."""

import dataclasses
import random

import numpy as np
import pytest

from train.benchmarks.timing import Cost, Timing
from train.data import SplitCorpus
from train.data.prepared import prepare_documents
from train.experiments import hatchling_quality as quality
from train.experiments import merge_languages as study


def test_languages_are_one_text_in_other_letters():
    text = np.frombuffer(b"def Read(self): return self._zip[42]", np.uint8)
    tables = [study.cipher(language) for language in study.LANGUAGES]
    assert (tables[0] == np.arange(320)).all() and (tables[1] != tables[2]).any()
    for table in tables[1:]:
        told = bytes(table[text].tolist())
        assert sorted(table) == list(range(320))
        assert told != text.tobytes() and told[3:4] == b" " and told[4:5].isupper()
        letters = {byte for byte in range(320) if table[byte] != byte}
        assert letters <= set(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


def test_the_table_has_means_by_model_and_language():
    setting = dict.fromkeys(study.KEY[1:], 8)
    results = [
        setting
        | {"seed": seed, "losses": {"base": [1.0 + seed, 2.0, 3.0], "merged": [4.0, 5.0, 6.0]}}
        for seed in (0, 1)
    ]
    shown = study.report(results)
    assert "| base | 1.500 ± 0.500 | 2.000 ± 0.000 | 3.000 ± 0.000 |" in shown
    assert shown.endswith("seeds 0 1")
    with pytest.raises(ValueError, match="results of 2 settings"):
        study.report([results[0], results[1] | {"steps": 9}])


def test_arms_are_of_one_size():
    config = quality.HatchlingQuality()
    plain = quality.plain(config)
    for arm, make in quality.ARMS.items():
        assert abs(make(config).num_params() / plain.num_params() - 1) < 0.005, arm
    flops = [
        quality.steps_of(config, arm) * quality.ARMS[arm](config).forward_flops(config.seq_len)
        for arm in ("hatchling", "plain_flops")
    ]
    np.testing.assert_allclose(*flops, rtol=1e-3)


def test_quality_is_resumed_and_reported(tmp_path, monkeypatch, capsys):
    rng = random.Random(0)
    texts = [f"{rng.random()} " * 9 for _ in range(60)]

    def small(data):
        data = dataclasses.replace(data, validation=0.3, cache_dir=str(tmp_path))
        return prepare_documents(SplitCorpus("small", lambda: iter(texts), 0.3), data)

    def in_turns(runs, rounds):
        best = {name: min(run() for _ in range(rounds)) for name, run in runs.items()}
        assert all(cost.cpu_seconds > 0 for cost in best.values())
        measured = {"plain": Cost(9.0, 2.0), "hatchling": Cost(9.0, 5.0)}
        return {name: Timing([measured[name]]) for name in runs}

    monkeypatch.setattr(quality, "prepare", small)
    monkeypatch.setattr(quality, "interleaved", in_turns)
    out = tmp_path / "quality.jsonl"
    config = quality.HatchlingQuality(
        arms=("plain", "hatchling", "plain_time"), seeds=(0, 0), embed_dim=8, num_layers=1,
        num_heads=2, steps=2, batch_size=2, seq_len=16, rows=4, out=str(out),
    )  # fmt: skip
    quality.main(config)
    lines = out.read_text().splitlines()
    quality.main(config)
    assert out.read_text().splitlines() == lines and len(lines) == 3
    capsys.readouterr()
    quality.main(dataclasses.replace(config, report=str(out)))
    table = capsys.readouterr().out
    assert "2 steps, embed_dim 8, num_layers 1, num_heads 2, batch_size 2, seq_len 16" in table
    assert "optimizer: name adamw, learning_rate 0.003" in table
    row, of_time = (line.split(" | ") for line in table.splitlines()[-3:-1])
    assert of_time[0] == "| plain_time" and of_time[2] == "160"
    assert row[0] == "| hatchling" and row[2] == "64" and row[-3].endswith("%"), row
    with pytest.raises(ValueError, match="unknown arm 'rnn': choose from plain, hatchling"):
        quality.HatchlingQuality(arms=("rnn",))


@pytest.mark.parametrize("config", (quality.HatchlingQuality, study.MergeLanguages))
def test_a_list_that_names_nothing_is_refused(config):
    with pytest.raises(ValueError, match="seeds is empty: name at least one, such as 0"):
        config(seeds=())

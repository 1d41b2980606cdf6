"""The benchmark command on a model too small to say anything."""

import pytest

from train.benchmarks import training
from train.benchmarks.training import TrainingBenchmark, main

TINY = TrainingBenchmark(
    embed_dim=16, num_layers=2, num_heads=2, vocab_size=32, seq_len=8, repeats=1
)


def test_benchmark_prints_ratios(capsys):
    main(TINY)
    shown = capsys.readouterr().out
    assert "forks before (0, 1)" in shown
    for line in ("plain ", "bubbles ", "step ratio ", "forward ratio ", "FLOP ratio "):
        assert f"\n{line}" in shown


def test_forks_stand_at_the_quarters_of_the_depth(monkeypatch):
    class Begun(Exception):
        pass

    def stop(config, forks):
        if forks:
            raise Begun(forks)

    monkeypatch.setattr(training, "prepare", stop)
    with pytest.raises(Begun, match=r"\(2, 4, 6\)"):
        main(TrainingBenchmark(num_layers=8))

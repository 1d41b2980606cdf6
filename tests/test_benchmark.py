"""The benchmark command on a model too small to say anything."""

from train.benchmark import Benchmark, main


def test_benchmark_prints_ratios(capsys):
    main(Benchmark(embed_dim=16, num_layers=4, num_heads=2, vocab_size=32, seq_len=8, repeats=1))
    shown = capsys.readouterr().out
    assert "forks before (1, 2, 3)" in shown
    for line in ("plain ", "bubbles ", "step ratio ", "forward ratio ", "FLOP ratio "):
        assert f"\n{line}" in shown

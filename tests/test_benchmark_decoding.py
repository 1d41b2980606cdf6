"""The decoding benchmark on models too small to say anything."""

import re
from pathlib import Path

from train.benchmarks.decoding import DecodeBenchmark, main

MODEL = str(Path(__file__).parent / "fixtures/pretrained/llama")


def test_decoding_of_random_weights(capsys):
    main(
        DecodeBenchmark(
            embed_dim=16,
            num_layers=2,
            num_heads=2,
            vocab_size=32,
            fork_layers=(1,),
            contexts=(8,),
            new_tokens=2,
            repeats=1,
        )
    )
    title, _, row = capsys.readouterr().out.splitlines()
    assert "forks before (1,)" in title
    assert re.fullmatch(r" +8 +[\d.]+ +[\d.]+ +[\d.]+ \| +[\d.]+ +[\d.]+ +[\d.]+", row)


def test_decoding_of_pretrained_weights(capsys):
    main(DecodeBenchmark(model=MODEL, contexts=(8, 16), new_tokens=2, repeats=1))
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert "parameters, 2 layers, float32, batch 1" in title
    numbers = [re.findall(r"[\d.]+", row) for row in rows]
    assert [row[0] for row in numbers] == ["8", "16"] and {len(row) for row in numbers} == {6}
    assert all(float(number) > 0 for row in numbers for number in row[:5])

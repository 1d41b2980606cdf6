"""The benchmarks on models too small to say anything, and how they take times."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from train.benchmarks import hatchling, memgen, timing, training
from train.benchmarks.training import TrainingBenchmark, main
from train.devices.mesh import make_mesh

TINY = TrainingBenchmark(
    embed_dim=16, num_layers=1, num_heads=2, vocab_size=32, seq_len=8, repeats=1
)


def test_benchmark_prints_ratios(capsys, monkeypatch):
    one_device = partial(make_mesh, devices=jax.devices()[:1])  # compiles sooner
    monkeypatch.setattr(training, "make_mesh", one_device)
    main(TINY)
    shown = capsys.readouterr().out
    assert "forks before (0,)" in shown
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


def test_costs_are_taken_in_turns_after_a_warm_up():
    calls, costs = [], {"slow": [9.0, 4.0, 2.0, 6.0], "fast": [7.0, 1.0, 2.0, 2.0]}

    def run(name: str) -> timing.Cost:
        calls.append(name)
        seconds = costs[name][calls.count(name) - 1]
        return timing.Cost(seconds, 2 * seconds).per(2)

    found = timing.interleaved({name: partial(run, name) for name in costs}, 3)
    assert calls == ["slow", "fast"] * 4
    assert found["slow"].best == (1.0, 2.0) and found["slow"].median == (2.0, 4.0)
    assert timing.ratio(found["slow"], found["fast"]) == (2.0, 2.0, 1.0, 4.0)


@pytest.mark.parametrize("latents_see_latents", [None, True, False])
def test_training_steps_of_memgen_are_traced(latents_see_latents: bool | None):
    """Not compiled: what is tested is that they call what there is."""
    config = memgen.MemGenBenchmark(
        embed_dim=8, num_layers=1, num_heads=2, vocab_size=16, latents=1, sft_batch=1,
        sft_tokens=4, sft_events=2,
    )  # fmt: skip
    jax.eval_shape(lambda: jnp.float32(memgen.training_step(config, latents_see_latents)().seconds))


def test_a_hatchling_is_timed_beside_a_plain_decoder_of_its_size(capsys):
    config = hatchling.HatchlingBenchmark(
        vocab_size=16, embed_dim=8, num_neurons=64, num_layers=1, num_heads=2, chunk=4,
        contexts=(8,), longest=8, new_tokens=2, repeats=1,
    )  # fmt: skip
    sizes = {name: shape.num_params() for name, shape in config.configs().items()}
    assert 0.7 < sizes["plain"] / sizes["hatchling"] < 1.5
    hatchling.main(config)
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines == [["step", "8"], ["prefill", "8"], ["decode", "8"]]

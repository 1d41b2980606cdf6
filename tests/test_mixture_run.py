"""Runs on a mixture, through the commands: metrics of each source, resume, the end of the rows."""

import dataclasses
import math
import random
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from thoughtbubbles import ModelConfig, Thoughtbubbles
from thoughtbubbles.hatchling import Hatchling, HatchlingConfig
from train import evaluate, pretrain
from train.cli.command import run_command
from train.data import DataConfig, MixtureReader, prepare
from train.engine.step import pretraining_loss
from train.evaluate import EvaluateConfig
from train.evaluation import held_out as held_out_loss
from train.evaluation.held_out import over_sources
from train.pretraining.config import RunConfig
from train.pretraining.job import PretrainJob, train
from train.pretraining.mixture import mixture_loss, mixture_metrics
from train.pretraining.presets import PRESETS
from train.runs.checkpoint import load_params
from train.runs.metrics import MetricWriter, read_metrics

SMALL = (
    *("tiny_plain", "--model.embed-dim", "16", "--model.num-layers", "1"),
    *("--model.num-heads", "2", "--data.seq-len", "16", "--data.validation", "0.2"),
    *("--batch-size", "8", "--steps", "8", "--save-every", "4", "--log-every", "1"),
    *("--evaluation.every", "0", "--evaluation.rows", "4"),
)
TIMES = ("time", "tokens_per_second", "step_seconds", "data_wait", "goodput", "memory/")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    for name, words in (("words", ["red", "green", "ball"]), ("sums", ["1 + 1 = 2", "2 + 1 = 3"])):
        (root / name).mkdir()
        for number in range(20):
            (root / name / f"{number}.txt").write_text("\n".join(rng.choices(words, k=60)))
    return root


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)


def corpus(folders, more=""):
    return f"mix({{'words={folders}/words': 0.75, 'sums={folders}/sums': 0.25}}{more})"


def packed(folders, more=""):
    text, cache = corpus(folders, more), f"{folders}/cache"
    return prepare(DataConfig(text, seq_len=16, validation=0.2, cache_dir=cache))


def run_here(monkeypatch, folders, out, *words, more=""):
    places = ("--data.corpus", corpus(folders, more), "--data.cache-dir", f"{folders}/cache")
    monkeypatch.setattr(sys, "argv", ["command", *SMALL, *places, "--out", str(out), *words])
    try:
        run_command(train, RunConfig, PRESETS)  # without the sample at the end
    except SystemExit as end:
        return end.code
    return 0


def curve(folder):
    return [
        {name: value for name, value in line.items() if not name.startswith(TIMES)}
        for line in read_metrics(folder)
    ]


@pytest.mark.slow
def test_a_run_shows_its_sources_and_goes_on_bit_for_bit(monkeypatch, capsys, folders, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run_here(monkeypatch, folders, whole) == 0
    shown = capsys.readouterr().err
    assert "mixture of 2 sources" in shown and "words 75%" in shown and "64 sequences: " in shown
    lines = read_metrics(whole)
    last, held_out = lines[-2], lines[-1]
    assert last["source/words/share"] == 0.75 and last["source/sums/share"] == 0.25
    both = 0.75 * last["source/words/loss"] + 0.25 * last["source/sums/loss"]
    assert last["loss"] == pytest.approx(both, rel=1e-5)
    scored = [held_out[f"eval/source/{name}/loss"] for name in ("words", "sums")]
    assert held_out["eval/loss"] == pytest.approx(0.75 * scored[0] + 0.25 * scored[1])
    assert held_out["eval/standard_error"] > 0

    with monkeypatch.context() as patch:
        write = MetricWriter.write

        def write_and_stop(self, step, *values):
            write(self, step, *values)
            if step == 3:
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(MetricWriter, "write", write_and_stop)
        assert run_here(monkeypatch, folders, halves) == 0
    assert run_here(monkeypatch, folders, halves) == 0
    assert curve(halves) == curve(whole)
    ours, theirs = (jax.tree.leaves(load_params(run)[1]) for run in (halves, whole))
    assert all(map(np.array_equal, ours, theirs))
    capsys.readouterr()
    assert run_here(monkeypatch, folders, whole, "--steps", "9", more=", exhausted='stop'") == 2
    assert "data.corpus: saved" in capsys.readouterr().err

    monkeypatch.setattr(sys, "argv", ["command", "--checkpoint", str(whole), "--rows", "4"])
    monkeypatch.setattr(held_out_loss, "prepare", None)  # whatever the sources hold by now
    run_command(evaluate.main, EvaluateConfig)
    assert f"words {scored[0]:.4f}, sums {scored[1]:.4f}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_ends_with_the_rows(monkeypatch, capsys, folders, tmp_path):
    """The last step is saved and scored; run again, it is scored alone."""
    stop = {"more": ", exhausted='stop'"}
    data = packed(folders, **stop)
    steps = MixtureReader(data, 8, 0).end
    assert steps is not None and steps > 8
    long = ("--steps", "999", "--save-every", "999", "--log-every", "999")
    for _ in range(2):
        assert run_here(monkeypatch, folders, tmp_path / "run", *long, **stop) == 0
        shown = capsys.readouterr().err
        assert f"ended at step {steps} of 999: no new rows are left" in shown
        assert "the run ends there" in shown and f"step {steps}: held-out loss" in shown
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [steps, steps]


def test_mistakes_are_one_line_before_anything_is_read(monkeypatch, capsys, folders, tmp_path):
    places = ("--data.corpus", "mix({'stdlib': 0.5})", "--dry-run", "--out", str(tmp_path / "run"))
    monkeypatch.setattr(sys, "argv", ["command", *SMALL, *places])
    with pytest.raises(SystemExit):
        run_command(pretrain.main, RunConfig, PRESETS)
    error = capsys.readouterr().err
    assert error.startswith("error: mix: the weights sum to 0.5") and error.count("\n") == 1


def test_the_loss_of_a_mixture_is_that_of_its_rows(folders):
    config = ModelConfig(vocab_size=320, embed_dim=8, num_layers=1, num_heads=1)
    model = Thoughtbubbles(config, rngs=nnx.Rngs(0))
    rows = np.random.default_rng(0).integers(0, 320, (4, 9), np.int32)
    rows[1, 5:] = -1
    batch = {"tokens": jnp.asarray(rows), "source": jnp.asarray([0, 2, 2, 0], jnp.int32)}

    @jax.jit
    def losses(batch):
        key = jax.random.key(0)
        nats = model.token_losses(batch["tokens"])[0]
        return (
            mixture_loss(3)(model, batch, key),
            pretraining_loss(model, batch["tokens"], key),
            nats,
        )

    (total, weight, sums), plain, nats = losses(batch)
    assert (total, weight) == (plain[0], plain[1])
    nats = np.asarray(nats).sum(axis=1)
    np.testing.assert_allclose(
        sums["mixture_nats"], [nats[0] + nats[3], 0, nats[1] + nats[2]], 1e-6
    )
    np.testing.assert_array_equal(sums["mixture_targets"], [16, 0, 12])
    data = packed(folders)
    two = {"mixture_nats": [8.0, 0.0], "mixture_targets": [4.0, 0.0], "mine": 1}
    metrics, others = mixture_metrics(data, two, 8)
    assert metrics["source/words/loss"] == 2 and "source/sums/loss" not in metrics
    assert others == {"mine": 1} and math.isclose(metrics["source/sums/share"], 0.25)


def test_a_source_in_few_steps_has_a_loss(folders, tmp_path):
    """Its steps and those with a line of metrics may never be the same ones."""
    config = dataclasses.replace(PRESETS["tiny_plain"], batch_size=8, out=str(tmp_path))
    job = PretrainJob(config)
    job._mixture = packed(folders)
    for number in range(1, 10):
        rare = number % 10 == 5
        job.observe({"mixture_nats": [8.0, 6.0 * rare], "mixture_targets": [4.0, 2.0 * rare]})
    last = {"mixture_nats": [4.0, 0.0], "mixture_targets": [4.0, 0.0]}
    job.observe(last)
    metrics, _ = job.step_metrics(last, 10)
    assert metrics["source/sums/loss"] == 3 and metrics["source/words/loss"] == 76 / 40
    assert job._sources == {}


def test_a_perfect_source_has_a_mean():
    perfect = {"loss": 0.0, "bits_per_byte": 0.0, "standard_error": 0.0}
    other = {"loss": 2.0, "bits_per_byte": 1.0, "standard_error": 0.1}
    mean = over_sources({"a": perfect, "b": other}, {"a": 0.5, "b": 0.5})
    assert mean["loss"] == 1 and mean["bits_per_byte"] == 0.5


def test_a_mean_over_sources_divides_by_the_bytes_of_the_mixture():
    """Nats of the mixture over its bytes, not a mean of quotients."""
    bytes_of_token, losses = {"a": 0.8, "b": 4.0}, {"a": 5.0, "b": 2.0}
    scored = {
        name: {
            "loss": losses[name],
            "bits_per_byte": losses[name] / math.log(2) / bytes_of_token[name],
            "standard_error": 0.1,
        }
        for name in "ab"
    }
    mean = over_sources(scored, {"a": 0.75, "b": 0.25})
    assert mean["loss"] == 4.25 and mean["source/b/loss"] == 2
    assert mean["bits_per_byte"] == pytest.approx(4.25 / math.log(2) / (0.6 + 1.0))
    assert mean["standard_error"] == pytest.approx(0.1 * math.hypot(0.75, 0.25))


@pytest.mark.parametrize("truncate", [None, 16])
def test_a_loss_that_is_no_sum_of_tokens_is_not_split(truncate):
    shape = HatchlingConfig.preset("tiny", truncate=truncate)
    abstract = nnx.eval_shape(lambda: Hatchling(shape, rngs=nnx.Rngs(0)))
    assert abstract.loss_by_token == (truncate is None)

    class Louder(Hatchling):
        def loss(self, *inputs, **options):
            total, *rest = super().loss(*inputs, **options)
            return 2 * total, *rest

    assert not nnx.eval_shape(lambda: Louder(shape, rngs=nnx.Rngs(0))).loss_by_token

    class Own(Thoughtbubbles):
        def loss(self, rows, **options):
            return super().loss(rows, **options)

    assert Thoughtbubbles.loss_by_token.fget(object.__new__(Thoughtbubbles))
    assert not Own.loss_by_token.fget(object.__new__(Own))

"""The command from end to end: a real run, kills, resume, and every mistake as one line."""

import dataclasses
import json
import os
import random
import shlex
import shutil
import signal
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import QUICK, Process

from thoughtbubbles import Thoughtbubbles
from train import evaluate, generate, pretrain
from train.cli.command import run_command
from train.engine.loop import run_lock
from train.engine.step import make_train_step
from train.evaluate import EvaluateConfig
from train.evaluation.held_out import Evaluator
from train.generate import GenerateConfig
from train.models.load import load_model
from train.pretraining.config import RunConfig
from train.pretraining.presets import PRESETS
from train.runs.checkpoint import load_params
from train.runs.metrics import read_metrics

WORDS = "def return self None for in range print yield class import if else".split()  # noqa: SIM905
SMALL = (
    *("--model.embed-dim", "16", "--model.num-layers", "2", "--model.num-heads", "2"),
    *("--model.fork-layers", "1"),
    *("--data.seq-len", "16", "--batch-size", "8", "--steps", "8", "--save-every", "4"),
    *("--log-every", "1", "--evaluation.every", "0"),
    *("--evaluation.rows", "4", "--evaluation.positions", "8"),
)
TIMES = ("time", "tokens_per_second", "step_seconds", "data_wait", "goodput", "memory/")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for index in range(20):
        (folder / f"{index}.txt").write_text(" ".join(rng.choices(WORDS, k=400)))
    return folder


@pytest.fixture(autouse=True)
def one_device(request, monkeypatch):
    """A laptop, unless a test asks for the mesh."""
    if "whole_mesh" not in request.fixturenames:
        devices = jax.devices()[:1]
        monkeypatch.setattr(jax, "devices", lambda: devices)


@pytest.fixture
def whole_mesh():
    """All eight simulated devices."""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Environment of commands that are killed or run out of disk.

    jax writes cache entries in place, so they must not leave half of one in the shared cache.
    """
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("jax"))}
    return os.environ | cache | {"XLA_FLAGS": QUICK}


@pytest.fixture
def arguments(corpus, tmp_path):
    cache = corpus.parent / "cache"
    return [
        *("tiny_topk", "--data.corpus", str(corpus), "--data.cache-dir", str(cache)),
        *("--out", str(tmp_path / "run"), *SMALL),
    ]


def run_here(monkeypatch, *words, main=pretrain.main, config=RunConfig, presets=PRESETS):
    """The command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["command", *words])
    try:
        run_command(main, config, presets)
    except SystemExit as end:
        return end.code
    return 0


def mistake(capsys, *parts):
    """Assert that the last line on stderr is one error line that holds all parts."""
    error = capsys.readouterr().err.rstrip("\n").splitlines()
    assert not any("Traceback" in line for line in error)
    assert error[-1].startswith("error: "), error
    for part in parts:
        assert part in error[-1], error[-1]


def curve(folder):
    return [
        {name: value for name, value in line.items() if not name.startswith(TIMES)}
        for line in read_metrics(folder)
    ]


def assert_same_params(ours, theirs):
    for a, b in zip(
        jax.tree.leaves(load_params(ours)[1]), jax.tree.leaves(load_params(theirs)[1]), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.usefixtures("whole_mesh")
def test_a_run_from_start_to_text(monkeypatch, capsys, arguments, tmp_path):
    mesh = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    assert run_here(monkeypatch, *arguments, *mesh, "--steps", "20") == 0
    shown = capsys.readouterr()
    assert (
        "held-out loss" in shown.err and "teacher-forced" in shown.err and "not causal" in shown.err
    )
    assert "fork 1" in shown.out and "sample" in shown.out
    assert "note:" not in shown.err, "the sample is no longer than the rows"
    lines = read_metrics(tmp_path / "run")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 20 and losses[-1] < losses[0]
    assert lines[0]["fork_1/streams_per_token"] == pytest.approx(2.0)
    assert len(lines[0]["fork_1/score_histogram"]) == 10
    assert lines[-1]["eval/blockwise_loss"] != lines[-1]["eval/loss"]
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["embed_dim"] == 16

    loaded = load_model(tmp_path / "run")
    assert loaded.step == 20 and loaded.config["steps"] == 20
    figure = tmp_path / "map.png"
    words = ("--checkpoint", str(tmp_path / "run"), "--prompt", "def", "x", "--max-new-tokens", "5")
    status = run_here(
        monkeypatch, *words, "--bubbles", "--figure", str(figure),
        main=generate.main, config=GenerateConfig, presets=None,
    )  # fmt: skip
    assert status == 0 and figure.exists()
    assert "fork 1" in capsys.readouterr().out
    # Run again: nothing is left to do, and nothing is lost.
    assert run_here(monkeypatch, *arguments, *mesh, "--steps", "20") == 0
    assert curve(tmp_path / "run")[:20] == [
        line for line in curve(tmp_path / "run") if "loss" in line
    ]


@pytest.mark.slow
def test_going_on_is_bit_for_bit(monkeypatch, capsys, arguments, tmp_path):
    """2N steps = N steps, a stop signal, then the rest; also the optimizer state and the data.

    And a tracked threshold, which is no parameter but part of the model. Each run compiles its step
    once. The signal comes in an evaluation, and that step is saved.
    """
    whole, halves = str(tmp_path / "whole"), str(tmp_path / "halves")
    made = []

    def remember(*inputs):
        made.append(make_train_step(*inputs))
        return made[-1]

    monkeypatch.setattr("train.pretraining.job.make_train_step", remember)
    policy = ("--model.policy", "Threshold(ratio=1.5)", "--evaluation.every", "3")
    arguments = [*arguments, *policy]
    assert run_here(monkeypatch, *arguments, "--out", whole) == 0
    with monkeypatch.context() as patch:
        call = Evaluator.__call__

        def evaluate_and_stop(self, *inputs):
            signal.raise_signal(signal.SIGTERM)
            return call(self, *inputs)

        patch.setattr(Evaluator, "__call__", evaluate_and_stop)
        assert run_here(monkeypatch, *arguments, "--out", halves) == 0
    assert "stopped at step 3 and saved it" in capsys.readouterr().err
    assert load_model(halves).step == 3
    assert run_here(monkeypatch, *arguments, "--out", halves) == 0
    assert [step._cache_size() for step in made] == [1, 1, 1]
    assert curve(halves) == curve(whole)
    assert_same_params(halves, whole)
    assert_threshold_is_swept(monkeypatch, halves, tmp_path / "dial.png")


def start(environment, arguments, out):
    return Process(("-m", "train.pretrain", *arguments, "--out", out), environment, out.parent)


def lines_in(out):
    file = Path(out) / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def assert_threshold_is_swept(monkeypatch, out, figure):
    """The saved threshold is the one that the last step told, and a sweep is drawn."""
    last = [line for line in curve(out) if "fork_1/threshold" in line][-1]
    [fork] = load_model(out).model.forks
    assert float(fork.threshold[...]) == last["fork_1/threshold"] > 0
    sweep = ("--sweep-offset", "0", "0.3", "--rows", "4", "--figure", str(figure))
    status = run_here(
        monkeypatch, "--checkpoint", str(out), *sweep,
        main=evaluate.main, config=EvaluateConfig, presets=None,
    )  # fmt: skip
    assert status == 0 and figure.exists()


@pytest.mark.experiment
def test_kill_nine_gives_the_uninterrupted_run(processes, monkeypatch, arguments, tmp_path):
    """Of one process; of two, which run in CI: `test_distributed.py`."""
    policy = ("--model.policy", "Threshold(ratio=1.5)")
    long = [*arguments, *policy, "--steps", "48", "--save-every", "8"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(processes, long, whole)
    assert process.wait(timeout=300) == 0 and "sample" in process.output(), process.output()
    rng = random.Random(time.time_ns())
    process, target = start(processes, long, killed), rng.randrange(1, 40)
    while lines_in(killed) < target and process.poll() is None:
        time.sleep(0.001)
    time.sleep(rng.random() * 0.02)
    assert process.poll() is None, "the run ended before it was killed"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process = start(processes, long, killed)
    assert process.wait(timeout=300) == 0 and "held-out loss" in process.output()
    assert curve(killed) == curve(whole)
    assert_same_params(killed, whole)
    assert_threshold_is_swept(monkeypatch, killed, tmp_path / "dial.png")


@pytest.mark.experiment
def test_sigterm_saves_and_leaves(processes, arguments, tmp_path):
    long = [*arguments, "--steps", "100000", "--save-every", "100000", "--evaluation.every", "0"]
    process = start(processes, long, tmp_path / "run")
    while lines_in(tmp_path / "run") < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0, process.output()
    assert "run again to go on" in process.output()
    assert load_model(tmp_path / "run").step == lines_in(tmp_path / "run")


@pytest.fixture(scope="module")
def finished_once(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    cache = corpus.parent / "cache"
    words = ("tiny_topk", "--data.corpus", str(corpus), "--data.cache-dir", str(cache))
    one = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: one)
        assert run_here(patch, *words, *SMALL, "--out", str(out)) == 0
    return out


@pytest.fixture
def finished(finished_once, tmp_path):
    """A small finished run (steps 4 and 8 are saved), where `arguments` has its folder."""
    return Path(shutil.copytree(finished_once, tmp_path / "run"))


@pytest.mark.slow
def test_nan_stops_with_the_step_and_keeps_the_checkpoint(
    monkeypatch, capsys, arguments, finished, tmp_path
):
    saved = json.loads((finished / "config.json").read_text())
    assert saved["steps"] == 8

    def poisoned(*inputs, **options):
        total, *rest = original(*inputs, **options)
        return total / 0.0, *rest

    original = Thoughtbubbles.loss
    monkeypatch.setattr(Thoughtbubbles, "loss", poisoned)
    assert run_here(monkeypatch, *arguments, "--steps", "12") == 1
    mistake(capsys, "step 9: loss inf", "last checkpoint is untouched")
    evidence = np.load(finished / "nonfinite-step-9" / "batch-0.npz")
    assert evidence["tokens"].shape == (8, 17)
    assert load_model(finished).step == 8


@pytest.mark.slow
def test_another_config_is_refused(monkeypatch, capsys, arguments, finished):
    before = sorted(finished.rglob("*"))
    assert run_here(monkeypatch, *arguments, "--model.dtype", "bfloat16") == 2
    mistake(capsys, "model.dtype: saved 'float32', now 'bfloat16'")
    assert run_here(monkeypatch, *arguments, "--model.num-heads", "4") == 2
    mistake(capsys, "model.num_heads: saved 2, now 4", "--out")
    assert run_here(monkeypatch, *arguments, "--model.policy", "PrefixRank") == 2
    mistake(
        capsys,
        "model.policy: saved 'TopK(ratio=2.0, streams=None)', now 'PrefixRank(ratio=2.0, ",
    )
    assert run_here(monkeypatch, *arguments, "--data.seq-len", "8") == 2
    mistake(capsys, "data.seq_len: saved 16, now 8")
    assert sorted(finished.rglob("*")) == before
    with run_lock(finished):
        assert run_here(monkeypatch, *arguments) == 2
        mistake(capsys, "another run is going on")
    assert run_here(monkeypatch, *arguments, "--steps", "9") == 0
    assert "goes on with a change: steps: saved 8, now 9" in capsys.readouterr().err


@pytest.mark.slow
def test_changed_corpus_is_refused(monkeypatch, capsys, arguments, finished, corpus, tmp_path):
    moved = tmp_path / "corpus"
    shutil.copytree(corpus, moved)
    (moved / "new.txt").write_text("something new " * 50)
    saved = corpus.with_name("aside")
    os.rename(corpus, saved)
    os.rename(moved, corpus)
    try:
        assert run_here(monkeypatch, *arguments, "--steps", "12") == 2
        mistake(capsys, "restore the corpus or task")
    finally:
        shutil.rmtree(corpus)
        os.rename(saved, corpus)


@pytest.mark.slow
def test_truncated_checkpoint_is_named(monkeypatch, capsys, arguments, finished):
    files = [f for f in (finished / "8").rglob("*") if f.is_file() and f.stat().st_size > 500]
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert run_here(monkeypatch, *arguments, "--steps", "12") == 2
    mistake(capsys, str(finished / "8"), "damaged", "step 4 is intact")
    shutil.rmtree(finished / "8")
    assert run_here(monkeypatch, *arguments) == 0
    assert load_model(finished).step == 8


@pytest.mark.slow
def test_full_disk_is_one_line_and_keeps_the_checkpoint(processes, arguments, finished):
    code = (
        "import resource\n"
        "from train import pretrain\n"
        "from train.cli.command import run_command\n"
        "from train.pretraining.config import RunConfig\n"
        "from train.pretraining.presets import PRESETS\n"
        "def main(c):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); pretrain.main(c)\n"
        "run_command(main, RunConfig, PRESETS)"
    )
    # Parameters of 80 kB in one file: 20 kB is a full disk to them.
    process = Process(("-c", code, *arguments, "--steps", "12"), processes, finished.parent)
    assert process.wait(timeout=300) == 2, process.output()
    last = process.output().rstrip().splitlines()[-1]
    assert last.startswith("error: checkpoint of step 12 could not be written"), process.output()
    assert "step 8 is intact" in last and "Traceback" not in process.output()
    assert load_model(finished).step == 8


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["huge"], ["unknown preset 'huge'", "choose one of tiny"]),
        (["tiny", "--model.policy", "TopK(ratio=0.5)"], ["ratio=0.5 is below 1"]),
        (
            ["tiny", "--model.policy", "Rank(ratio=2.0)"],
            ["unknown policy 'Rank' (perhaps PrefixRank?): choose one of TopK, PrefixRank"],
        ),
        (["tiny", "--model.fork-layers", "9"], ["fork layer 9 is out of range for num_layers=4"]),
        (["tiny", "--model.num-heads", "7"], ["num_heads=7 does not divide embed_dim=128"]),
        (
            ["tiny", "--model.vocab-size", "100"],
            ["257 ids", "model.vocab_size=100", "--model.vocab-size"],
        ),
        (["tiny", "--data.corpus", "/nowhere"], ["/nowhere"]),
        (["tiny", "--mesh.data", "3"], ["mesh data=3", "1 devices"]),
        (["tiny", "--batch-size", "3", "--accumulate", "2"], ["batch_size=3", "multiple of 2"]),
        (["tiny", "--steps", "0"], ["steps=0 is below 1"]),
        (["tiny", "--optimizer.clip", "0"], ["clip=0.0 is not positive"]),
        (["tiny", "--model.mlp-dim", "-4"], ["mlp_width=-4 is below 1"]),
        (["tiny", "--steps", "many"], ["--steps", "'many'"]),
        (["tiny", "--stepz", "5"], ["--stepz"]),
        (["tiny", "--model.merge", "mean"], ["'mean'", "'rightmost'"]),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else None,
)
def test_mistakes_in_the_command(monkeypatch, capsys, tmp_path, corpus, words, parts):
    out = tmp_path / "run"
    words = [*words, "--out", str(out), "--data.cache-dir", str(corpus.parent / "cache")]
    if "--data.corpus" not in words:
        words += ["--data.corpus", str(corpus)]
    assert run_here(monkeypatch, *words) == 2
    mistake(capsys, *parts)
    assert not out.exists(), "nothing is half-written"


@pytest.mark.slow
def test_evaluate_and_generate_name_what_cannot_be_dialled(monkeypatch, capsys, finished):
    """The plain mistakes of both commands, on a `TopK` run."""
    for words, part in (
        (["--policy", "Threshold"], "needs fork layers with a threshold"),
        (["--window", "3"], "window=3 is a setting of PrefixRank"),
        (["--threshold-offset", "0.1"], "is a setting of Threshold"),
    ):
        for main, config in (
            (evaluate.main, EvaluateConfig),
            (generate.main, GenerateConfig),
        ):
            command = ["--checkpoint", str(finished), *words]
            assert run_here(monkeypatch, *command, main=main, config=config, presets=None) == 2
            mistake(capsys, part)
    words = ["--checkpoint", str(finished), "--figure", "dial.png"]
    status = run_here(monkeypatch, *words, main=evaluate.main, config=EvaluateConfig, presets=None)
    assert status == 2
    mistake(capsys, "dial.png shows a sweep", "--sweep")


def test_empty_and_binary_corpora(monkeypatch, capsys, tmp_path):
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.mkdir()
    binary.mkdir()
    (binary / "a.txt").write_bytes(b"text\x00\x01")
    cache = ("--data.cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "run"))
    assert run_here(monkeypatch, "tiny", "--data.corpus", str(empty), *cache) == 2
    mistake(capsys, str(empty))
    assert run_here(monkeypatch, "tiny", "--data.corpus", str(binary), *cache) == 2
    mistake(capsys, "a.txt")


def test_out_that_is_a_file(monkeypatch, capsys, arguments, tmp_path):
    (tmp_path / "run").write_text("")
    assert run_here(monkeypatch, *arguments) == 2
    mistake(capsys, str(tmp_path / "run"))


def test_generate_needs_a_prompt(monkeypatch, capsys):
    words = ("--checkpoint", "none", "--prompt")
    status = run_here(monkeypatch, *words, main=generate.main, config=GenerateConfig, presets=None)
    assert status == 2
    mistake(capsys, "no prompt is given")


def test_a_figure_is_checked_before_anything_else(monkeypatch, capsys, tmp_path):
    words = ("--checkpoint", str(tmp_path / "none"), "--figure")
    for figure, part in (("/nowhere/a.png", "folder does not exist"), ("a.txt", "ends in .png")):
        status = run_here(
            monkeypatch, *words, figure, main=generate.main, config=GenerateConfig, presets=None
        )
        assert status == 2
        mistake(capsys, figure, part)


def test_the_command_to_paste_is_read_by_the_shell(monkeypatch, capsys):
    tuned = types.SimpleNamespace(step=300, context_length=None, prompt=list, model=None)
    monkeypatch.setattr(pretrain, "train", lambda config: {})
    monkeypatch.setattr(pretrain, "load_model", lambda out: tuned)
    monkeypatch.setattr(pretrain, "write", lambda *_, **__: ["text"])
    pretrain.main(dataclasses.replace(PRESETS["tiny"], out="my runs", prompt="it's"))
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[2:] == ["--checkpoint", "my runs", "--prompt", "it's"]


def test_generate_needs_a_run(monkeypatch, capsys, tmp_path):
    words = ("--checkpoint", str(tmp_path / "none"))
    status = run_here(monkeypatch, *words, main=generate.main, config=GenerateConfig, presets=None)
    assert status == 2
    mistake(capsys, str(tmp_path / "none"), "does not exist")

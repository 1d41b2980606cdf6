"""The experiment on both stages of MemGen: it runs to its end, goes on, and says what it found."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memgen
from train.data import ByteTokenizer
from train.experiments import remember
from train.experiments.questions import HELD_OUT, KINDS, SEEN, UNSEEN, Questions, question, rows
from train.rl.types import Completion

TRIGGER = "trigger, penalty by tokens"


def experiment(out: Path, **changes) -> remember.Experiment:
    steps = ("pretrain_steps", "sft_steps", "weaver_steps", "trigger_steps")
    sizes = dict.fromkeys(
        (*steps, "batch_size", "weaver_problems", "num_generations", "held_out"), 2
    )
    sizes["trigger_problems"] = 4  # 8 rows, as many as six held-out questions fill: one program
    every: dict[str, Any] = {**sizes, "seeds": (0,), "out": str(out), **changes}
    return remember.Experiment(**every)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer and few maps to adapt: compiling is most of the work."""
    lora = memgen.LoRAConfig(2, 4.0, targets=("q", "v"))
    weaver = dataclasses.replace(remember.MEMGEN.weaver, lora=lora)
    monkeypatch.setattr(remember, "REASONER", dataclasses.replace(remember.REASONER, num_layers=1))
    monkeypatch.setattr(remember, "MEMGEN", dataclasses.replace(remember.MEMGEN, weaver=weaver))
    monkeypatch.setattr(remember, "TRIGGER", dataclasses.replace(remember.TRIGGER, lora=lora))


def test_questions_and_their_answers():
    numbers = np.array([3, 0, 7])
    assert question("copy", numbers) == ("c3 0 7=", "3,0,7")
    assert question("reverse", numbers) == ("r3 0 7=", "7,0,3")
    assert question("sort", numbers) == ("s3 0 7=", "0,3,7")
    task = Questions(0, {"sort": 1.0})
    problem = task.problem("train", 5)
    assert problem == task.problem("train", 5) != task.problem("train", 6)
    assert problem.kind == "sort"

    def value(text: str, finished: bool = True) -> float:
        return task.score(Completion(problem, text, (), finished)).value

    assert value(problem.answer) == 1
    assert value(problem.answer, finished=False) == value(problem.answer + ",") == value("") == 0


def test_held_out_lists_are_never_trained_on():
    held_out = {tuple(numbers) for numbers in UNSEEN}
    assert len(held_out) == HELD_OUT and not held_out & {tuple(numbers) for numbers in SEEN}
    task = Questions(0, {"copy": 0.5, "sort": 0.5})
    asked = [task.problem("test", index) for index in range(HELD_OUT * len(KINDS))]
    assert {problem.kind for problem in asked} == set(KINDS)
    lists = {tuple(int(digit) for digit in problem.prompt[1:-1].split()) for problem in asked}
    assert lists == held_out
    for split in range(50):
        prompt = task.problem("train", split).prompt
        assert tuple(int(digit) for digit in prompt[1:-1].split()) not in held_out


def test_only_answers_are_supervised():
    batch = rows(np.random.default_rng(0), 20, {"copy": 0.5, "sort": 0.5})
    decode, end = ByteTokenizer().decode, ByteTokenizer.separator
    for tokens, loss_mask in zip(batch["tokens"], batch["loss_mask"], strict=True):
        real = tokens[tokens >= 0]
        assert real[0] == end and real[-1] == end
        prompt, equals, answer = decode(real[1:-1].tolist()).partition("=")
        kind = {"c": "copy", "s": "sort"}[prompt[0]]
        numbers = np.array([int(digit) for digit in prompt[1:].split()])
        assert question(kind, numbers) == (prompt + equals, answer)
        assert decode(tokens[loss_mask][:-1].tolist()) == answer


@pytest.mark.experiment
def test_runs_are_resumed_and_reported(tmp_path, capsys, small):
    """`python -m pytest -m experiment tests/test_rl_memgen_experiment.py`, half a minute."""
    out = tmp_path / "remember.jsonl"
    remember.main(experiment(out, arms=("reasoner alone",)))
    first = out.read_text()
    arms = ("reasoner alone", remember.ALWAYS, TRIGGER)
    remember.main(experiment(out, arms=arms))
    assert out.read_text().startswith(first), "what is finished is not run again"
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [result["arm"] for result in results] == list(arms)
    alone, always, trigger = results
    assert alone["reasoner"] == always["reasoner"], "a seed's reasoner can be had again"
    assert alone["weaver"] == always["weaver"], "no answer was right: there is nothing to learn"
    assert always["weaver"] == trigger["weaver"]
    assert (alone["rate"], always["rate"]) == (0, 1) and 0 < trigger["rate"] < 1
    assert always["rollouts"] == 2 * 2 * 2 <= always["tokens"] <= 6 * 8
    assert len(trigger["curve"]["copy/right"]) == 2
    assert set(trigger["argmax"]["kinds"]) == set(KINDS)
    capsys.readouterr()
    remember.main(remember.Experiment(report=str(out)))
    table = capsys.readouterr().out
    for name in (*arms, f"{TRIGGER}: argmax", f"{TRIGGER}: coin"):
        assert f"| {name} | 0 |" in table
    difference = 100 * (trigger["accuracy"] - always["accuracy"])
    spared = 100 * trigger["invocations"] / always["invocations"]
    assert f"| {TRIGGER} | {difference:.1f} | " in table and f" | {spared:.0f} % |" in table


def test_an_unknown_arm_is_named():
    with pytest.raises(ValueError, match="unknown arm 'best': choose from reasoner alone, weaver"):
        remember.Experiment(arms=("best",))


def test_more_held_out_questions_than_there_are_is_one_line():
    with pytest.raises(ValueError, match="held_out=301: there are 300 held-out questions of each"):
        remember.Experiment(held_out=301)

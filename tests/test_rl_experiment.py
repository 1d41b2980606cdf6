"""The experiment of reinforcement learning: its controls are what they say, its runs go on."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx
from rl_tiny import MODELS

from thoughtbubbles import Thoughtbubbles
from train.data import ByteTokenizer
from train.devices.mesh import make_mesh
from train.experiments import needle, plateau, reinforce
from train.experiments.study import read_results
from train.models.load import LanguageModel
from train.rl.tasks.arithmetic import Arithmetic
from train.rl.tasks.strings import Reverse
from train.rl.types import Completion

MODEL = MODELS["shallow"]
TINY = reinforce.TaskSetup("reverse(length=2, shortest=2)", 8, 0.9, 2, 3)


def test_it_does_what_is_missing_and_reports(tmp_path, capsys, monkeypatch):
    one_device = functools.partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr("train.rl.job.make_mesh", lambda config, _: one_device(config))
    monkeypatch.setattr(reinforce, "MODEL", MODEL)
    monkeypatch.setitem(reinforce.TASKS, "reverse", TINY)
    out = tmp_path / "found.jsonl"
    config = reinforce.Experiment(
        tasks=("reverse",), arms=("demonstrations",), seeds=(0,), steps=2, batch_size=2,
        num_generations=4, rows=8, out=str(out),
    )  # fmt: skip
    reinforce.main(config)
    before = out.read_text()
    reinforce.main(dataclasses.replace(config, arms=("demonstrations", "grpo")))
    assert out.read_text().startswith(before), "what is finished is not run again"
    shown, learned = map(json.loads, out.read_text().splitlines())
    assert (shown["arm"], learned["arm"]) == ("demonstrations", "grpo")
    assert learned["before"] == shown["before"] == learned["held_out"][0][1]
    assert learned["after"] == learned["held_out"][-1][1]
    assert learned["rollouts"] == 2 * 2 * 4 and learned["updates"] == shown["updates"] == 2
    assert 16 <= learned["tokens"] <= 16 * TINY.max_new_tokens
    capsys.readouterr()
    reinforce.main(reinforce.Experiment(report=str(out)))
    table = capsys.readouterr().out.splitlines()
    assert table[3].startswith(f"| reverse | grpo | 0 | {100 * learned['before']:.1f} |")
    assert len(table) == 4


def test_a_coin_pays_whatever_is_said_and_success_is_told_as_it_is():
    task = Reverse()
    coin = reinforce.Coin(task, 0.3, seed=0)
    problem = coin.problem("train", 0)
    assert problem == task.problem("train", 0)
    answers = (problem.answer, "no")
    paid = {
        text: [coin.score(Completion(problem, text, (1,), True)) for _ in range(400)]
        for text in answers
    }
    for text, rewards in paid.items():
        assert all(reward.success == (text == problem.answer) for reward in rewards)
        assert np.mean([reward.value for reward in rewards]) == pytest.approx(0.3, abs=0.07)


def test_held_out_problems_do_not_say_when_demonstrations_end():
    task = Reverse()
    tried = reinforce.ValidationTask(task)
    held_out = {task.problem("test", index).uid for index in range(50)}
    looked_at = {tried.problem("test", index).uid for index in range(50)}
    assert not held_out & looked_at
    assert looked_at != {tried.problem("train", index).uid for index in range(50)}


def test_only_answers_and_their_ends_are_supervised():
    writer = LanguageModel(Thoughtbubbles(MODEL, rngs=nnx.Rngs(0)), ByteTokenizer())
    problems = [Arithmetic().problem("train", index) for index in range(3)]
    rows = reinforce.answered(writer, problems)
    for problem, tokens, trained, length in zip(problems, *rows.values(), strict=True):
        read = [ByteTokenizer.separator, *problem.prompt.encode()]
        said = [*problem.answer.encode(), ByteTokenizer.separator]
        assert tokens[:length].tolist() == read + said
        assert tokens[trained].tolist() == said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ("chess",)}, "unknown task 'chess': choose from reverse, sort"),
        ({"arms": ("a2c",)}, "unknown arm 'a2c': choose from grpo"),
        ({"arms": ("dapo(clip=1)",)}, r"method 'dapo\(clip=1\)': write dapo\(clip_low"),
    ],
    ids=str,
)
def test_unknown_names_are_one_line(changes, words):
    with pytest.raises(ValueError, match=words):
        reinforce.Experiment(**changes)


def test_outcomes_and_late_rollouts_in_mixed_groups_have_columns():
    cost = {"cpu_seconds": 60, "baseline_cpu_seconds": 60, "updates": 2, "rollouts": 8, "tokens": 9}
    arm = {"task": "sort", "arm": "truthrl", "before": 0.5, "after": 0.75}
    outcomes = {"accuracy": [0.5, 0.25], "uncertain": [0.0, 0.5], "hallucination": [0.5, 0.25],
                "truthfulness": [0.0, 0.0]}  # fmt: skip
    tenths = {"mixed_groups": [0.0] * 4, "mixed_rollouts": [0.0, 1.0, 0.25, 0.75]}
    found = {**cost, **arm, "seed": 0, "outcomes": outcomes, "tenths": tenths}
    assert reinforce.late_mixed(found) == 0.5
    assert reinforce.late_mixed({"tenths": {"mixed_groups": [0.0, 1.0]}}) == 1.0
    lines = reinforce.report([found]).splitlines()
    assert lines[2].endswith("| 2.0 | 50.0 |")
    assert lines[-2:] == [
        "| sort | truthrl | before | 50.0 | 0.0 | 50.0 | 0.0 |",
        "| sort | truthrl | after | 25.0 | 50.0 | 25.0 | 0.0 |",
    ]


def test_steps_that_had_nothing_to_learn_from_are_in_the_curves():
    empty = {"reward": 0.0, "success": 0.0, "rollouts": 4, "length": 2.0}
    empty |= {"rollout_seconds": 1.0, "update_seconds": 0.0, "mixed_groups": 0.0}
    learned = empty | {"reward": 1.0, "clipped": 0.5}
    found = reinforce.of_a_run([empty, learned, {"step": 2, "eval/success": 0.25}])
    assert found["rollouts"] == 8 and found["tokens"] == 16 and found["held_out"] == [[2, 0.25]]
    assert found["tenths"]["clipped"] == [None, 0.5] and found["tenths"]["reward"] == [0.0, 1.0]
    assert "clipped" not in reinforce.of_a_run([empty])["tenths"]


@pytest.mark.experiment
def test_a_plateau_is_trained_and_gone_on_from(tmp_path, monkeypatch):
    """python -m pytest -n 0 tests/test_rl_experiment.py -m experiment"""
    one_device = functools.partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr("train.rl.job.make_mesh", lambda config, _: one_device(config))
    monkeypatch.setattr(reinforce, "MODEL", MODEL)
    monkeypatch.setitem(reinforce.TASKS, "reverse", TINY)
    out = tmp_path / "out.jsonl"
    plateau.main(
        plateau.Plateau(
            task="reverse", steps=3, more=4, few=2, many=4, batch_size=2, minibatches=2,
            learning_rate=1e-2, rows=8, seeds=(0,), out=str(out),
        )
    )  # fmt: skip
    flat, longer, broader = read_results(out)
    assert flat["after"] == longer["before"] == broader["before"]
    assert flat["after"] == flat["held_out"][-1][1] == longer["held_out"][0][1]
    for found, steps, rollouts in ((flat, 3, 2), (longer, 4, 2), (broader, 2, 4)):
        assert found["rollouts"] >= steps * 2 * rollouts
        assert found["after"] == found["updates"] == 0, "nothing is right: no step learns"
        rate = 1e-2 * (rollouts / 2) ** 0.5
        assert found["scaled_learning_rate"] == pytest.approx(rate)


def test_both_ways_from_a_plateau_learn_from_equally_many_rollouts(tmp_path, monkeypatch, capsys):
    runs = []

    class Baseline:
        success, lm = 0.25, "mediocre"

        def __init__(self, config, task, seed):
            assert (task, config.batch_size, config.rows) == ("sort", 4, 32)

    def run(config, baseline, steps, rollouts, folder):
        runs.append((baseline.lm, steps, rollouts))
        cost = {"rollouts": 4 * steps * rollouts, "tokens": 9, "updates": steps, "cpu_seconds": 1.0}
        return {"after": 0.5 + len(runs) / 8, **cost}

    monkeypatch.setattr(plateau.reinforce, "Baseline", Baseline)
    monkeypatch.setattr(plateau, "_train", run)
    monkeypatch.setattr(plateau, "load_language_model", lambda folder: "flat")
    config = plateau.Plateau(
        task="sort", steps=5, more=12, few=4, many=16, batch_size=4, rows=32, seeds=(0,),
        out=str(tmp_path / "out.jsonl"),
    )  # fmt: skip
    plateau.main(config)
    assert runs == [("mediocre", 5, 4), ("flat", 12, 4), ("flat", 3, 16)]
    plateau.main(config)
    assert len(runs) == 3
    capsys.readouterr()
    other = {**read_results(config.out)[0], "many": 8, "after": 1.0}
    with open(config.out, "a") as file:
        file.write(json.dumps(other) + "\n")
    plateau.main(dataclasses.replace(config, report=config.out))
    lines = capsys.readouterr().out.splitlines()
    assert "few 4, many 16, batch_size 4" in lines[0] and "few 4, many 8, " in lines[8]
    rows = [line.split(" | ") for line in lines[4:7]]
    shown = [(row[0], row[2], row[3], row[4], row[5]) for row in rows]
    assert shown == [
        ("| flat", "25.0", "62.5", "+37.5", "80"),
        ("| longer", "62.5", "75.0", "+12.5", "192"),
        ("| broader", "62.5", "87.5", "+25.0", "192"),
    ]
    with pytest.raises(ValueError, match="few=4, many=18, more=12: choose many as a multiple"):
        dataclasses.replace(config, many=18)


def test_stretched_needles_lie_in_the_node_of_their_name():
    """And a task that can't be stretched so far is refused before others have run for hours."""
    for stretch in (1, 4):
        places = {}
        for name in ("late", "middle", "early"):
            task, longest, step_len = needle.TASKS[name](stretch)
            answer = task.problem("train", 0).answer
            assert answer[task.at] in "yz" and len(answer) + 1 == longest == 24 * stretch
            places[name] = task.at // step_len
        assert places == {"late": 5, "middle": 2, "early": 0}
    assert needle.Experiment(tasks=("late",), stretch=20).stretch == 20
    with pytest.raises(
        ValueError, match="stretch=20 of task sums: arithmetic: digits=40: choose 9"
    ):
        needle.Experiment(stretch=20)

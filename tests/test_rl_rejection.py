"""Data for supervised fine-tuning by a policy and a verifier: what is kept, what is relabelled."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rl_tiny import Vowels, language_model

from train.data.json_lines import read_json_lines
from train.rl.job import RLJob
from train.rl.named_tasks import make_task
from train.rl.rejection import RejectionConfig, accepted, conversations, relabelled, save
from train.rl.rejection import main as write_data
from train.rl.tasks.probed import is_probe
from train.rl.types import Completion
from train.runs.appended import append_objects


def test_right_answers_of_a_policy_are_data_for_fine_tuning(tmp_path: Path):
    """Different ones, so many of a problem; abstentions alone where it is out of knowledge."""
    config = RejectionConfig(
        weights="base", task="copy", samples=8, pool=4, batch_size=4, max_new_tokens=2, keep=2,
        top_p=0.9, out=str(tmp_path / "data" / "rft.jsonl"),
    )  # fmt: skip

    class Half(Vowels):
        """Vowels of which two are out of knowledge; two high bytes abstain."""

        unknown = "\ufffd" * 2

        def out_of_knowledge(self, problem):
            return problem.uid in ("train1", "train3")

    made = RLJob(config.rl, language_model("shallow"), Half())
    strategy, given = made.collector.strategy, {}

    def watched(*arguments: Any) -> list[Any]:
        found = strategy.collect(*arguments)
        found = [dataclasses.replace(row, finished=True) for row in found]
        cut = next(at for at, row in enumerate(found) if row.reward.info["accuracy"])
        found[cut] = dataclasses.replace(found[cut], finished=False)
        given.update({(row.group, row.episode): row for row in found})
        return found

    made.collector.strategy = cast(Any, SimpleNamespace(collect=watched))
    lines = list(accepted(config, made))
    for group, problem in enumerate(made.task.problem("train", index) for index in range(4)):
        name = "uncertain" if group % 2 else "accuracy"
        right = [
            row.texts[0] for (at, _), row in given.items()
            if at == group and row.reward.info[name] and row.finished
        ]  # fmt: skip
        mine = [line for line in lines if line["uid"] == problem.uid]
        assert [line["completion"] for line in mine] == list(dict.fromkeys(right))[:2]
        assert {line["prompt"] for line in mine} <= {problem.prompt}
    assert len({line["uid"] for line in lines}) > 2

    def interrupted():
        yield from lines[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(str(tmp_path / "some.jsonl"), interrupted())
    some = read_json_lines(tmp_path / "some.jsonl")
    assert [line.fields for line in some] == lines[:2], "what was found stays"
    assert save(config.out, lines) == len(lines)
    read = [line.fields for line in read_json_lines(Path(config.out), ("prompt", "completion"))]
    assert read == lines
    with pytest.raises(ValueError, match="no sampled answer is right: nothing is written"):
        save(str(tmp_path / "none.jsonl"), [])
    assert not (tmp_path / "none.jsonl").exists()
    with pytest.raises(ValueError, match="rft.jsonl exists: choose another file"):
        write_data(config)
    with pytest.raises(ValueError, match="rft.jsonl is no folder: choose another place"):
        write_data(dataclasses.replace(config, out=f"{config.out}/more.jsonl"))
    for changes, message in (
        ({"data": "dpo"}, "data='dpo': choose rft or r_tuning"),
        ({"keep": 0}, "keep=0: choose 1 or more"),
        ({"batch_size": 0, "data": "r_tuning"}, "batch_size=0: choose 1 or more"),
        ({"max_rows": 0, "data": "r_tuning"}, "max_rows=0: choose 1 or more"),
        ({"max_new_tokens": 0, "data": "r_tuning"}, "max_new_tokens=0: choose 1 or more"),
        ({"pool": 0, "data": "r_tuning"}, "pool=0: choose 1 or more, or leave it out"),
        ({"strategy": "turns", "data": "r_tuning"}, "strategy='turns': data='r_tuning' samples"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **cast(Any, changes))


def test_questions_out_of_knowledge_are_relabelled(tmp_path: Path, monkeypatch, capsys):
    """R-Tuning: by the task, or by a probe; nothing is sampled."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "my data" / "tuned.jsonl"
    out = "~/my data/tuned.jsonl"
    config = RejectionConfig(task="hidden_facts", data="r_tuning", pool=20, out=out)
    write_data(config)
    assert capsys.readouterr().out.endswith(f" thoughtbubbles sft --data.path '{path}'\n")
    task, lines = make_task("hidden_facts", 0), [line.fields for line in read_json_lines(path)]
    expected = {
        problem.uid: (problem.prompt, "?" if problem.kind == "hidden" else problem.answer)
        for problem in (task.problem("train", index) for index in range(20))
    }
    found = {line["uid"]: (line["prompt"], line["completion"]) for line in lines}
    assert found == expected and len(lines) == len(found)
    assert 0 < sum(text == "?" for _, text in found.values()) < len(found)
    boxes = dataclasses.replace(config, boxed=True)
    truthful = boxes.scorer.of_task(task)
    for line, problem in zip(
        relabelled(boxes, task), (task.problem("train", at) for at in range(20)), strict=True
    ):
        assert line["completion"] == rf"\boxed{{{found[problem.uid][1]}}}"
        info = truthful.score(Completion(problem, line["completion"], (), True)).info
        assert info["uncertain" if problem.kind == "hidden" else "accuracy"] == 1
    probe = tmp_path / "probe.jsonl"
    sums = dataclasses.replace(
        config, task="arithmetic", pool=3, probe="~/probe.jsonl", unknown="no"
    )
    problems = [make_task("arithmetic", 0).problem("train", index) for index in range(3)]
    counts = [{"uid": one.uid, "correct": at, "samples": 2} for at, one in enumerate(problems)]
    append_objects(probe, [{"probe": {}}, *counts], is_probe)
    relabels = list(relabelled(sums, make_task("arithmetic", 0)))
    assert [line["completion"] for line in relabels] == ["no", *(p.answer for p in problems[1:])]
    with pytest.raises(ValueError, match="has not problem .* probe as many problems as pool=9"):
        list(relabelled(dataclasses.replace(sums, pool=9), make_task("arithmetic", 0)))
    with pytest.raises(ValueError, match="is for tasks of one response, guess_number has turns"):
        list(relabelled(config, make_task("guess_number", 0)))
    with pytest.raises(ValueError, match="out of knowledge: give probe=FILE"):
        list(relabelled(dataclasses.replace(sums, probe=""), make_task("arithmetic", 0)))


def test_no_task_is_made_to_see_whether_it_has_turns():
    """Golds in LaTeX take a while: the config asks the class whether there are turns."""
    kinds = {"arithmetic": False, "reverse(length=4)": False, "guess_number(high=6)": True,
             "gem:game:Mastermind-v0-easy": True, "math:problems.jsonl": False}  # fmt: skip
    assert {spec: RejectionConfig(task=spec).reward == () for spec in kinds} == kinds


def test_options_of_one_response_are_refused_for_environments():
    for name, value in (("probe", "probe.jsonl"), ("boxed", True), ("unknown", "?")):
        config = RejectionConfig(task="guess_number", **cast(Any, {name: value}))
        with pytest.raises(ValueError, match=f"{name}=.* is of tasks of one response, guess"):
            write_data(config)


def test_an_episode_is_a_conversation():
    """One with a chat template; without, a completion of the text so far for each turn."""
    environment = make_task("guess_number(high=6)", 0)
    problem = dataclasses.replace(environment.problem("train", 0), answer=4)
    [chat] = conversations(environment, problem, ["2", "5", "4"], chat=True)
    said = ["1-6? ", "2", " higher ", "5", " lower ", "4"]
    assert [message["content"] for message in chat["messages"]] == said
    assert [message["role"] for message in chat["messages"]] == ["user", "assistant"] * 3
    short = lambda text: text[:3]  # noqa: E731
    lines = list(conversations(environment, problem, ["2", "5", "4"], seen=short))
    prompts = ["1-6? ", "1-6? 2 hi", "1-6? 2 hi5 lo"]
    assert [(line["prompt"], line["completion"]) for line in lines] == [
        *zip(prompts, ["2", "5", "4"], strict=True)
    ]

"""The experiment on Sokoban's prompts: its tokens, its data, a tiny run, and its results."""

import dataclasses
from pathlib import Path

import jax
import pytest

from thoughtbubbles import ModelConfig
from train.data.chat_templates import chat_examples
from train.data.json_lines import read_json_lines
from train.data.verbalise import answer_in, verbalise
from train.devices.mesh import MeshConfig, make_mesh
from train.experiments import prompt_study
from train.experiments import sokoban_prompts as study
from train.finetuning.battery import BatteryConfig
from train.rl.environments.sokoban_levels import Level, solve
from train.rl.environments.sokoban_variants import STEPS

RESULTS = Path(__file__).resolve().parents[1] / "docs/results/sokoban_prompts.jsonl"
GAME = study.GAME
WORDS = study.tokenizer()


def test_texts_of_all_variants_are_read_back():
    """What is decoded is encoded to the same ids, which the battery's next prompts rely on."""
    environments = BatteryConfig(f"{study.TASK})", GAME.variants).environments()
    assert WORDS.vocab_size <= GAME.model.vocab_size
    for environment in environments.values():
        for shown in environment.demonstrations("test", 3):
            response = verbalise(shown.trace, "both")
            for text in (shown.prompt.text, response):
                ids = WORDS.prompt(text)
                assert WORDS.id("<unknown>") not in ids and WORDS.prompt(WORDS.decode(ids)) == ids
            said = answer_in(WORDS.decode(WORDS.prompt(response)))
            assert said == shown.trace.answer and shown.prompt.is_valid(said)


def test_the_first_conversations_are_true():
    boxes, thoughts = set(), set()
    for record in study.base_records(20, seed=0):
        said = [message["content"] for message in record["messages"]]
        names, *rows = said[0].split("\n")[:-1]
        asked = [said[0].rpartition("\n")[2], *said[2::2]]
        named = dict(zip(names.split()[::2], names.split()[1::2], strict=True))
        answers = dict(zip(asked, said[1::2], strict=True))
        assert len(asked) == 3 and tuple(named) == tuple(STEPS)
        level = Level.from_rows(rows)
        boxes.add(len(level.boxes))
        way = answers.pop(study.WAY).removeprefix("<think>The way is ").removesuffix(".</think>")
        assert "".join(step[0] for step in way.split()) == solve(level)
        for step, answer in answers.items():
            assert answer_in(answer) == named[step]
            thoughts.add("<think>Now " in answer)
        [example] = chat_examples(WORDS, record["messages"])
        ends = [index for index, id_ in enumerate(example.ids) if id_ == WORDS.stop_ids[0]]
        assert len(ends) == 3 and all(example.loss_mask[index] for index in ends)
    assert boxes == {1, 2} and thoughts == {False, True}


TINY = {"seeds": (0,), "base_states": 40, "base_steps": 1, "states": 40, "steps": 1, "episodes": 1}


def test_arms_differ_in_names_and_thoughts_and_are_reported(tmp_path, monkeypatch, capsys):
    """Nothing is trained here; what is finished is not done again."""
    data = {}
    score = {"success": 0.25, "validity": 0.5}
    sft = lambda base, rows, *_, **__: data.update({rows.path: read(Path(*rows.path))})  # noqa: E731
    early = {"1": dict.fromkeys(GAME.early, 0.75)}
    for name, value in (
        ("pretrained", lambda config, game, seed: tmp_path / "base"),
        ("sft", sft),
        ("played", lambda out, battery: dict.fromkeys(GAME.variants, score)),
        ("validities", lambda out, variants: early),
    ):
        monkeypatch.setattr(prompt_study, name, value)
    config = study.SokobanPrompts(**TINY, out=str(tmp_path / "found.jsonl"))
    study.main(config)
    assert len(data) == len(prompt_study.ARMS) == 6
    for arm, records in zip(prompt_study.ARMS, data.values(), strict=True):
        names = {tuple(record["names"].values()) for record in records}
        assert (len(names) > 30) == arm.endswith("diverse") and len(records) == 40
        assert ((tuple(STEPS),) == tuple(names)) == arm.endswith("frozen")
        thoughts = [record["completion"].startswith("<think>The way is ") for record in records]
        assert all(thoughts) if arm.startswith("thoughts") else not any(thoughts)
        answers = ["<answer>" in record["completion"] for record in records]
        assert not any(answers) if "alone" in arm else all(answers)
    boards = [[record["prompt"].partition("\n")[2] for record in of] for of in data.values()]
    assert all(of == boards[0] for of in boards)
    data.clear()
    study.main(config)
    assert not data
    capsys.readouterr()
    study.main(dataclasses.replace(config, report=config.out))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| answers, frozen | " + "0.25 | " * len(GAME.columns) + "0 |"
    assert lines[3].startswith("| answers, frozen: paper | .98 | 0 |  |")
    assert lines[15] == "| answers, frozen | " + "0.50 | " * len(GAME.columns) + "0 |"
    assert lines[-1] == "| thoughts alone, diverse | 1 | 0.75 | 0.75 | 0.75 |"


def read(file):
    return [line.fields for line in read_json_lines(file)]


@pytest.mark.experiment
def test_the_chain_runs_to_its_end(tmp_path, monkeypatch):
    """Base, one arm, and its battery on one board, through the commands' own functions."""
    monkeypatch.setattr("train.finetuning.job.make_mesh", lambda config: one_device())
    model = ModelConfig(GAME.model.vocab_size, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=32)
    tiny = dataclasses.replace(GAME, model=model, columns={"ID": ("id",)}, early=("id",))
    monkeypatch.setattr(study, "GAME", tiny)
    monkeypatch.setattr(prompt_study, "BATCH", 2)
    config = study.SokobanPrompts(
        arms=("answers, frozen",), **TINY, runs=str(tmp_path), out=str(tmp_path / "found.jsonl")
    )
    study.main(config)
    [result] = read(Path(config.out))
    assert result["scores"]["id"] == {
        "success": 0, "error": 0, "validity": 0, "turns": 30, "cut": result["scores"]["id"]["cut"]
    }  # fmt: skip
    assert result["early"] == {"1": {"id": 0.0}}


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown arm 'both': choose from answers, frozen, ans"):
        study.SokobanPrompts(arms=("both",))


def test_results_on_file_show_the_frozen_prompt():
    found = [(run["arm"], run["scores"]) for run in read(RESULTS)]
    frozen = [scores for arm, scores in found if arm == "answers, frozen"]
    assert all(scores["held_out"]["validity"] < 0.5 for scores in frozen)
    shortcuts = [scores["fake"]["success"] > 0.3 for scores in frozen]
    assert shortcuts == [True, False, True], "of seed 1 the page says that it is not there"
    assert all(scores["fake"]["success"] < 0.1 for arm, scores in found if "though" in arm)
    assert prompt_study.report(read(RESULTS), GAME).count("paper") == 4

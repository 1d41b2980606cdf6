"""The experiment on General Points' prompts: its tokens, its data, and its results."""

import re
from pathlib import Path

from train.data.chat_templates import chat_examples
from train.data.json_lines import read_json_lines
from train.data.verbalise import answer_in, verbalise
from train.experiments import points_prompts as study
from train.experiments import prompt_study
from train.finetuning.battery import BatteryConfig
from train.rl.environments.general_points import FACES
from train.rl.environments.general_points_solver import value_of
from train.rl.problems import is_held_out

RESULTS = Path(__file__).resolve().parents[1] / "docs/results/points_prompts.jsonl"
GAME = study.GAME
WORDS = study.tokenizer()


def test_texts_of_all_variants_are_read_back():
    """And answers stay one word, which thoughts that end in them need."""
    assert WORDS.vocab_size <= GAME.model.vocab_size
    for name, environment in BatteryConfig(f"{study.TASK})", GAME.variants).environments().items():
        for shown in environment.demonstrations("test", 3):
            prompt = WORDS.prompt(shown.prompt.text)
            assert WORDS.id("<unknown>") not in prompt
            if name == "large":  # formulas of such numbers are in no training
                continue
            for form in ("answer", "thoughts", "both"):
                ids = WORDS.prompt(verbalise(shown.trace, form))
                assert WORDS.id("<unknown>") not in ids
                assert WORDS.prompt(WORDS.decode(ids)) == ids and len(ids) < GAME.max_new_tokens
                assert answer_in(WORDS.decode(ids)) == shown.trace.answer
                assert len(prompt) + len(ids) <= GAME.tuning_seq_len


def test_the_first_conversations_are_true_and_of_training_numbers():
    equal, alone = set(), set()
    for record in study.base_records(20, seed=0):
        said = [message["content"] for message in record["messages"]]
        counts, cards, target, first = said[0].split("\n")
        counted = dict(zip(counts.split()[::2], counts.split()[1::2], strict=True))
        answers = dict(zip([first, *said[2::2]], said[1::2], strict=True))
        assert tuple(counted) == FACES and target == str(study.TARGET) and len(answers) == 4
        equal.add(len(set(counted.values())) == 1)
        dealt = cards.split(", ")
        as_counted = [counted.get(card, card) for card in dealt]
        told = f"{' '.join(dealt)} count as {' '.join(as_counted)}."
        assert answers.pop(study.COUNT) == f"<think>{told}</think>"
        [face] = set(answers) & set(FACES)
        assert answer_in(answers.pop(face)) == counted[face]
        hands = [list(map(int, re.findall("[0-9]+", asked))) for asked in answers]
        for hand, answer in zip(hands, answers.values(), strict=True):
            assert value_of(answer_in(answer), hand) == study.TARGET
            alone.add(answer.startswith("<think></think>"))
        for hand in (*hands, map(int, as_counted)):
            assert not is_held_out(f"general_points {sorted(hand)}")
        [example] = chat_examples(WORDS, record["messages"])
        assert len(example.ids) <= GAME.seq_len + 1 and WORDS.id("<unknown>") not in example.ids
    assert equal == alone == {False, True}


def test_training_hands_are_reported_too():
    scores = dict.fromkeys(GAME.variants, {"success": 0.25, "validity": 0.5})
    trained = dict.fromkeys(GAME.variants, {"success": 0.75, "validity": 1.0})
    run = dict.fromkeys(prompt_study.KEY, 1) | {"arm": "thoughts, frozen", "seed": 0}
    early = {"50": dict.fromkeys(GAME.early, 0.5)}
    run |= {"scores": scores, "trained": trained, "early": early}
    lines = prompt_study.report([run], GAME).splitlines()
    of = len(GAME.columns)
    assert lines[2] == "| thoughts, frozen | " + "0.25 | " * of + "0 |"
    assert lines[3].startswith("| thoughts, frozen: paper | .95 | .90 | .90 | .85 | .86 |")
    assert lines[11] == "| thoughts, frozen | " + "0.75 | " * of + "0 |"
    assert lines[15] == "| thoughts, frozen | " + "1.00 | " * of + "0 |"


def test_results_on_file_show_who_reads_the_prompt():
    runs = [line.fields for line in read_json_lines(RESULTS)]
    found = {(run["arm"], run["seed"]): run["trained"] for run in runs}
    assert len(found) == 3 * len(prompt_study.ARMS)
    for seed in range(3):
        assert found["answers, frozen", seed]["held_out"]["validity"] < 0.5
        assert found["thoughts, diverse", seed]["fake"]["success"] < 0.1
        assert found["thoughts, diverse", seed]["held_out"]["success"] > 0.9
        read, kept = (found[f"thoughts, {arm}", seed]["regular"] for arm in ("diverse", "frozen"))
        assert read["success"] > kept["success"] and read["validity"] > kept["validity"]
    assert prompt_study.report(runs, GAME).count("paper") == 4

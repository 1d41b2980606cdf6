"""Sokoban and General Points whose prompt is an instruction: variants, solver, verifier, data."""

import dataclasses
import functools
import itertools
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train import demonstrations as command
from train.data import ByteTokenizer
from train.data.chat_data import ChatDataConfig, prepare_chat
from train.data.semantic_maps import TEMPLATES, PromptTemplate
from train.data.verbalise import answer_in, verbalise
from train.finetuning.battery import BatteryConfig
from train.rl.environments.general_points import DIVERSE, LARGE, GeneralPoints
from train.rl.environments.general_points_solver import formula_text, solve, steps, value_of
from train.rl.environments.players import completion_of, score_player
from train.rl.environments.sokoban_levels import Level
from train.rl.environments.sokoban_levels import solve as shortest
from train.rl.environments.sokoban_variants import STEPS, SokobanVariants
from train.rl.named_tasks import make_task
from train.rl.problems import is_held_out

ENVIRONMENTS = {"sokoban_variants": SokobanVariants, "general_points": GeneralPoints}
HELD_OUT = {"sokoban_variants": 40, "general_points": 2}
VARIANTS = [(word, name) for word, kind in ENVIRONMENTS.items() for name in kind.variants]


@functools.cache
def environment(word: str, variant: str, **options: Any) -> Any:
    return ENVIRONMENTS[word](variant=variant, held_out=HELD_OUT[word], **options)


def play(task: Any, problem: Any, answers) -> Any:
    """The last turn of an episode in which each state is answered."""
    state = task.reset(problem)
    while True:
        turn = task.step(state, completion_of(problem, answers(task.rendered(state.game), state)))
        state = turn.state
        if turn.terminated or turn.truncated:
            return turn


@pytest.mark.parametrize(("word", "variant"), VARIANTS)
def test_prompt_target_and_scorer_agree_in_every_variant(word, variant):
    """But in fake ones, where the expert follows the prompt, is valid, and fails."""
    task, form = environment(word, variant), "answer" if len(variant) % 2 else "both"
    fake = task.variants[variant].scored is not None
    prompts = []

    def expert(prompt, state):
        prompts.append(prompt.text)
        trace, _ = task.expert(state.game.inner, prompt)
        assert trace.thoughts.endswith(trace.answer)
        assert task.is_valid(state.game.inner, trace.answer, prompt)
        if word == "general_points":
            answer = json.loads(trace.answer)
            assert value_of(answer["formula"], answer["number"]) == 24
        return verbalise(trace, form)

    for split, index in [("train", 0)] if variant == "complex" else [("train", 1), ("test", 0)]:
        problem = task.problem(split, index)
        turn = play(task, problem, expert)
        assert problem.prompt in prompts
        assert turn.success != fake and turn.info["validity"] == 1


def test_fake_variants_count_what_the_prompt_does_not_show():
    for variant in ("fake", "fake_cardinal", "fake_emoji"):
        task = environment("sokoban_variants", variant)
        problem = task.problem("test", 0)
        names = {letter: name for name, letter in STEPS.items()}
        assert not set(STEPS) & set(task.rendered(task.begin(problem.answer)).shown.answers)
        original = lambda _, state, names=names: names[str(shortest(state.game.inner))[0]]  # noqa: E731
        turn = play(task, problem, original)
        assert turn.success and turn.info["validity"] == 0 and turn.info["malformed"] == 0
    task = environment("general_points", "fake")
    problem = task.problem("test", 0)
    cards = problem.answer["drawn"]
    assert "J counts as 5" in problem.prompt and set(cards) & {"J", "Q", "K"}
    numbers = [10 if card in "JQK" else int(card) for card in cards]
    formula = solved_text(numbers)
    turn = play(task, problem, lambda *_: formula)
    assert turn.success and turn.info["validity"] == 0


def test_validity_counts_answers_that_the_prompt_allows():
    task = environment("sokoban_variants", "alphabetical")
    problem = task.problem("train", 0)
    answers = iter(["A", "Up", "B", "<think>x</think><answer>C</answer>", *["D"] * 30])
    state, found = task.reset(problem), []
    for _ in range(4):
        turn = task.step(state, completion_of(problem, next(answers)))
        state = turn.state
        found.append(turn.info["validity"])
    assert found == pytest.approx([1, 1 / 2, 2 / 3, 3 / 4])
    assert turn.info["malformed"] == 1


def test_variants_are_those_of_the_paper():
    task = functools.partial(environment, "sokoban_variants")
    lines = {
        name: next(line for line in task(name).problem("test", 0).prompt.split("\n")
                   if line.startswith("Answers: "))
        for name in SokobanVariants.variants
    }  # fmt: skip
    assert lines["id"] == lines["larger"] == lines["complex"] == "Answers: Up, Down, Left, Right"
    assert lines["alphabetical"] == "Answers: A, B, C, D"
    assert lines["numerical"] == lines["fake"] == "Answers: 1, 2, 3, 4"
    assert lines["random"] == "Answers: *, &, 1, M"
    assert lines["cardinal"] == lines["fake_cardinal"] == "Answers: North, South, West, East"
    sizes = {"id": (6, 6, 1), "larger": (10, 10, 1), "two_boxes": (6, 6, 2), "complex": (10, 10, 2)}
    for name, size in sizes.items():
        level = Level.from_rows(task(name).problem("test", 3).answer["drawn"])
        assert (level.height, level.width, len(level.boxes)) == size
    drawn = [task("diverse").problem("train", i).answer["shown"]["names"] for i in range(30)]
    assert len({tuple(names.values()) for names in drawn}) == 30
    kept = [task("held_out").problem("train", i).answer["shown"]["names"] for i in range(30)]
    words = [{word for names in maps for word in names.values()} for maps in (drawn, kept)]
    assert len(words[1]) > 30 and not words[0] & words[1]
    points = functools.partial(environment, "general_points")
    for name, values in (("id", "10 10 10"), ("all_5", "5 5 5"), ("all_7", "7 7 7"),
                         ("all_12", "12 12 12"), ("regular", "11 12 13"),
                         ("fake", "5 5 5"), ("fake_regular", "11 12 13")):  # fmt: skip
        shown = [points(name).problem("test", i) for i in range(10)]
        assert all(" ".join(p.answer["shown"]["names"].values()) == values for p in shown)
        if name != "id":
            assert all(set(p.answer["drawn"]) & set("JQK") for p in shown)
    assert [" ".join(m.answers) for m in DIVERSE] == [
        "10 10 10", "11 11 11", "13 13 13", "9 10 11", "10 11 12", "7 9 11", "8 10 12", "9 11 13",
    ]  # fmt: skip
    for name, count in (("three", 3), ("id", 4), ("five", 5), ("large", 4)):
        drawn = [points(name).problem("train", i).answer["drawn"] for i in range(6)]
        assert all(len(cards) == count for cards in drawn)
        assert all(bool(set(cards) & set(LARGE)) == (name == "large") for cards in drawn)


def solved_text(numbers: list[int]) -> str:
    """A formula of these numbers that makes 24."""
    formula = solve(numbers, 24)
    assert formula is not None
    return formula_text(formula)


def every_value(numbers: tuple[Fraction, ...]) -> set[Fraction]:
    """All values of all formulas of some numbers, by taking two of them at a time."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        for value in (a + b, a - b, a * b, *([a / b] if b else [])):
            found |= every_value((value, *rest))
    return found


def test_the_solver_finds_a_formula_where_there_is_one():
    """Against all formulas of three and some four cards; `1 3 4 6` and `5 5 5 1` need fractions."""
    rng = np.random.default_rng(0)
    hands = list(itertools.combinations_with_replacement(range(1, 12), 3))[::6]
    hands += [tuple(map(int, rng.integers(1, 14, 4))) for _ in range(4)]
    hands += [(1, 3, 4, 6), (1, 5, 5, 5), (3, 3, 8, 8), (1, 1, 1, 1), (5, 5), (4, 6)]
    solved = 0
    for hand in hands:
        formula = solve(hand, 24)
        values = every_value(tuple(map(Fraction, hand)))
        assert (formula is not None) == (Fraction(24) in values), hand
        if formula is not None:
            text = formula_text(formula)
            assert value_of(text, hand) == 24 and Fraction(eval(_exact(text))) == 24
            assert steps(formula)[-1].endswith("=24") and len(steps(formula)) == len(hand) - 1
            solved += 1
    assert solved > 10
    assert solve((24,), 24) == 24 and solve((23,), 24) is None
    five = solve((1, 5, 7, 11, 13), 24)
    assert five and value_of(formula_text(five), (13, 11, 7, 5, 1)) == 24
    with pytest.raises(ValueError, match="choose 1 to 5 numbers, all above 0"):
        solve((1, 2, 3, 4, 5, 6), 24)


def _exact(text: str) -> str:
    """A formula whose numbers are fractions, for Python."""
    return "".join(f" Fraction({t}) " if t.isdigit() else t for t in _tokens(text))


def _tokens(text: str) -> list[str]:
    return ["".join(part) for _, part in itertools.groupby(text, str.isdigit)]


def test_the_verifier_takes_exactly_the_dealt_numbers():
    """Against Python's own values of random texts of legal and other tokens."""
    rng = np.random.default_rng(1)
    tokens = ["1", "2", "3", "10", "+", "-", "*", "/", "(", ")", " "]
    right = 0
    for _ in range(6000):
        text = "".join(tokens[i] for i in rng.integers(0, len(tokens), rng.integers(1, 8)))
        numbers = [1, 2, 10][: rng.integers(1, 4)]
        parts = [t for t in _tokens(text) if t.isdigit()]
        expected = None
        if Counter(map(int, parts)) == Counter(numbers) and "//" not in text and "**" not in text:
            try:
                expected = eval(_exact(text).strip(), {"Fraction": Fraction})
            except (SyntaxError, ZeroDivisionError, TypeError):
                expected = None
        assert value_of(text, numbers) == expected, (text, numbers)
        right += expected is not None
    assert right > 20
    for text in ("12+12", "4*6.0", "4*6+0", "24", "6*4*1", "٤*6", "4x6", "4*6" + " " * 10**6):
        assert value_of(text, [4, 6]) is None, text
    assert value_of(" 4 * (6) ", [6, 4]) == 24


def test_answers_of_general_points():
    task = environment("general_points", "id")
    problem = dataclasses.replace(task.problem("train", 0))
    numbers = [10 if card in "JQK" else int(card) for card in problem.answer["drawn"]]
    formula = solved_text(numbers)
    said = lambda text: play(task, problem, lambda *_: text)  # noqa: E731
    fields = {"cards": [], "formula": f"{formula}=24"}
    whole, long = json.dumps(fields), f"```json\n{json.dumps(fields, indent=2)}\n```\nThat is it."
    for text in (formula, f"{formula} = 24", f"24 = {formula}", f"{formula} = 24.", whole, long,
                 f"<think></think>{long}", f"<think></think><answer>{whole}</answer>"):  # fmt: skip
        assert said(text).success and said(text).info["validity"] == 1
    for text in ("+".join(map(str, numbers)), "-".join(map(str, numbers))):
        assert not said(text).success and said(text).info["validity"] == 1
    for text in (f"{formula}=23", f"{formula}+1", '{"formula": 24}', "{" * 500, "[]", "24"):
        assert not said(text).success and said(text).info["validity"] == 0
    for text, malformed in (("24", 0), (f"{formula}=23", 0), ("I give up", 1), ("()", 1), ("", 1),
                            (f"{formula}=24=24", 1), ('{"formula": "a b"}', 1)):  # fmt: skip
        assert said(text).info["malformed"] == malformed, text


def test_no_problem_of_training_is_a_test_problem_in_other_words():
    """J 2 3 4 and 10 2 3 4 are one of `id`; a board may come in the middle of an episode.

    And each hand has a formula as it is shown, which an expert demonstrates, and as it is scored.
    """
    found: dict[str, set[tuple[int, ...]]] = {"train": set(), "test": set()}
    for split, name in itertools.product(found, ("id", "regular", "fake", "diverse")):
        for index in range(60):
            answer = environment("general_points", name).problem(split, index).answer
            for way in ("shown", "scored"):
                names = answer[way]["names"]
                numbers = tuple(sorted(int(names.get(card, card)) for card in answer["drawn"]))
                assert solve(numbers, 24) is not None
            found[split].add(numbers)
    assert len(found["test"]) > 50 and not found["train"] & found["test"]
    boards = environment("sokoban_variants", "id")
    for shown in boards.demonstrations("train", 40):
        rows = shown.prompt.text.split("\n")[-7:-1]
        assert not is_held_out(boards.split_key((rows, "")))


@pytest.mark.parametrize("word", ENVIRONMENTS)
def test_demonstrations_are_a_function_of_seed_epoch_and_index(word):
    task = environment(word, "diverse", paraphrases=3)
    first = list(task.demonstrations("train", 30))
    assert list(task.demonstrations("train", 12)) == first[:12]
    assert len({one.prompt.paraphrase for one in first}) == 3
    later = list(task.demonstrations("train", 30, epoch=1))
    assert later != first and len({one.prompt.text for one in first}) > 25
    fixed = environment(word, "diverse", paraphrases=3, resample=False)
    assert list(fixed.demonstrations("train", 30, epoch=1)) == first
    if word == "sokoban_variants":  # other names, the same boards
        boards = lambda each: ["\n".join(d.prompt.text.split("\n")[-7:]) for d in each]  # noqa: E731
        original = environment(word, "id").demonstrations("train", 30)
        assert boards(original) == [b for b, d in zip(boards(first), first, strict=True)
                                    if d.prompt.paraphrase >= 0]  # fmt: skip
    test = {one.prompt.text for one in task.demonstrations("test", 30)}
    assert not test & {one.prompt.text for one in first}


def test_a_template_of_ones_own():
    mine = PromptTemplate(
        "mine", ("{Up} {Down} {Left} {Right}\n{board}",), tuple(STEPS), ("board",)
    )
    TEMPLATES["mine"] = mine
    try:
        task = make_task("sokoban_variants(template='mine', variant='numerical')", 0)
        assert task.problem("train", 0).prompt.startswith("1 2 3 4\n######\n")
        with pytest.raises(ValueError, match="'general_points': choose from sokoban, .*mine"):
            make_task("sokoban_variants(template='general_points')", 0)
        for player in ("random", "scripted"):
            with pytest.raises(ValueError, match="look for one line 'Answers: ' in a prompt, this"):
                score_player(task, player, 1, 0)
    finally:
        del TEMPLATES["mine"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sokoban_variants(variant='greek')", "variant='greek': choose from id, alphabetical"),
        ("sokoban_variants(variant='held_out')", "held_out=0 keeps from training"),
        ("sokoban_variants(held_out=205)", "held_out=205 of 207 words: leave 4 or more"),
        ("sokoban_variants(paraphrases=4)", "paraphrases=4: choose 3 or less"),
        ("sokoban_variants(boxes=3, walls=6)", "boxes=3 and walls=6 in 16 cells: choose half"),
        ("sokoban_variants(height=3)", "height=3 and width=6: choose one of them 5 or more"),
        ("general_points(maps=9)", "distinct=9 maps of 8 maps: choose 8 or fewer"),
        ("general_points(cards=2)", "cards=2: choose 3 or more"),
        ("general_points(cards=6)", "cards=6: choose 5 or less"),
        ("general_points(cards=3, target=997)", "hardly ever make target=997"),
    ],
)
def test_mistakes_are_one_line(spec, message):
    with pytest.raises(ValueError) as error:
        make_task(spec, 0)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_command_writes_what_fine_tuning_reads(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    out, battery = tmp_path / "data" / "train.jsonl", tmp_path / "battery"
    config = command.DemonstrationsConfig(
        "general_points(variant='diverse')", "~/data/train.jsonl", count=12, epochs=2, form="both",
        battery="~/battery", battery_count=2,
    )  # fmt: skip
    command.main(config)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 24 and {line["epoch"] for line in lines} == {0, 1}
    for line in lines:
        answer = json.loads(answer_in(line["completion"]))
        names = line["names"]
        assert [int(names.get(card, card)) for card in answer["cards"]] == answer["number"]
        assert all(f"{face} counts as {names[face]}" in line["prompt"] for face in "JQK")
        assert value_of(answer["formula"], answer["number"]) == 24
    data = ChatDataConfig(path=(str(out),), validation=0.25, seq_len=512)
    rows = prepare_chat(data, ByteTokenizer()).train
    learned = bytes(rows.tokens[0][rows.loss_mask[0]][:-1].tolist()).decode()
    assert learned in {line["completion"] for line in lines}
    files = sorted(path.stem for path in battery.iterdir())
    assert files == sorted(set(GeneralPoints.variants) - {"held_out"})
    with pytest.raises(ValueError, match="train.jsonl exists: choose another file"):
        command.main(config)
    before = sorted(tmp_path.rglob("*"))
    for changes, message in (
        ({"out": str(tmp_path / "b/id.jsonl"), "battery": str(tmp_path / "b")}, "in the way of"),
        ({"out": str(tmp_path / "b"), "battery": str(tmp_path / "x/../b")}, "in the way of"),
        ({"out": str(tmp_path / "b"), "battery": str(tmp_path / "b/c")}, "in the way of"),
        ({"out": str(tmp_path / "b"), "battery": str(out)}, "train.jsonl is no folder: choose"),
        ({"out": str(out / "b"), "battery": None}, "train.jsonl is no folder: choose"),
    ):
        with pytest.raises(ValueError, match=message):
            command.main(dataclasses.replace(config, **changes))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_battery_names_its_variants():
    config = BatteryConfig(task="general_points", variants=("fake", "five"))
    assert [env.variant for env in config.environments().values()] == ["fake", "five"]
    assert all(env.restate for env in config.environments().values())
    with pytest.raises(ValueError, match="unknown variant 'six' of general_points: choose from id"):
        BatteryConfig(task="general_points", variants=("six",)).environments()
    with pytest.raises(ValueError, match="guess_number has no variants of its prompt: choose"):
        BatteryConfig(task="guess_number").environments()

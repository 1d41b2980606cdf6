"""Tasks and environments of reinforcement learning: problems, splits, scorers and mistakes."""

import copy
import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import time
import types
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import fake_gem
import numpy as np
import pytest
from contracts import example

from thoughtbubbles.registry import is_ours
from train.cli.plugins import OPTION
from train.rl.environments import ENVIRONMENTS
from train.rl.named_tasks import make_task, tasks_help
from train.rl.scoring import safe_score, safe_step
from train.rl.tasks import TASKS
from train.rl.tasks.numbers import final_number, number_text, read_number
from train.rl.tasks.shaping import format_bonus
from train.rl.types import Completion, Problem, Reward, Turn

GENERATED = ("arithmetic", "arithmetic(digits=1, operators='+-*')", "chain_sum", "copy",
             "reverse(length=3)", "sort", "hidden_facts")  # fmt: skip
ADVERSARIAL = ("", " \n", "nan", "inf", "1e400", "9" * 5000, "٣٤", "²", "\x00", "-", "####",
               "#### ####", "1,2,,3", "\ud800")  # fmt: skip


def make(spec: str, seed: int) -> Any:
    return make_task(spec, seed)


def global_randomness() -> Any:
    numpy: Any = np.random.get_state()
    return random.getstate(), numpy[1].tolist()


def say(problem: Problem, text: str) -> Completion:
    return Completion(problem, text, (), True)


SHOW = """
import sys
from train.cli.plugins import load_plugins
from train.rl.named_tasks import make_task
for spec in load_plugins(sys.argv[1:]):
    task = make_task(spec, 3)
    print([task.problem(s, i) for s in ("train", "test") for i in (0, 1)])
"""


KINDS = {**TASKS, **ENVIRONMENTS}
PLUGGED = [word for word, kind in KINDS.items() if not is_ours(kind)]
SUITE = [word for word in ENVIRONMENTS if word != "gem"]  # which needs a package


@pytest.mark.parametrize("plugged", [None, *PLUGGED])
def test_problems_are_the_same_in_another_process(plugged, pytestconfig):
    """All of the library in one process, and each of a plugin in one of its own."""
    if plugged is None:
        specs = [*GENERATED, *(word for word in SUITE if word not in PLUGGED)]
    else:
        specs = [example(plugged, KINDS[plugged])]
    plugins = [f"{OPTION}={name}" for name in pytestconfig.getoption(OPTION)]
    shown = subprocess.run(
        [sys.executable, "-c", SHOW, *specs, *plugins],
        env={
            **os.environ,
            "PYTHONHASHSEED": "1",  # here it is another
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True, text=True,
    )  # fmt: skip
    assert not shown.returncode, shown.stderr
    tasks = [make(spec, 3) for spec in specs]
    here = "".join(
        f"{[task.problem(s, i) for s in ('train', 'test') for i in (0, 1)]}\n" for task in tasks
    )
    assert shown.stdout == here


@pytest.mark.parametrize("spec", GENERATED)
def test_generated_problems(spec):
    state = global_randomness()
    task = make(spec, 0)
    assert task.name == spec and make(task.name, 0) == task
    problems = {s: [task.problem(s, i) for i in range(150)] for s in ("train", "test")}
    other = make(spec, 1)
    test = {problem.prompt for problem in problems["test"]}
    for foreign in (task, other):
        assert not test & {foreign.problem("train", i).prompt for i in range(600)}
    assert [other.problem("train", i) for i in range(150)] != problems["train"]
    for problem in problems["train"][:30]:
        gold = "?" if problem.kind == "hidden" else problem.answer
        assert safe_score(task, say(problem, f" {gold}\nmore")).success
        for text in (*ADVERSARIAL, gold + "x"):
            assert not safe_score(task, say(problem, text)).success
    assert state == global_randomness()


FAKE_MATH = """
def parse(text, parsing_timeout):
    return [text]
def verify(gold, found, timeout_seconds):
    return gold == found
"""


@pytest.fixture
def made(tmp_path, monkeypatch) -> Callable[..., Any]:
    """A task or environment of any registered name; what two of them need is made here."""
    monkeypatch.setitem(sys.modules, "reasoning_gym", FAKE_GYM)
    monkeypatch.setitem(sys.modules, "gem", fake_gem)
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(row(n) for n in range(60)))
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/math_verify.py").write_text(FAKE_MATH)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text("".join(json.dumps({"problem": f"{n}?", "answer": f"{n}"}) + "\n"
                               for n in range(60)))  # fmt: skip
    needed = {"gsm8k": f"gsm8k:{path}", "math": f"math:{numbers}",
              "reasoning_gym": "reasoning_gym:doubles", "gem": "gem:guess"}  # fmt: skip
    return lambda word, seed=0: make(needed.get(word) or example(word, KINDS[word]), seed)


def some(task: Any, split: str, count: int = 40) -> list[Problem]:
    return [task.problem(split, index) for index in range(min(task.sizes[split] or count, count))]


def arbitrary_texts() -> list[str]:
    """Texts of any characters, and some that look like answers."""
    rng = np.random.default_rng(0)
    drawn = ["".join(map(chr, rng.integers(0, 0xD7FF, rng.integers(1, 30)))) for _ in range(20)]
    ascii = ["".join(map(chr, rng.integers(32, 127, rng.integers(1, 30)))) for _ in range(20)]
    return [*ADVERSARIAL, *drawn, *ascii, *(str(number) for number in range(-3, 12))]


@pytest.mark.parametrize("word", KINDS)
def test_every_task_is_determined_and_holds_problems_out(made, word):
    state = global_randomness()
    task, again, other = made(word), made(word), made(word, 1)
    assert task.word == word and make(task.name, 0).name == task.name and type(task).__doc__
    held_out = {problem.uid for problem in some(task, "test", 200)}
    for split in ("train", "test"):
        assert some(task, split) == some(again, split)
        assert all(json.loads(json.dumps(p.answer)) == p.answer for p in some(task, split))
    for trained in (task, other):
        assert not held_out & {problem.uid for problem in some(trained, "train", 400)}
    assert state == global_randomness()


@pytest.mark.parametrize("word", TASKS)
def test_no_text_breaks_a_scorer(made, word):
    task = made(word)
    assert not hasattr(task, "step"), "what has turns is an environment"
    for problem in some(task, "train", 5):
        for text in arbitrary_texts():
            reward = task.score(say(problem, text))
            assert reward == task.score(say(problem, text)) == safe_score(task, say(problem, text))


@pytest.mark.parametrize("word", ENVIRONMENTS)
def test_no_text_breaks_an_environment_and_states_are_values(made, word):
    task = made(word)
    for problem in some(task, "train", 3):
        state = task.reset(problem)
        for text in arbitrary_texts():
            kept = copy.deepcopy(state)
            turn = task.step(state, say(problem, text))
            assert turn == task.step(state, say(problem, text)) and state == kept
            assert turn == safe_step(task, problem, state, say(problem, text))
            ended = turn.terminated or turn.truncated
            state = task.reset(problem) if ended else turn.state
        assert task.reset(problem) == task.reset(problem)


def test_answers_are_right():
    for index in range(50):
        for spec in ("arithmetic(operators='+-*')", "chain_sum"):
            problem = make(spec, 0).problem("train", index)
            assert eval(problem.prompt[:-1]) == int(problem.answer)
    problem = make("reverse", 0).problem("train", 0)
    assert problem.answer == problem.prompt[-2::-1]
    problem = make("sort", 0).problem("train", 0)
    assert list(problem.answer) == sorted(problem.prompt[:-1])


def test_partial_credit_is_no_success():
    task = make("copy(partial=True)", 0)
    problem = Problem("p", "abcd>", "abcd")
    assert task.score(say(problem, "abxd")) == Reward(0.75, False)
    assert task.score(say(problem, "abcdefgh")) == Reward(0.5, False)
    assert task.score(say(problem, "abcd")) == Reward(1.0, True)
    assert make("copy", 0).score(say(problem, "abxd")) == Reward(0.0, False)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("revers", "unknown task 'revers' (perhaps reverse?): choose one of arithmetic"),
        ("reverse(len=3)", "write reverse(length=4, "),
        ("reverse(length='3')", "write reverse("),
        ("reverse(length=3", "write reverse("),
        ("reverse(length=True)", "write reverse("),
        ("reverse:4", "write reverse("),
        ("reverse(4)", "write reverse("),
        ("reverse(length=os.getpid())", "write reverse("),
        ("reverse(length=1, length=2)", "write reverse("),
        ("gsm8k:", "write gsm8k:PATH"),
        ("gsm8k", "write gsm8k(path=..."),
        ("gsm8k:nowhere.jsonl", "no file nowhere.jsonl"),
        ("reverse(length=1, alphabet='a')", "too few different problems"),
        ("reverse(length=0)", "length=0: choose 1 or more"),
        ("copy(alphabet='a>')", "alphabet='a>'"),
        ("arithmetic(digits=0)", "digits=0: choose 1 or more"),
        ("arithmetic(digits=99)", "digits=99: choose 9 or less"),
        ("arithmetic(operators='/')", "operators='/'"),
        ("hidden_facts(hidden=2)", "hidden=2.0: choose from 0 to 1"),
        ("hidden_facts(facts=10)", "facts=10: choose 9 or less"),
        ("hidden_facts(unknown='7')", "unknown='7'"),
        ("reasoning_gym(dataset='chain_sum', size=1000000000)", "size=1000000000: choose 100000"),
        ("copy(length=1000000000)", "length=1000000000: choose 10000 or less"),
        ("chain_sum(terms=1000000000)", "terms=1000000000: choose 1000 or less"),
        ("guess_number(low=1, high=2)", "low=1 and high=2"),
        ("guess_number(max_turns=0)", "max_turns=0"),
    ],
)
def test_mistakes_are_one_line(spec, message):
    with pytest.raises(ValueError) as error:
        make(spec, 0)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_task_that_is_no_dataclass_is_named(monkeypatch):
    monkeypatch.setitem(TASKS, "mine", int)
    for use in (lambda: make("mine", 0), lambda: make("mine(a=1)", 0), tasks_help):
        with pytest.raises(ValueError, match="task mine: <class 'int'> is no dataclass"):
            use()


def bisect(task, problem):
    """Turns and rewards of halving."""
    state, low, high, rewards = task.reset(problem), task.low, task.high, []
    while True:
        guess = (low + high) // 2
        turn = task.step(state, say(problem, str(guess)))
        state = turn.state
        rewards.append(turn.reward)
        if turn.terminated:
            assert turn.success and turn.observation == " right "
            return rewards
        low, high = (guess + 1, high) if "higher" in turn.observation else (low, guess - 1)


@pytest.mark.parametrize("high, mean, most, value", [(10, 2.9, 4, 0.8227), (50, 4.86, 6, 0.671778)])
def test_halving(high, mean, most, value):
    task = make(f"guess_number(high={high})", 0)
    problems = [task.problem(s, i) for s, n in task.sizes.items() for i in range(n)]
    assert sorted(problem.answer for problem in problems) == list(range(1, high + 1))
    played = [bisect(task, problem) for problem in problems]
    assert np.mean([len(rewards) for rewards in played]) == pytest.approx(mean)
    assert max(map(len, played)) == most
    assert np.mean([0.9 ** (len(r) - 1) * sum(r) for r in played]) == pytest.approx(value, abs=1e-6)


def test_guessing_is_pure_and_never_starts_anew():
    task = make("guess_number(max_turns=2)", 0)
    problem = Problem("p", "1-10? ", 5)
    state = task.reset(problem)
    kept = copy.deepcopy(state)
    first = task.step(state, say(problem, "4"))
    assert first == task.step(state, say(problem, "4")) and state == kept
    assert (first.observation, first.reward, first.terminated) == (" higher ", 0.0, False)
    last = task.step(first.state, say(problem, "6"))
    # Turns that run out are worth nothing, however near the guess was.
    assert (last.observation, last.reward, last.truncated, last.success) == (" lower ", 0, True, 0)
    with pytest.raises(ValueError, match="the episode is over"):
        task.step(last.state, say(problem, "5"))
    for text in (*ADVERSARIAL, "0", "11"):
        turn = task.step(state, say(problem, text))
        assert (turn.reward, turn.terminated, turn.info) == (-0.1, False, {"malformed": 1.0})
    strict = make("guess_number(strict=True)", 0)
    assert strict.step(state, say(problem, "x")).terminated


def test_hidden_facts_are_not_in_the_prompt():
    task = make("hidden_facts(hidden=0.25)", 0)
    problems = [task.problem("train", i) for i in range(400)]
    for problem in problems:
        facts, asked = problem.prompt.split("; ")
        known = dict(fact.split("=") for fact in facts.split())
        found = known.get(asked[:-1])
        assert found == (None if problem.kind == "hidden" else problem.answer)
    assert np.mean([p.kind == "hidden" for p in problems]) == pytest.approx(0.25, abs=0.07)


@pytest.mark.parametrize(
    "text, number",
    [
        ("so 3 + 4\n#### 72", "72"), ("#### $1,072.50.", "1072.5"), ("it is 72.0.", "72"),
        ("#### -5", "-5"), ("-$5", "-5"), ("$-5", "-5"), ("10-3", None), ("7 #### none", "7"),
        ("#### 1 #### 2 or 3", "2"), ("007", "7"), ("-0.0", "0"), ("1,2345", None),
        ("€3 €4", "4"), ("1e400", None), ("nan", None), ("", None), ("٣", None), ("####", None),
        ("it is 1 000", "1000"), ("#### 5/8", "0.625"), ("4/6", "2/3"), ("at 3:30", None),
        ("about 5 million", None), ("so x=5", "5"), ("3*24=72", "72"), ("1 1/2 cups", "1.5"),
        ("we get \\boxed{1{,}000}", "1000"), ("<answer>72</answer>", "72"), ("**72**", "72"),
        ("7 and 5 m^2", "5"), ("- 5\n- 6", "6"), ("10 - 3", None), ("#### 3:30", None),
        ("it is $-\\frac{3}{4}$", "-0.75"), ("−½", "-0.5"), ("1 ½ cups", "1.5"),
        ("2 \\frac{1}{2}", "2.5"), ("x-½", None), ("2-\\dfrac{1}{2}", None),
        ("\\frac{-1}{2}", "-0.5"), ("\\frac{1.5}{2}", "0.75"), ("\\frac{x}{2}", None),
        ("\\frac{\\sqrt{3}}{2}", None), ("x^{2}", None), ("10^{-3}", None), ("5 cm^{2}", "5"),
        ("5 \\text{ cm}^2", "5"), ("so $18\\%$.", "18"), ("$\\$18$", "18"), ("$-\\$5$", "-5"),
        ("$x=18\\%$", "18"), ("$$18$$", "18"), ("$90^\\circ$", "90"), ("is 2³", None),
        ("18 $", "18"), ("5 CO₂", "5"), ("...5", "5"), ("3 dozens", None),
        ("about 5 millions.", None), ("- \\frac{3}{4}", "-0.75"),
        ("it is $- \\frac{3}{4}$", "-0.75"), ("1 - ½", None),
        ("\\boxed{- \\frac{3}{4}}", "-0.75"), ("\\frac{- 3}{4}", "-0.75"), ("it is − 3.", "3"),
        ("5 - \\frac{3}{4}", None), ("x - \\frac{3}{4}", "0.75"), ("#### 5 - \\frac{1}{2}", None),
        ("$x$ - 3", "3"), ("(2+1) - 3", "3"), ("$5 - $3", None), ("5% - 3", None), ("½ - 3", None),
        ("\\$5 - \\$3", None), ("\\boxed{5} - 3", None), ("$5$ - \\frac{1}{2}", None),
        ("x = - 3", "-3"), ("so (- 3)", "-3"), ("Answer: - 3 apples", "3"), ("Answer - 18", "18"),
        ("#### - 3\nDone.", "-3"), ("Sum:\n- ½", "0.5"), ("- 5 pears\n- 6", "6"),
        ("- 5 pears\n- or so", "5"), ("\n \n− 18", "-18"), ("- 18 apples", "-18"),
        ("####\n- $5", "-5"), ("= - \\$5", "-5"), ("**- $5**", "-5"), ("is $- 5$", "-5"),
        ("is $-\\;\\frac{1}{2}$", "-0.5"), ("is $ - 5$", "-5"), ("in $ - 18", "18"),
        ("Answer:\n- 18 apples", "18"), ("Cost:\n  - 18 dollars", "18"), ("1.\n- 18", "18"),
        ("Answer: - 18 apples", "18"), ("answer, - 18", "18"), ("> - 18", "18"),
        ("Total (in dollars) - 18", "18"), ("Answer (b) - 18", "18"), ("plan b - 18", "18"),
        ("part a - 18", "18"), ("**Day 2** - 18", "18"), ("18 - or so", "18"), ("* - 5", "5"),
        ("\\boxed{2x - 3}", None), ("\\boxed{N - 3}", None), ("$\\theta - 3$", None),
        ("\\boxed{2\\pi - 3}", None), ("$|x| - 3$", None), ("\\(x_{1} - 3\\)", None),
        ("\\[\\sqrt{2} - 3\\]", None), ("$$\nx - 3\n$$", None), ("$\\frac{x}{2} - 3$", None),
        ("\\boxed{3 - \\pi}", None), ("$\\frac{3}{4} - \\pi$", None), ("$x - 3$ is 5", "5"),
        ("$2x - 3 = - 5$", "-5"), ("$x - 3 \\to \\boxed{- 5}$", "-5"), ("$$\n- 3\n$$", "-3"),
        ("$x \\ge - 3$", "-3"), ("$x\\ge-3$", "-3"), ("$x > - 3$", "-3"), ("x \\approx - 3", "-3"),
        ("$x\\le3$", "3"), ("$x \\theta - 3$", None), ("- 5 pears", "-5"), ("1. - 7", "7"),
        ("from $5 up to $ 6", "6"), ("costs $3 and then $4", "4"), ("$3 or so, Tom - 4 A$", "4"),
        ("$5 up to ($ 6)", "6"), ("$3 for (Tom - 4 ($))", "4"), ("US$3 (Tom - 4 (US$", "4"),
        ("<answer>- 5</answer>", "-5"), ("- $ 5", "-5"), ("1. -7", "-7"), ("(\\text{- 5})", "-5"),
        ("-$5$", "-5"), ("½0", None), ("¾35%", None), ("5 is 2\\pi", None), ("3 \\times 4", None),
        ("#### 2\\sqrt{3}", None), ("\\sqrt[3]{8}", None), ("\\frac{\\frac{1}{2}}{3}", None),
        ("a_{5}", None), ("3\\ 4", "4"), ("x^{2} 100", "100"), ("add 1/2 100 times", "100"),
        ("5 - -3", None), ("$x -3$", None), ("3.141\\,592", "3.141592"), ("5 1 000", "1000"),
    ],
)  # fmt: skip
def test_final_numbers(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    "text, value",
    [
        ("5", "5"), ("+5", "5"), ("-5", "-5"), ("−5", "-5"), ("--5", None), ("(5)", "5"),
        (".5", "1/2"), ("-.25", "-1/4"), ("5.", "5"), ("5.50", "11/2"), ("1.2.3", None),
        ("1/2", "1/2"), ("1 / 2", "1/2"), ("-3/4", "-3/4"), ("5/8", "5/8"), ("1/0", None),
        ("5/", None), ("1/2/3", None), ("1 1/2", "3/2"), ("-1 1/2", "-3/2"), ("½", "1/2"),
        ("2½", "5/2"), ("\\frac{3}{4}", "3/4"), ("\\boxed{-7}", "-7"), ("$72$", "72"),
        ("1,000", "1000"), ("1 000", "1000"), ("1\u202f000\u00a0000", "1000000"), ("1'000", "1000"),
        ("12,345.5", "24691/2"), ("1,2345", None), ("12,34", None), ("1,000 000", None),
        ("1.000.000", None), ("0 100", None), ("1_000", None), ("$1,072.50", "2145/2"),
        ("-$5", "-5"), ("$-5", "-5"), ("-$-5", None), ("5€", "5"), ("50%", "50"), ("50 \\%", "50"),
        ("5 km/h", "5"), ("72 cups of tea", "72"), ("$5 per day", "5"), ("5 m^2", "5"),
        ("20 °C", "20"), ("3/4 cup", "3/4"), ("5 million", None), ("5M", None), ("5k", None),
        ("3 dozen", None), ("5 and a half", None), ("3 or 4", None), ("3 to 4 cups", None),
        ("2 hours 30 minutes", None), ("3:30", None), ("10-3", None), ("2^3", None), ("1e3", None),
        ("10³", None), ("10₂", None), ("5 m²", "5"), ("-½", "-1/2"), ("1 ½", "3/2"),
        ("-\\frac{3}{4}", "-3/4"), ("- \\frac{3}{4}", "-3/4"), ("- 3", "-3"), ("−\u00a0½", "-1/2"),
        ("- $5", "-5"), ("- \\$5", "-5"), ("$- 5$", "-5"), ("$ - 5$", "-5"), ("(- 5)", "-5"),
        ("5 - ½", None), ("x - 3", None), ("+ 3", "3"), ("- - 3", None), ("$50\\%$", "50"),
        ("5 millions", None), ("- 5 pears", "-5"), ("½0", None), ("**½**", "1/2"),
        ("5\\text{ cm}", "5"), ("\\[ 5 \\]", "5"), ("- $ 5", "-5"), ("3 \\ge", None),
        ("1e999999999", None), ("9" * 101, None), ("٣", None), ("five", None), ("", None),
    ],
)  # fmt: skip
def test_a_text_is_one_number_or_none(text, value):
    assert read_number(text) == (None if value is None else Fraction(value))


def test_equal_numbers_are_equal_texts():
    for text in ("0.125", "-12.5", "0.05", "-0.001", "1000", "0", "2/3", "-22/7"):
        assert number_text(Fraction(text)) == text and read_number(text) == Fraction(text)


def test_long_texts_are_read_quickly():
    begin = time.process_time()
    for piece in ("9", "9,", "1,000", "#### ", "-", "$-", "1.", "x\n", "\\frac{", " ", "- 3"):
        final_number(piece * (300_000 // len(piece)))
    for piece in ("- ", "$x - ", "\\boxed{", "\\boxed{{a} ", "\\(", "\\[x", "$$", "\n- 3", "$ "):
        final_number(piece * (100_000 // len(piece)))
    assert time.process_time() - begin < 5


def row(number, answer=None):
    text = f"Sum.\n#### {number}" if answer is None else answer
    return json.dumps({"question": f"What is {number}?", "answer": text})


def test_gsm8k_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join(row(n) for n in range(30)) + "\n\n")
    task = make(f"gsm8k:{path}", 0)
    assert task.sizes == {"train": 27, "test": 3} and make(task.name, 5).sizes == task.sizes
    assert make("gsm8k:~/all.jsonl", 0).sizes == task.sizes
    problems = {s: [task.problem(s, i) for i in range(n)] for s, n in task.sizes.items()}
    assert len({p.uid for split in problems.values() for p in split}) == 30
    problem = problems["test"][0]
    assert problem.prompt == f"Question: What is {problem.answer}?\nAnswer:"
    assert task.score(say(problem, f"so #### {problem.answer}.0")) == Reward(1.0, True)
    for text in ("#### 99", *ADVERSARIAL):
        assert task.score(say(problem, text)) == Reward(0.0, False)
    bonus = make(f"gsm8k(path={str(path)!r}, bonus=0.25, template='{{question}}')", 0)
    assert bonus.problem("train", 0).prompt.startswith("What is")
    assert bonus.score(say(problem, "#### 99")) == Reward(0.25, False, {"well_formed": 1.0})
    (tmp_path / "train.jsonl").write_text(row(1))
    (tmp_path / "test.jsonl").write_text(row(2))
    assert make(f"gsm8k:{tmp_path}", 0).problem("test", 0).answer == "2"
    (tmp_path / "test.jsonl").write_text(row(1))
    with pytest.raises(ValueError, match="share 1 questions"):
        make(f"gsm8k:{tmp_path}", 0)


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"question": "a"}', '{"question": 1, "answer": "#### 2"}',
             row(1, "no mark 5"), row(1, "#### none"), row(1, "5 #### none")]
)  # fmt: skip
def test_bad_lines_are_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{row(1)}\n\n{line}\n")
    with pytest.raises(ValueError, match=r"bad.jsonl, line 3: ") as error:
        make(f"gsm8k:{path}", 0)
    assert "\n" not in str(error.value)


class Steps:
    """An environment whose turns are always one thing; None for a step that raises."""

    name = "scored"

    def __init__(self, turn):
        self.turn = turn

    def step(self, state, action):
        return {"turn": self.turn}["turn" if self.turn is not None else "missing"]


class Scored:
    name = "scored"

    failure_value = 0.0

    def __init__(self, score):
        self.score = score


def test_rewards_are_checked():
    done = say(Problem("uid7", "", ""), "")
    assert safe_score(Scored(lambda c: 1 / 0), done) == Reward(0.0, False, {"scorer_errors": 1.0})
    ended = safe_score(Scored(lambda c: sys.exit(3)), done)  # as code that a text holds may
    assert (ended.info, "SystemExit: 3" in ended.error) == ({"scorer_errors": 1.0}, True)
    task = Scored(lambda c: [][0])
    task.failure_value = -1.0
    assert safe_score(task, done).value == -1
    values: tuple[Any, ...] = (float("nan"), float("inf"), "one", None, 10**400)
    for value in values:
        message = f"task scored gave problem uid7 the reward {value!r}"
        with pytest.raises(ValueError, match=message):
            safe_score(Scored(lambda c, value=value: Reward(value, False)), done)
        with pytest.raises(ValueError, match=message):
            safe_step(Steps(Turn(0, "", value, True)), done.problem, 0, done)
        with pytest.raises(ValueError, match=message):
            safe_score(Scored(lambda c, value=value: Reward(1.0, True, {"a": value})), done)
    for score in (lambda c: None, lambda c: 1.0):
        with pytest.raises(ValueError, match="task scored gave no reward for problem uid7"):
            safe_score(Scored(score), done)
    with pytest.raises(ValueError, match="task scored has no reward"):
        safe_score(Scored(None), done)
    with pytest.raises(ValueError, match="gave no reward"):
        safe_step(Steps((1, 2)), done.problem, 0, done)
    with pytest.raises(ValueError, match="finite numbers"):
        safe_score(Scored(lambda c: Reward(1.0, True, {"note": "text"})), done)  # pyright: ignore
    failed = safe_step(Steps(None), done.problem, 7, done)
    assert (failed.state, failed.reward, failed.terminated, failed.success) == (7, 0.0, True, False)
    assert failed.info == {"scorer_errors": 1.0}


def test_shaping():
    right, wrong = Reward(1.0, True), Reward(0.0, False, {"a": 1.0})
    assert format_bonus(wrong, True, 0.1) == Reward(0.1, False, {"a": 1.0, "well_formed": 1.0})
    assert format_bonus(right, False, 0.1) == Reward(1.0, True, {"well_formed": 0.0})


class Doubles:
    """A stand-in for a data set of reasoning-gym, with its habits."""

    def __init__(self, size, seed):
        random.seed(seed)
        np.random.seed(seed)
        self.size, self.seed = size, seed

    def __getitem__(self, index):
        return {"question": f"{index}+{index}={self.seed}", "answer": str(2 * index)}

    def score_answer(self, answer, entry):
        np.random.seed(0)
        return 1.0 if int(answer) == int(entry["answer"]) else 0.01


def create_dataset(name, **options):
    if name != "doubles":
        raise ValueError(f"no data set {name}")
    return Doubles(**options)


FAKE_GYM = types.SimpleNamespace(create_dataset=create_dataset)


def test_reasoning_gym_adapter(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", FAKE_GYM)
    state = global_randomness()
    task = make("reasoning_gym(dataset='doubles', size=20)", 4)
    assert task.sizes == {"train": 16, "test": 4}
    problem = task.problem("test", 1)
    number = int(problem.prompt.split("+")[0])
    assert problem.prompt.endswith("=4\n")
    assert task.score(say(problem, f" {2 * number}\n")) == Reward(1.0, True)
    assert task.score(say(problem, "-1")) == Reward(0.01, False)
    assert task.score(say(problem, "x")) == Reward(0.0, False, {"scorer_errors": 1.0})
    assert state == global_randomness()
    with pytest.raises(ValueError, match="no data set triples"):
        make("reasoning_gym:triples", 0)
    with pytest.raises(ValueError, match="options holds size=7: give size to the task itself"):
        make("reasoning_gym(dataset='doubles', options={'size': 7})", 0)


def test_without_reasoning_gym_the_way_out_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        make("reasoning_gym:chain_sum", 0)


def test_the_real_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    task = make("reasoning_gym(dataset='chain_sum', size=20, options={'max_terms': 3})", 0)
    problem = task.problem("train", 0)
    gold = eval(problem.prompt.split(":")[-1].split("=")[0])
    assert task.score(say(problem, str(gold))) == Reward(1.0, True)
    assert not task.score(say(problem, "x")).success


@pytest.mark.parametrize("named", [None, "other", "own2", "other(size=1)"])
def test_a_task_has_the_name_that_it_is_registered_by(named, monkeypatch):
    own = dataclasses.make_dataclass("Own", [("size", int, 1)], frozen=True)
    monkeypatch.setitem(TASKS, "own", own)
    if named is not None:
        own.name, own.word = named, "own"
    line = f"task 'own' has the name {named!r}, which a run would save: set its `name` to 'own', or"
    with pytest.raises(ValueError, match=re.escape(line)):
        make_task("own(size=2)", 0)
    for name in ("own", "own(size=2)", "own:2"):
        own.name = name
        assert make_task("own(size=2)", 0) == own(2)


def test_a_task_needs_no_seed_and_its_own_may_be_written(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Seedless:
        size: int = 1
        name = "seedless"

    @dataclasses.dataclass(frozen=True)
    class Seeded:
        seed: int = 0
        name = "seeded"

    monkeypatch.setitem(TASKS, "seedless", Seedless)
    monkeypatch.setitem(TASKS, "seeded", Seeded)
    assert make_task("seedless(size=2)", 5) == Seedless(2)
    assert make_task("seeded", 5) == Seeded(5) and make_task("seeded(seed=2)", 5) == Seeded(2)

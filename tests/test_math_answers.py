"""Answers in LaTeX: math-verify's verdicts, exact numbers, a limit that holds in any thread."""

import concurrent.futures
import importlib.util
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.rl.named_tasks import make_task
from train.rl.tasks import math_answers
from train.rl.tasks.math_answers import MathGrader, in_box, plain_number
from train.rl.tasks.truthful import boxed
from train.rl.types import Completion, Problem, Reward


def say(problem: Problem, text: str) -> Completion:
    return Completion(problem, text, (), True)


# Verdicts of math-verify 0.9.0 itself, called with its own time limits.
TABLE = [
    (r"\frac{3}{4}", r"The answer is $\frac{6}{8}$.", True),
    (r"\frac{3}{4}", r"\boxed{0.75}", True),
    (r"\frac{3}{4}", r"\boxed{\dfrac{3}{5}}", False),
    (r"\frac{\sqrt{2}}{2}", r"\boxed{\frac{1}{\sqrt{2}}}", True),
    (r"2\sqrt{3}", r"so $\sqrt{12}$", True),
    (r"2\sqrt{3}", r"\boxed{3.4641}", False),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", True),
    ("x^2+2x+1", r"\boxed{(x+2)^2}", False),
    ("(1,2)", r"\boxed{(1, 2)}", True),
    ("(1,2)", r"\boxed{(2, 1)}", False),
    (r"\{1,2,3\}", r"\boxed{\{3,2,1\}}", True),
    (r"\{1,2,3\}", r"\boxed{\{3,2\}}", False),
    ("[0,1)", r"\boxed{[0,1)}", True),
    ("[0,1)", r"\boxed{[0,1]}", False),
    (r"(-\infty,2)", r"\boxed{(-\infty, 2)}", True),
    (r"(-\infty,2)\cup(3,\infty)", r"\boxed{(3,\infty)\cup(-\infty,2)}", True),
    (
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}",
        True,
    ),
    (
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        r"\boxed{\begin{pmatrix}1&3\\2&4\end{pmatrix}}",
        False,
    ),
    (r"\pi", r"\boxed{3.14159}", False),
    (r"2\pi", r"\boxed{\pi+\pi}", True),
    (r"50\%", r"\boxed{0.5}", True),
    (r"50\%", r"\boxed{50}", True),
    ("x=3", r"\boxed{3}", True),
    ("3", r"\boxed{x=3}", True),
    ("x>2", r"\boxed{x>2}", True),
    ("x>2", r"\boxed{2<x}", True),
    ("x>2", r"\boxed{x\ge 2}", False),
    (r"90^\circ", r"\boxed{90}", True),
    ("1+2i", r"\boxed{2i+1}", True),
    ("1+2i", r"\boxed{1-2i}", False),
    (r"\log_2 8", r"\boxed{3}", True),
    ("5!", r"\boxed{120}", True),
    (r"\binom{5}{2}", r"\boxed{10}", True),
    (r"e^{i\pi}", r"\boxed{-1}", False),
    ("10^{6}", r"\boxed{1000000}", True),
    (r"1.5\times 10^{3}", r"\boxed{1500}", True),
    (r"12\text{ cm}", r"\boxed{12}", True),
    (r"\$12.50", r"\boxed{12.5}", True),
    ("y=2x+1", r"\boxed{y = 1+2x}", True),
    ("y=2x+1", r"\boxed{2x+1}", True),
    (r"-\frac{1}{2}", r"\boxed{-0.5}", True),
    (r"\frac{1}{3}", r"\boxed{0.333}", False),
    (r"\sin^2 x+\cos^2 x", r"\boxed{1}", True),
    (r"\sqrt[3]{8}", r"\boxed{2}", True),
    ("|x|", r"\boxed{\sqrt{x^2}}", True),
    ("1,2", r"\boxed{2,1}", True),
    (r"\pm 3", r"\boxed{3, -3}", True),
    ("7", "nothing to see", False),
    (r"\frac{3}{4}", "", False),
    (r"\frac{3}{4}", r"\boxed{\frac{3}{4}", True),
    (r"\frac{3}{4}", r"\boxed{", False),
    (r"\frac{3}{4}", r"\frac{3}{4}", True),
    ("A", r"\boxed{A}", True),
    ("A", r"\boxed{B}", False),
]
# The last box counts; math-verify itself takes boxes that stand near each other together.
TWO_BOXES = [
    (r"\frac{3}{4}", r"First \boxed{\frac{1}{2}}, no: \boxed{\frac{3}{4}}", True),
    (r"\frac{3}{4}", r"\boxed{\frac{1}{2}} \boxed{\frac{3}{4}}", True),
    (r"\frac{3}{4}", r"\boxed{\frac{3}{4}} and \boxed{\frac{1}{2}}", False),
    (r"\sqrt{2}", r"$\sqrt{3}$ or \boxed{\sqrt{3}}, so \boxed{\sqrt{2}}.", True),
    ("1,2", r"\boxed{1}, \boxed{2}", False),
]
# Plain numbers, which never come to math-verify: it rounds, and reads the first of two boxes.
EXACT = [
    ("7", r"\boxed{7.0}", True),
    ("7", r"First \boxed{6}, no: \boxed{7}", True),
    ("1/3", r"\boxed{0.3333333333}", False),
    ("1,072.50", r"\boxed{1072.5}", True),
    ("$12$", "12", True),
    ("1/2", r"\boxed{.5}", True),
    ("1/2", r"\boxed{\$.5}", None),
    ("7", "it is 7", None),
    ("-3", "- 3", True),
    ("3", "- 3", False),
    ("-3", "− 3", True),
    ("-0.5", "-½", True),
    ("1.5", r"\boxed{1½}", True),
    ("7", r"\boxed{7}, or \boxed{8}", False),
]
FAKE = """
import os, pathlib, signal
def parse(text, parsing_timeout=5):
    assert parsing_timeout is None
    if "forever" in text:
        while True: pass
    if "memory" in text:
        return [bytearray(2**40)]
    if "killed" in text:
        os.kill(os.getpid(), signal.SIGKILL)
    if "once" in text and not os.path.exists(__file__ + ".once"):
        pathlib.Path(__file__ + ".once").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if "raise" in text:
        raise RecursionError("too deep")
    print("a package that prints")
    return [] if "nothing" in text else [text.strip("{}$").removeprefix("\\\\boxed{").lower()]
def verify(gold, found, timeout_seconds=5):
    assert timeout_seconds is None
    return gold == found
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MathGrader]:
    """A grader whose math-verify is a few lines."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/math_verify.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    # As profilers leave it, and left so: a timer of theirs would end the tests' own process.
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    grader = MathGrader(limit_s=0.2)
    yield grader
    grader.close()


@pytest.fixture(scope="module")
def real() -> Iterator[MathGrader]:
    pytest.importorskip("math_verify")
    grader = MathGrader(limit_s=30.0)
    yield grader
    grader.close()


def test_verdicts_of_math_verify(real: MathGrader):
    """In one test: a process that has imported math-verify takes seconds to start."""
    wrong = [row for row in TABLE + TWO_BOXES if real.equal(*row[:2]) is not row[2]]
    assert wrong == []


@pytest.mark.parametrize(("gold", "text", "right"), EXACT)
def test_plain_numbers_are_exact(monkeypatch, gold: str, text: str, right: bool | None):
    grader = MathGrader(1.0)
    monkeypatch.setattr(grader, "_ask", lambda gold, text: pytest.fail("asked") if text else None)
    if right is None:
        with pytest.raises(pytest.fail.Exception):
            grader.equal(gold, text)
    else:
        assert grader.equal(gold, text) is right


def test_what_is_a_plain_number():
    assert [plain_number(t) for t in ("(1,234)", "1, 2", "x", "", "1e5", "3:30", "--1")] == [
        None
    ] * 7
    assert in_box(r"\$5") == r"\boxed{\$5}" and in_box("$5$") == "$5$"


def test_a_comparison_without_end_is_cut_in_every_thread(fake: MathGrader):
    assert fake.equal("Ab", "$aB$")
    assert fake._process is not None
    status = Path(f"/proc/{fake._process.pid}/status").read_text()
    ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
    assert not ignored >> (signal.SIGPROF - 1) & 1, "the limit would never end it"
    began = time.monotonic()
    for text in ("forever", "memory"):
        with pytest.raises(TimeoutError, match="took over 0.2 s, or all memory"):
            fake.equal("a", text)
        assert fake.equal("a", "a"), "another process goes on"
    assert time.monotonic() - began < 30
    with pytest.raises(RuntimeError, match="math-verify: RecursionError: too deep"):
        fake.equal("a", "raise")
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        pairs = [("a", "a"), ("a", "b"), ("forever", "b"), ("b", "b")]
        found = list(threads.map(lambda pair: _verdict(fake, *pair), pairs))
    assert found == [True, False, "cut", True]
    assert fake.equal("a", "a")  # the comparison that was cut may have been the last one
    process = fake._process
    assert process is not None and process.poll() is None
    fake.close()
    assert process.poll() is not None and fake.equal("a", "a")


def test_an_interrupt_shifts_no_verdict(fake: MathGrader, monkeypatch: pytest.MonkeyPatch):
    fake.start()
    assert fake._process is not None

    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(fake._process.stdout, "readline", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fake.equal("a", "a")
    assert [fake.equal("a", text) for text in "baba"] == [False, True, False, True]
    assert fake._process is not None and fake._process.stdin is not None
    fake._process.stdin.write('[9, "a", "a"]\n')  # a reply that nobody has read
    assert [fake.equal("a", text) for text in "baba"] == [False, True, False, True]


def test_an_end_for_another_reason_is_no_timeout(fake: MathGrader):
    fake.start()
    process = fake._process
    assert process is not None and os.getpgid(process.pid) == process.pid, "Ctrl-C reaches the run"
    assert fake.equal("a once", "a once") and fake._process is not process
    with pytest.raises(RuntimeError, match="its process ended twice, the second time by -9"):
        fake.equal("a", "killed")
    assert fake.equal("a", "a")


def test_the_last_box_is_compared_alone(monkeypatch: pytest.MonkeyPatch):
    grader, asked = MathGrader(1.0), []
    monkeypatch.setattr(grader, "_ask", lambda gold, text: asked.append(text))
    for _, text, _ in TWO_BOXES:
        grader.equal("x", text)
    assert asked == [rf"\boxed{{{boxed(text)}}}" for _, text, _ in TWO_BOXES]


def _verdict(grader: MathGrader, gold: str, text: str) -> bool | str:
    try:
        return grader.equal(gold, text)
    except TimeoutError:
        return "cut"


def write(path: Path, answers: list[str], field: str = "answer") -> Path:
    lines = [json.dumps({"problem": f"What is {a}?", field: a}) + "\n" for a in answers]
    path.write_text("".join(lines))
    return path


def test_the_task(fake: MathGrader, tmp_path: Path):
    solutions = [rf"So it is \boxed{{\sqrt{{{n}}}}}." for n in range(9)]
    path = write(tmp_path / "all.jsonl", ["7", *solutions], "solution")
    task = make_task(f"math(path={str(path)!r}, answer='solution', limit_s=0.2)", 0)
    assert task.sizes == {"train": 9, "test": 1}
    problems = [task.problem("train", i) for i in range(9)] + [task.problem("test", 0)]
    assert {p.answer for p in problems} == {"7", *(rf"\sqrt{{{n}}}" for n in range(9))}
    assert problems[0].prompt.endswith("?\nGive the answer in \\boxed{}.\n")
    problem = Problem("p", "?", r"\sqrt{3}")
    score = lambda text: task.score(say(problem, text))  # noqa: E731
    assert score(r"\boxed{\SQRT{3}}") == Reward(1.0, True)
    assert score("4") == Reward(0.0, False)
    assert score("forever") == Reward(0.0, False, {"grader_timeouts": 1.0})
    assert score("memory") == Reward(0.0, False, {"grader_timeouts": 1.0})
    assert score("raise") == Reward(0.0, False, {"grader_errors": 1.0})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("nothing", "the answer 'nothing' has no value: write LaTeX or a number"),
        ("  ", "the answer '' has no value"),
        (
            "forever",
            "the answer 'forever': comparing with .* took over 0.2 s, or all memory: simplify it",
        ),
        ("raise", "the answer 'raise': math-verify: RecursionError: too deep: simplify it"),
    ],
)
def test_an_answer_without_value_stops_the_run(fake, tmp_path, answer, message):
    path = write(tmp_path / "bad.jsonl", ["7", answer])
    with pytest.raises(ValueError, match=f"bad.jsonl, line 2: {message}"):
        make_task(f"math(path={str(path)!r}, limit_s=0.2)", 0)


def test_without_math_verify(tmp_path, monkeypatch):
    path = write(tmp_path / "numbers.jsonl", ["7", "1/2", "1,000"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs math-verify: pip install \"thoughtbubbles\[math\]"
    ):
        make_task(f"math:{path}", 0)
    monkeypatch.undo()
    (tmp_path / "math_verify.py").write_text("raise ImportError('half installed')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"needs math-verify .half installed.: pip install"):
        make_task(f"math:{write(tmp_path / 'latex.jsonl', ['7', 'x'])}", 0)
    (tmp_path / "math_verify.py").write_text("raise AttributeError('too old')")
    with pytest.raises(ValueError, match=r"before it began, status 1 .AttributeError: too old.: "):
        make_task(f"math:{path}", 0)
    with pytest.raises(ValueError, match="limit_s=0.0: choose from above 0 to 3600"):
        make_task(f"math(path={str(path)!r}, limit_s=0.0)", 0)


def test_a_limit_of_memory_that_is_lower_is_kept(fake: MathGrader, monkeypatch):
    """One of the system, which only the superuser may raise."""
    limit = 2**31
    lower = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))\n"
    worker = Path(math_answers._WORKER).read_text()
    packages = Path(sys.path[0])
    (packages / "worker.py").write_text(lower + worker)
    monkeypatch.setattr(math_answers, "_WORKER", packages / "worker.py")
    assert fake.equal("a", "a")
    assert fake._process is not None
    assert resource.prlimit(fake._process.pid, resource.RLIMIT_AS) == (limit, limit)

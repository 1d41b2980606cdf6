"""TruthRL: outcomes in their order, the ternary reward and what it makes a policy do, the probe."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rl_runs import job
from rl_tiny import Echo, Vowels, filled, language_model

from memgen.decoding import nucleus
from thoughtbubbles.sampling import keep_top_p
from train.models.fingerprint import fingerprint
from train.rl.config import RLConfig
from train.rl.job import RLJob
from train.rl.learning.advantages import dr_grpo, grpo
from train.rl.learning.penalties import Ternary
from train.rl.methods import TruthRL
from train.rl.named_tasks import make_task
from train.rl.probe import ProbeConfig, probe
from train.rl.rollout.sampler import Sampler
from train.rl.scoring import safe_score
from train.rl.tasks.probed import is_probe, read_probe, unsolved_problems
from train.rl.tasks.truthful import (
    TruthfulTask,
    abstains,
    boxed,
    normalized,
    outcome_value,
    truthful,
    truthfulness,
    with_reasoning,
)
from train.rl.types import Completion, Problem, Reward
from train.runs.appended import append_objects, drop_half_line


class Capitals:
    """A task of one question with gold answers and a verifier that knows a paraphrase."""

    name = "capitals"
    sizes: Any = {"train": None, "test": None}

    def problem(self, split: str, index: int) -> Problem:
        return Problem(f"{split}{index}", "Capital of France?", ["Paris", "the City of Paris"])

    def golds(self, problem: Problem) -> list[str]:
        return problem.answer

    def reasoning(self, completion: Completion) -> float:
        return float("because" in completion.text)

    def score(self, completion: Completion) -> Reward:
        if "crash" in completion.text:
            raise RuntimeError("the judge is down")
        right = "Lutetia" in completion.text
        return Reward(float(right), right, {"judged": 1.0})


def score(task: Any, text: str, **options: Any) -> Reward:
    scorer = Ternary(**options).of_task(task)
    return safe_score(scorer, Completion(task.problem("train", 0), text, (), True))


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("Paris", "wrong"),  # no box
        ("\\boxed{Paris", "wrong"),
        ("so \\boxed{paris.}", "accuracy"),
        ("\\boxed{Rome} no, \\boxed{The  Paris}", "accuracy"),  # the last box
        ("\\boxed{City of Paris}", "accuracy"),
        ("\\boxed{Lutetia}", "accuracy"),  # the task's own verifier
        ("\\boxed{Rome}", "wrong"),
        ("\\boxed{I don't know}", "uncertain"),
        ("\\boxed{\\text{I don't know}}", "uncertain"),
        ("\\boxed{I DONT KNOW, maybe Paris}", "uncertain"),
        ("\\boxed{I don't know why you ask, it is Paris}", "uncertain"),  # as in the paper
        ("I don't know: \\boxed{Paris}", "accuracy"),  # the box alone counts
        ("\\boxed{I don't know, an invalid question}", "uncertain"),  # in this order
        ("\\boxed{Invalid question!}", "wrong"),
        ("\\boxed{invalid question: Lutetia}", "wrong"),
        ("\\boxed{}", "wrong"),
        ("\\boxed{the}", "wrong"),  # nothing is left of it
        ("\\boxed{crash}", "wrong"),
    ],
)
def test_outcomes_are_told_in_order(text, outcome):
    outcome = {"wrong": "hallucination"}.get(outcome, outcome)
    found = score(Capitals(), text, boxed=True, abstain=0.25)
    shares = {name: found.info[name] for name in ("accuracy", "uncertain", "hallucination")}
    assert shares == {name: float(name == outcome) for name in shares}
    assert found.value == {"accuracy": 1, "uncertain": 0.25, "hallucination": -1}[outcome]
    assert found.verdict == found.value
    assert found.success == (outcome == "accuracy")
    assert found.info.get("scorer_errors", 0.0) == float("crash" in text)


@pytest.mark.parametrize(
    ("answer", "phrase", "found"),
    [
        ("No!", "no", True),
        ("I say no more.", "No", True),
        ("I know: north", "no", False),
        ("It is unknown", "unknown", True),
        ("The Unknowns", "unknown", False),
        ("14", "?4", False),
        ("so 4", "?4", True),
        ("We don’t know.", "don't know", True),
        ("не знаю", "не знаю", True),
        ("не знают", "не знаю", False),
        ("не-знаю/не знаю.", "не знаю", True),
        ("我不知道。", "不知道", True),  # no spaces between words
        ("答案是unknown。", "unknown", True),
        ("I don't know—maybe Paris", "I don't know", True),
        ("I don't know—the answer is hard", "I don't know the", True),
        ("\\boxed{I don't know}", "I don't know", True),
        ("I don't know.</s>", "I don't know", True),
        ("I don't know.Maybe Paris", "I don't know", True),
        ("I «don't», a `know`", "I don't know", True),
        ("answer:unknown", "unknown", True),
        ("Paris/unknown", "unknown", True),
        ("'unknown'", "unknown", True),
        ("unknown's", "unknown", False),
        ("no\u0308rth", "no", False),  # a letter of two characters
        ("NA", "N/A", True),
        ("answer (n/a)", "N/A", True),
        ("n", "N/A", False),
        ("? or 4", "?", False),
        (" ? \nor 4", "?", True),
    ],
)
def test_a_phrase_that_abstains_is_no_part_of_a_word(answer, phrase, found):
    assert abstains(answer, phrase) is found


def test_without_a_box_the_response_is_the_answer():
    for text, value in (
        ("paris", 1),
        ("the Paris \nmore", 1),
        ("Well, I don't know.", 0),
        ("", -1),
    ):
        assert score(Capitals(), text).value == value
    assert score(Capitals(), "pass", unknown="pass").value == 0
    assert score(Capitals(), "I don't know", unknown="pass").value == -1
    assert boxed("\\boxed{a{b}c} d") == "a{b}c" and boxed("boxed{a}") is None
    assert normalized(" The  A-b_c, an e!") == "abc e"


@pytest.mark.parametrize(
    ("options", "stated", "hidden"),
    [
        ({}, (1, 0, -1), (1, 0, -1)),
        ({"abstain": 0.5}, (1, 0.5, -1), (1, 0.5, -1)),
        ({"abstain": -1.0}, (1, -1, -1), (1, -1, -1)),
        ({"knowledge": True}, (1, 0, -1), (-1, 1, -1)),
        ({"knowledge": True, "abstain": -1.0}, (1, -1, -1), (-1, 1, -1)),
    ],
)
def test_hidden_facts_are_scored_by_outcome(options, stated, hidden):
    scorer = Ternary(**options).of_task(make_task("hidden_facts", 0))
    for kind, values in (("stated", stated), ("hidden", hidden)):
        problem = Problem("p", "red=4; pink?", "4", kind)
        answers = [Completion(problem, text, (), True) for text in ("4", "?", "5")]
        found = [scorer.score(answer) for answer in answers]
        assert [reward.value for reward in found] == list(values)
        # A lucky guess solves nothing.
        assert [reward.success for reward in found] == [kind != "hidden", kind == "hidden", False]
        assert [reward.info["truthfulness"] for reward in found] == [1, 0, -1]
        assert scorer.score(Completion(problem, "?4", (), True)).value == -1
    assert scorer.problem("train", 3) == make_task("hidden_facts", 0).problem("train", 3)


def test_reasoning_enhanced_rewards():
    for how, right, wrong in (("multiplicative", 2, -2), ("additive", 1.5, -0.5),
                              ("conditional", 1, -1), ("none", 1, -1)):  # fmt: skip
        assert (with_reasoning(1, 1, how), with_reasoning(-1, 1, how)) == (right, wrong)
    assert [with_reasoning(value, 0, "conditional") for value in (1, 0, -1)] == [0, 0, -1]
    assert score(Capitals(), "Lutetia", reasoning="multiplicative").value == 1
    assert score(Capitals(), "Rome because", reasoning="multiplicative").value == -2
    assert score(Capitals(), "Rome because", reasoning="additive").value == -0.5


def test_truthfulness_to_the_digit():
    outcomes = ["right"] * 4 + ["abstained"] * 3 + ["wrong"] * 3
    task = make_task("hidden_facts", 0)
    problem = Problem("p", "red=4; red?", "4", "stated")
    texts = {"right": "4", "abstained": "?", "wrong": "5"}
    scorer = Ternary().of_task(task)
    rewards = [scorer.score(Completion(problem, texts[name], (), True)) for name in outcomes]
    mean = {name: np.mean([reward.info[name] for reward in rewards]) for name in rewards[0].info}
    assert mean == pytest.approx({
        "accuracy": 0.4, "uncertain": 0.3, "hallucination": 0.3, "truthfulness": 0.10,
        "truthfulness_plus_half": 0.25, "truthfulness_minus_half": -0.05,
    })  # fmt: skip
    assert truthfulness(0.4, 0.3, 0.3) == pytest.approx((2 * 4 + 3 - 10) / 10)


VALUES: Any = {"C": "right", "A": "abstained", "W": "wrong"}


@pytest.mark.parametrize(
    ("group", "abstain", "advantages"),
    [
        ("CAWW", 0.0, [1.3056, 0.2611, -0.7833, -0.7833]),
        ("CAWW", -1.0, [1.5, -0.5, -0.5, -0.5]),
        ("AW", 0.0, [0.7071, -0.7071]),
        ("AW", -1.0, [0, 0]),
        ("CCCA", 0.0, [0.5, 0.5, 0.5, -1.5]),
        ("AAAW", 0.0, [0.5, 0.5, 0.5, -1.5]),
        ("AAAA", 0.0, [0, 0, 0, 0]),
    ],
)
def test_advantages_of_outcomes_to_the_digit(group, abstain, advantages):
    reward = np.array([outcome_value(VALUES[letter], abstain) for letter in group])
    same = np.zeros(len(group), int)
    np.testing.assert_allclose(grpo(reward, same, same == 0), advantages, atol=5e-5)
    mean_only = dr_grpo(reward, same, same == 0)
    if abstain == 0:
        for letter, advantage in zip(group, mean_only, strict=True):
            if letter == "A":  # it is praised where wrong answers are more than right ones
                assert np.sign(advantage) == np.sign(group.count("W") - group.count("C"))


def abstention(
    right: float, abstain: float, estimate: Any = grpo, size: int = 8, steps: int = 400
) -> float:
    """Final probability of abstaining, mean of 20 bandits whose answer is right at a rate."""
    rng, logit = np.random.default_rng(0), np.zeros(20)
    group = np.repeat(np.arange(20), size)
    for _ in range(steps):
        p = 1 / (1 + np.exp(-logit[:, None]))
        abstained = rng.random((20, size)) < p
        value = np.where(rng.random((20, size)) < right, 1.0, -1.0)
        reward = np.where(abstained, abstain, value)
        advantage = estimate(reward.ravel(), group, group >= 0).reshape(20, size)
        logit = logit + 0.3 * (advantage * (abstained - p)).mean(axis=1)
    return float((1 / (1 + np.exp(-logit))).mean())


def test_a_policy_abstains_where_it_is_more_often_wrong_than_right():
    found = [abstention(right, 0.0) for right in (0.1, 0.3, 0.4, 0.6, 0.7, 0.9)]
    np.testing.assert_allclose(found, [0.995, 0.990, 0.975, 0.042, 0.018, 0.006], atol=0.01)
    assert min(found[:3]) > 0.9 and max(found[3:]) < 0.1
    assert max(abstention(right, -1.0) for right in (0.1, 0.9)) <= 0.048, "a binary reward"


@pytest.mark.experiment
def test_small_normalised_groups_move_the_switch_to_a_half():
    """python -m pytest -n 0 tests/test_rl_truthrl.py -m experiment"""
    table = [
        # right, abstain, estimator, group size, after 400 and 3000 steps
        (0.7, 0.5, grpo, 8, 0.113, 0.012),
        (0.7, 0.5, dr_grpo, 8, 0.863, 0.986),
        (0.7, 0.5, grpo, 64, 0.887, 0.905),
        (0.3, -0.5, grpo, 8, 0.987, 0.999),
        (0.3, -0.5, dr_grpo, 8, 0.136, 0.014),
        (0.3, -0.5, grpo, 64, 0.097, 0.012),
    ]
    for right, abstain, estimate, size, few, many in table:
        found = [abstention(right, abstain, estimate, size, steps) for steps in (400, 3000)]
        np.testing.assert_allclose(found, [few, many], atol=0.03)
    assert abstention(0.6, 0.5) == pytest.approx(0.695, abs=0.06)
    assert max(abstention(right, -1.0) for right in (0.1, 0.3, 0.4, 0.6, 0.7, 0.9)) <= 0.048


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"abstain": 1.0}, "abstain=1.0: choose from -1 to below 1"),
        ({"abstain": math.nan}, "abstain=nan: choose from -1"),
        ({"probe": "a.jsonl"}, "probe='a.jsonl' is of knowledge=True: set it"),
        ({"reasoning": "much"}, "reasoning='much': choose one of none, multiplicative"),
        ({"knowledge": True}, "which problems of vowels are out of knowledge: give probe=FILE"),
        ({"reasoning": "additive"}, "a score of the reasoning, and vowels has no method"),
        ({"knowledge": True, "probe": "none.jsonl"}, "probe none.jsonl: no such file: make it"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Ternary(**options).of_task(Vowels())
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="ternary is for tasks of one response, echo has turns"):
        Ternary().of_task(Echo())
    with pytest.raises(ValueError, match="abstain=0.5 of method truthrl is of its reward"):
        RLConfig(method=TruthRL(abstain=0.5), reward=())
    assert RLConfig(method="deepsearch", reward=Ternary(abstain=-1.0)).reward
    for graded in (Ternary(), Ternary(abstain=-1.0, knowledge=True)):
        with pytest.raises(ValueError, match="tree of a search goes by success alone, 1 or -1"):
            RLConfig(method="deepsearch", reward=graded)


def test_a_run_shows_outcomes_of_training_and_of_held_out_problems(tmp_path: Path):
    made = job(tmp_path, "truthrl(abstain=0.5)")
    assert "in place of" not in made.describe()
    replaced = job(tmp_path, "truthrl", reward="overlong(buffer=1)").describe()
    assert "truthrl with reward overlong(buffer=1, factor=1.0) in place of ternary(" in replaced
    assert isinstance(made.task, TruthfulTask) and made.task.abstain == 0.5
    found, rows = made.evaluate(made.first_state().variables)
    three = [found[f"info/{name}"] for name in ("accuracy", "uncertain", "hallucination")]
    assert sum(three) == pytest.approx(1) and three[0] == found["success"]
    assert found["reward"] == pytest.approx(found["info/truthfulness"]) and len(rows) == 4
    assert {row.reward.value for row in rows} <= {1.0, -1.0}


def test_a_probe_finds_what_is_out_of_knowledge(tmp_path: Path):
    """Problems whose samples are all wrong; what is probed already is not probed again."""
    out = tmp_path / "probes" / "probe.jsonl"
    config = ProbeConfig(
        weights="base", task="vowels", samples=8, pool=4, batch_size=4, max_new_tokens=2,
        temperature=1.0, out=str(out),
    )  # fmt: skip
    asked: list[str] = []

    class Hard(Vowels):
        """Vowels of which half can't be solved."""

        def score(self, completion: Completion) -> Reward:
            asked.append(completion.problem.uid)
            even = completion.problem.uid in ("train0", "train2")
            return super().score(completion) if even else Reward(0.0, False)

    made = RLJob(config.rl, language_model("shallow"), Hard())
    probe(config, made)
    options, problems = read_probe(out)
    assert options == {**config.options, "model": options["model"]} and options["top_p"] == 0.9
    assert [problem.uid for problem in problems] == ["train0", "train1", "train2", "train3"]
    assert [problem.correct > 0 for problem in problems] == [True, False, True, False]
    assert len(asked) == 32
    kept = out.read_text().splitlines()
    out.write_text("\n".join(kept[:3]) + "\n")
    probe(config, made)
    assert out.read_text().splitlines() == kept and len(asked) == 48
    with pytest.raises(ValueError, match="was probed with samples=8, now it is 9: choose another"):
        probe(ProbeConfig(**{**vars(config), "samples": 9}), made)
    trained = dataclasses.replace(made.lm, model=filled(made.lm.model, seed=1))  # the run went on
    with pytest.raises(ValueError, match=r"with model='\w+', now it is '\w+' at base: choose anot"):
        probe(config, RLJob(config.rl, trained, Hard()))
    assert out.read_text().splitlines() == kept
    assert fingerprint(made.lm, configs=False) == options["model"] != fingerprint(made.lm)
    (old := tmp_path / "old.jsonl").write_text('{"probe": {"samples": 8}}\n')
    with pytest.raises(ValueError, match="earlier version, which did not note its model: choose"):
        probe(dataclasses.replace(config, out=str(old)), made)
    endless = ProbeConfig(task="vowels", out=str(tmp_path / "new.jsonl"))
    with pytest.raises(ValueError, match="vowels is endless, choose a number of problems"):
        probe(endless, RLJob(endless.rl, language_model("shallow"), Vowels()))

    task = Ternary(knowledge=True, probe=str(out)).of_task(Vowels())
    for index, values in ((0, [1, 0, -1]), (1, [-1, 1, -1])):
        said = [("\0", (0,)), ("I don't know", (73,)), ("x", (200,))]
        found = [
            task.score(Completion(task.problem("train", index), text, tokens, True)).value
            for text, tokens in said
        ]
        assert found == values
    with pytest.raises(ValueError, match="has no problem 'train0', the first of vowels"):
        kept[1] = json.dumps({"uid": "other", "correct": 0, "samples": 8})
        out.write_text("\n".join(kept) + "\n")
        Ternary(knowledge=True, probe=str(out)).of_task(Vowels())
    out.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="is no file of `thoughtbubbles probe`"):
        read_probe(out)


def test_answers_of_a_probe_are_of_the_nucleus(tmp_path: Path):
    """A nucleus of one token is greedy, whatever the temperature."""
    made = job(tmp_path, "grpo")
    variables = made.first_state().variables
    problems = [made.task.problem("train", index) for index in range(4)]

    def texts(**changes: Any) -> list[tuple[str, ...]]:
        sampler = made.sampler(variables, greedy=not changes)
        sampling = dataclasses.replace(sampler.sampling, **changes)
        narrow = Sampler(sampler.policy, sampling, 256, made.trainable.mesh)
        rows = made.collector.strategy.collect(narrow, made.task, problems, [1] * 4, (0,))
        return [row.texts for row in rows]

    assert texts(top_p=1e-6) == texts() != texts(top_p=1.0)


def test_top_p_keeps_the_nucleus():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 12)), jnp.float32)
    for top_p in (0.1, 0.5, 0.9, 1.0):
        found = nucleus(logits, jnp.float32(top_p))
        np.testing.assert_array_equal(found, keep_top_p(logits, top_p))


def test_a_scorer_that_raises_is_no_silent_zero():
    """Its traceback reaches the run's log, and responses without a box are scored too."""

    class Broken(type(make_task("reverse", 0))):
        def score(self, completion):
            raise RuntimeError("no verifier")

    task = truthful(Broken(), Ternary(boxed=True), None)
    found = task.score(Completion(task.problem("train", 0), "no box", (1,), True))
    assert found.info["scorer_errors"] == 1 and "RuntimeError: no verifier" in found.error
    with pytest.raises(ValueError, match="reward ternary is given twice"):
        truthful(task, Ternary(), None)


def test_a_probe_must_be_whole(tmp_path):
    class Two:
        name, sizes = "two", {"train": 2, "test": 2}

        def problem(self, split, index):
            return Problem(f"{split}{index}", "?")

    file = tmp_path / "probe.jsonl"
    for options, way_out in (({}, "earlier version, .*another file"), ({"model": ""}, "again, it")):
        file.unlink(missing_ok=True)
        lines = [{"probe": options}, {"uid": "train0", "correct": 0, "samples": 4}]
        append_objects(file, lines, is_probe)
        with pytest.raises(ValueError, match=f"has 1 of the 2 .* problems of two: .*{way_out}"):
            unsolved_problems(file, Two())
    append_objects(file, [{"uid": "train1", "correct": 1, "samples": 4}], is_probe)
    whole = file.read_text()
    file.write_text(whole + '{"uid": "tra')
    drop_half_line(file, is_probe)
    assert file.read_text() == whole and unsolved_problems(file, Two()) == {"train0"}
    for half, left in (('{"pro', ""), (notes := "notes without a last newline", notes)):
        file.write_text(half)
        drop_half_line(file, is_probe)
        assert file.read_text() == left

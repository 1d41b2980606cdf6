"""Rewards by outcome, of answers that are right, abstain or are wrong (TruthRL, 2509.25760)."""

import dataclasses
import re
import unicodedata
from collections.abc import Collection, Mapping
from typing import Any, Literal

from train.rl.problems import answer_of
from train.rl.protocols import Task
from train.rl.scoring import safe_score
from train.rl.types import Completion, Problem, Reward, Split

Reasoning = Literal["none", "multiplicative", "additive", "conditional"]
Outcome = Literal["right", "abstained", "wrong"]

UNKNOWN = "I don't know"
"""Phrase that abstains, unless the task or the user sets another one."""

INVALID = "invalid question"
"""Phrase that rejects a question as invalid; a response with this phrase counts as wrong."""

_BOX = "\\boxed{"
_NEITHER_WORD_NOR_SPACE = re.compile(r"[^\w\s]|_")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_BREAK = "\0"  # between characters of which neither is a neighbour of a word
_BROKEN_ARTICLES = re.compile(r"(?<!\S)\0*(?:a|an|the)\0*(?!\S)")
_MARKED = re.compile(r"[^a-z0-9\s]")


def boxed(text: str) -> str | None:
    r"""Return the content of a text's last `\boxed{...}` with balanced braces.

    The result is None if there is no `\boxed{`, or if the last `\boxed{` is never closed.
    """
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth = 1
    for index in range(start + len(_BOX), len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start + len(_BOX) : index]
    return None


def normalized(text: str) -> str:
    """Normalise a text: lower case, no punctuation, no articles (a, an, the), single spaces."""
    text = _ARTICLES.sub(" ", _NEITHER_WORD_NOR_SPACE.sub("", text.lower()))
    return " ".join(text.split())


def abstains(answer: str, phrase: str) -> bool:
    """Return whether an answer abstains.

    An answer abstains if it contains the phrase, with both texts normalised, whatever else it says:
    "I don't know, maybe Paris" abstains, and so does "I don't know why you ask, it is Paris", as in
    the paper. The phrase must not be a part of a word: "no" is not in "know". Words end at spaces
    and at punctuation other than apostrophes ("Paris/unknown" abstains), and at letters of scripts
    without capital letters, some of which have no spaces between words. A phrase without letters
    and digits, such as "?", must be the answer's whole first line.

    Args:
        answer: Answer, not yet normalised.
        phrase: Phrase that abstains.
    """
    words = normalized(phrase).split()
    if not words:
        return answer_of(answer) == phrase.strip()
    text = _BROKEN_ARTICLES.sub(" ", _MARKED.sub(_broken, answer.lower()))
    pattern = r"\0*\s[\s\0]*".join(r"\0*".join(map(re.escape, word)) for word in words)
    return re.search(rf"(?<![^\s\0]){pattern}(?![^\s\0])", text) is not None


def _broken(found: re.Match[str]) -> str:
    """Replace punctuation by a break, and put breaks around letters that make no words by case."""
    letter = found[0]
    if not letter.isalnum():
        joins = letter in "'’" or unicodedata.category(letter).startswith("M")
        return "" if joins else _BREAK
    cased = letter.isdigit() or letter != letter.upper()
    return letter if cased else f"{_BREAK}{letter}{_BREAK}"


def truthfulness(
    accuracy: float,
    uncertain: float,
    hallucination: float,
    weights: tuple[float, float, float] = (1.0, 0.0, 1.0),
) -> float:
    """Compute the truthfulness score w1 Acc + w2 Unc - w3 Hall.

    Args:
        accuracy: Fraction of right answers (Acc).
        uncertain: Fraction of abstentions (Unc).
        hallucination: Fraction of wrong answers (Hall).
        weights: Weights (w1, w2, w3).
    """
    return weights[0] * accuracy + weights[1] * uncertain - weights[2] * hallucination


def outcome_value(outcome: Outcome, abstain: float = 0.0, out_of_knowledge: bool = False) -> float:
    """Return the ternary reward: 1 for right, `abstain` for abstained, -1 for wrong answers.

    Args:
        outcome: Outcome of the response.
        abstain: Reward of abstaining (r_abstain); -1 makes the reward binary.
        out_of_knowledge: Whether to use the knowledge-enhanced reward of a problem that is out of
            the policy's knowledge: 1 for abstaining, -1 for any answer.
    """
    if out_of_knowledge:
        return 1.0 if outcome == "abstained" else -1.0
    return {"right": 1.0, "abstained": abstain, "wrong": -1.0}[outcome]


def with_reasoning(value: float, score: float, how: Reasoning) -> float:
    """Combine the reward of an outcome with a score of the reasoning (reasoning-enhanced reward).

    Args:
        value: Reward of the outcome (r_o).
        score: Score of the reasoning, 0 or 1 (r_reason).
        how: Formula of the result: "multiplicative" r_o (1 + r_reason), "additive"
            r_o + r_reason / 2, "conditional" r_o r_reason if r_o = 1 and else r_o, "none" r_o.
    """
    if how == "multiplicative":
        return value * (1.0 + score)
    if how == "additive":
        return value + 0.5 * score
    if how == "conditional":
        return value * score if value == 1 else value
    return value


@dataclasses.dataclass(frozen=True)
class TruthfulTask:
    r"""A wrapper that scores a task's responses as right, abstained or wrong.

    The first rule that applies decides the outcome of a response. The response is wrong if
    `demand_box` is set and it has no box. It abstains if its answer contains `phrase` (`abstains`).
    It is wrong if its answer contains "invalid question". It is right if the answer's first line
    equals one of the task's `golds(problem)`, with both texts normalised, or if the task's own
    scorer counts the answer as a success. Otherwise it is wrong.

    A right or abstaining response is a success if the task's own scorer counts it as a success. A
    right response is also a success if its problem is not out of knowledge. The info of a reward
    has the metrics of `shares`.

    Attributes:
        task: Task with a scorer. It may also have `golds(problem)`, the texts of right answers;
            `normalize(text)`, for answers that are not prose; `out_of_knowledge(problem)`; and
            `reasoning(completion)`, a score of 0 or 1.
        abstain: Reward of abstaining (r_abstain).
        demand_box: Whether the answer is the response's last `\boxed{...}`, which must exist;
            otherwise the whole response is the answer.
        phrase: Phrase that abstains.
        knowledge: Whether problems out of knowledge get reward 1 for abstaining and -1 for any
            answer.
        unsolved: Names of problems that are out of knowledge, in addition to those for which the
            task's `out_of_knowledge` is true.
        reasoning: Formula by which the score of the reasoning changes the reward
            (`with_reasoning`).
    """

    task: Any
    abstain: float = 0.0
    demand_box: bool = False
    phrase: str = UNKNOWN
    knowledge: bool = False
    unsolved: Collection[str] = ()
    reasoning: Reasoning = "none"

    failure_value = -1.0

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def sizes(self) -> Mapping[Split, int | None]:
        return self.task.sizes

    def problem(self, split: Split, index: int) -> Problem:
        return self.task.problem(split, index)

    def score(self, completion: Completion) -> Reward:
        problem = completion.problem
        answer = boxed(completion.text) if self.demand_box else completion.text
        # Scored without a box too: a scorer that always raises is to be noticed.
        text = completion.text if answer is None else answer
        verdict = safe_score(self.task, dataclasses.replace(completion, text=text))
        outcome = self._outcome(problem, answer, verdict)
        beyond = self.out_of_knowledge(problem)
        value = of_outcome = outcome_value(outcome, self.abstain, self.knowledge and beyond)
        if self.reasoning != "none":
            value = with_reasoning(value, float(self.task.reasoning(completion)), self.reasoning)
        success = outcome != "wrong" and verdict.success
        success |= outcome == "right" and not beyond  # a lucky guess does not solve a problem
        info = {**verdict.info, **shares(outcome)}
        return Reward(value, success, info, verdict.error, of_outcome)

    def out_of_knowledge(self, problem: Problem) -> bool:
        """Return whether a problem is in `unsolved`, or out of knowledge according to the task."""
        knows = getattr(self.task, "out_of_knowledge", None)
        return problem.uid in self.unsolved or bool(knows and knows(problem))

    def _outcome(self, problem: Problem, answer: str | None, verdict: Reward) -> Outcome:
        if answer is None:
            return "wrong"
        if abstains(answer, self.phrase):
            return "abstained"
        if INVALID in normalized(answer):
            return "wrong"
        golds = getattr(self.task, "golds", lambda problem: ())(problem)
        plain = getattr(self.task, "normalize", normalized)
        text = plain(answer_of(answer))
        equal = bool(text) and text in {plain(gold) for gold in golds}
        return "right" if equal or verdict.success else "wrong"


def shares(outcome: Outcome) -> dict[str, float]:
    """Convert the outcome of one response to metrics, which are averaged over responses.

    Returns:
        A dict of `accuracy`, `uncertain` and `hallucination`, of which one is 1 and two are 0; and
        of the truthfulness score for w2 = 0, 1/2 and -1/2 (`truthfulness`,
        `truthfulness_plus_half` and `truthfulness_minus_half`).
    """
    right, abstained, wrong = (float(outcome == name) for name in ("right", "abstained", "wrong"))
    return {
        "accuracy": right,
        "uncertain": abstained,
        "hallucination": wrong,
        "truthfulness": truthfulness(right, abstained, wrong),
        "truthfulness_plus_half": truthfulness(right, abstained, wrong, (1.0, 0.5, 1.0)),
        "truthfulness_minus_half": truthfulness(right, abstained, wrong, (1.0, -0.5, 1.0)),
    }


def truthful(task: Task | Any, options: Any, unsolved: Collection[str] | None) -> TruthfulTask:
    """Wrap a task so that it is scored by outcome (`TruthfulTask`).

    Args:
        task: Task with a scorer.
        options: Options of the scorer (`train.rl.learning.penalties.Ternary`).
        unsolved: Names of problems that are out of knowledge; None without a probe.

    Raises:
        ValueError: The task has turns or is already a `TruthfulTask`, or the options need a probe,
            a method `out_of_knowledge` or a method `reasoning` that is missing.
    """
    if hasattr(task, "step"):
        raise ValueError(
            f"reward ternary is for tasks of one response, {task.name} has turns: leave it out"
        )
    if isinstance(task, TruthfulTask):
        raise ValueError("reward ternary is given twice: leave one of them out")
    if options.knowledge and unsolved is None and not hasattr(task, "out_of_knowledge"):
        raise ValueError(
            f"knowledge=True needs to know which problems of {task.name} are out of knowledge: "
            "give probe=FILE of `thoughtbubbles probe`"
        )
    if options.reasoning != "none" and not hasattr(task, "reasoning"):
        raise ValueError(
            f"reasoning={options.reasoning!r} needs a score of the reasoning, and {task.name} has "
            "no method `reasoning(completion)`: choose 'none', or give it one"
        )
    phrase = options.unknown or getattr(task, "unknown", UNKNOWN)
    return TruthfulTask(
        task,
        options.abstain,
        options.boxed,
        phrase,
        options.knowledge,
        frozenset(unsolved or ()),
        options.reasoning,
    )

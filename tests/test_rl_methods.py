"""Promises that every method and every part in a registry keeps, and parts of the user's own."""

import dataclasses
import json
import math
import re
import sys
import types
from pathlib import Path
from typing import Any, ClassVar, cast

import jax
import numpy as np
import pytest
from contracts import example
from rl_runs import Dies, job, rewards, timeless, trajectories
from rl_tiny import Vowels

from thoughtbubbles.typed_json import required_options
from train.cli import main as entry
from train.cli.calls import text_of
from train.cli.command import parse
from train.cli.config_json import as_json
from train.rl.config import RLConfig
from train.rl.learning.credit import assign_advantages
from train.rl.learning.estimators import ADVANTAGES, GroupNormalized, LeaveOneOut
from train.rl.learning.losses import ClippedLoss
from train.rl.learning.penalties import REWARDS, OverlongPenalty
from train.rl.loop import train
from train.rl.methods import GRPO, METHODS
from train.rl.parts import KINDS, choices, part_from_text
from train.rl.rollout.budgets import ALLOCATORS
from train.rl.rollout.collector import Collector
from train.rl.rollout.strategies import STRATEGIES, OneResponse, Turns
from train.rl.types import Completion, Episodes, Trajectory
from train.runs.checkpoint import load_params
from train.runs.metrics import read_metrics
from train.runs.resume import differences


@dataclasses.dataclass(frozen=True)
class Ranks(GroupNormalized):
    """A user's estimator: the rank of a reward in its group in place of the reward."""

    word: ClassVar[str] = "own_ranks"
    power: float = 1.0

    def estimate(self, reward, group, valid):
        below = (group[:, None] == group) & (reward[:, None] > reward)
        return super().estimate(below.sum(axis=1) ** self.power, group, valid)


@dataclasses.dataclass(frozen=True)
class RankGRPO(GRPO):
    """A user's method."""

    word: ClassVar[str] = "own_ranks_grpo"

    @property
    def advantage(self):
        return Ranks()


EVERY = (*METHODS, "own_ranks_grpo")
ESTIMATORS = [
    *(("method", word) for word in EVERY),
    *(("advantage", word) for word in (*ADVANTAGES, "own_ranks")),
]
EACH = [(kind, word) for kind, (_, registry) in KINDS.items() for word in registry]
REQUIRED = {"overlong": "buffer=8"}
OWN = {"own_ranks_grpo": RankGRPO(), "own_ranks": Ranks(2.0)}
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
[PARTS] = re.findall(
    r"```python\n((?:(?!```).)*STRATEGIES\[.*?)```", PAGE.read_text(), flags=re.DOTALL
)


OUTCOMES = [[0.0, 1.0, 0.25], [1.0, 0.0], [1.0, 1.0, 0.0, 0.5]]


def advantages_of(config: RLConfig, rows: list[Trajectory]) -> list[np.ndarray]:
    return assign_advantages(rows, Episodes.from_trajectories(rows), config)


def made(kind: str, word: str) -> Any:
    """A method or a part of the registry by its name, or one of those above."""
    if word in OWN:
        return OWN[word]
    if word in REQUIRED:
        return part_from_text(kind, f"{word}({REQUIRED[word]})")
    return part_from_text(kind, example(word, KINDS[kind][1][word]))


def made_method(word: str, **options: Any) -> Any:
    return dataclasses.replace(made("method", word), **options)


def estimator(kind: str, word: str) -> RLConfig:
    options: dict[str, Any] = {kind: made(kind, word)}
    return RLConfig(**options)


@pytest.mark.parametrize(("kind", "word"), EACH)
def test_a_part_is_written_as_it_is_read(kind, word):
    """On the command line and in config.json, with all options."""
    base, registry = KINDS[kind]
    part = made(kind, word)
    assert isinstance(part, base) and type(part) is registry[word]
    text = text_of(word, part)
    assert part_from_text(kind, text) == part and text.startswith(f"{word}(")
    changes: dict[str, Any] = {kind: (text,) if kind == "reward" else text}
    config = RLConfig(**changes | ({"train": "trigger"} if word == "invocation" else {}))
    saved = as_json(config)[kind]
    assert saved == ([text] if kind == "reward" else text)
    read = parse(RLConfig, [f"--{kind}", text, "--train", config.train])
    assert as_json(read) == as_json(config) and not differences(as_json(config), read)


@pytest.mark.parametrize(("kind", "word"), EACH)
def test_a_part_has_a_line_in_the_help(kind, word):
    lines = choices().splitlines()
    start = lines.index(f"choices of --{kind}:")
    line = next(line for line in lines[start:] if re.match(rf"  {word}\W", line))
    assert len(line.partition(": ")[2].split()) > 3


@pytest.mark.parametrize("word", EVERY)
def test_a_method_is_a_preset_of_parts(word):
    method = made_method(word, kl=0.5, clip_high=0.3)
    config = RLConfig(method=method)
    assert config.recipe.word == word and type(method).__doc__
    assert config.parts.advantage == method.advantage
    assert (config.parts.loss.kl, config.parts.loss.clip_high) == (0.5, 0.3)
    if required_options(type(method)):
        return  # of a part, perhaps, which then may not be replaced
    other = RLConfig(
        method=made_method(word), advantage="rloo", loss="clipped(kl=0.25)", allocator="uniform",
        strategy="turns(max_turns=3)",
    )  # fmt: skip
    assert other.parts.advantage == LeaveOneOut()
    assert other.parts.loss == ClippedLoss(kl=0.25)
    assert other.parts.strategy == Turns(max_turns=3)


def test_integers_for_floats_are_no_difference_on_resume():
    saved = as_json(RLConfig(method=GRPO(kl=0.0), reward=(OverlongPenalty(8, 1.0),)))
    assert not differences(saved, RLConfig(method=GRPO(kl=0), reward=(OverlongPenalty(8, 1),)))
    assert differences(saved, RLConfig(method=GRPO(kl=1), reward=(OverlongPenalty(8),)))
    assert differences(saved, RLConfig(method="grpo", advantage="rloo"))


@pytest.mark.parametrize("word", ALLOCATORS)
def test_an_allocator_spends_its_budget_and_goes_on(word):
    allocator = dataclasses.replace(made("allocator", word))
    for uids, total in ((["a", "b", "c"], 24), (["c", "d", "e"], 25), (["a", "e"], 16)):
        counts = allocator.plan(uids, total)
        assert len(counts) == len(uids) and sum(counts) == total and min(counts) >= 0
        for uid, count in zip(uids, counts, strict=True):
            allocator.observe(uid, [number % 2 == 0 for number in range(count)])
    again = dataclasses.replace(allocator)
    again.restore(json.loads(json.dumps(allocator.state)))
    assert again.plan(["a", "e", "f"], 24) == allocator.plan(["a", "e", "f"], 24)


@pytest.mark.parametrize("word", REWARDS)
def test_shaping_changes_no_success_and_knows_no_order(word):
    shaping = made("reward", word)
    rng = np.random.default_rng(0)
    rows = [
        dataclasses.replace(row, decisions=rng.choice([-1, 0, 1], len(row.tokens)).astype(np.int8))
        for row in trajectories(OUTCOMES)
    ]
    episodes = Episodes.from_trajectories(rows)
    before = episodes.reward.copy()
    found = shaping(episodes.reward.copy(), rows, episodes, 8)
    assert found.dtype == np.float64 and np.isfinite(found).all()
    rescored = shaping.of_task(Vowels())
    assert isinstance(rescored, Vowels) == bool((found != before).any()), "one of the two"
    for text in ("", "a", "\x80"):
        done = Completion(rescored.problem("train", 0), text, tuple(text.encode() or [0]), True)
        assert rescored.score(done).success == Vowels().score(done).success
    np.testing.assert_array_equal(episodes.reward, before)
    # What shapings before it have done is kept.
    np.testing.assert_allclose(shaping(before + 2, rows, episodes, 8), found + 2, rtol=1e-12)
    order = rng.permutation(len(rows))
    shuffled = [rows[index] for index in order]
    again = shaping(before[order], shuffled, Episodes.from_trajectories(shuffled), 8)
    np.testing.assert_allclose(again, found[order], rtol=1e-12)


@pytest.mark.parametrize(("kind", "word"), ESTIMATORS)
def test_the_order_of_rows_changes_nothing(kind, word):
    config = estimator(kind, word)
    rows = trajectories(OUTCOMES)
    found = advantages_of(config, rows)
    assert [len(advantage) for advantage in found] == [len(row.tokens) for row in rows]
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = advantages_of(config, [rows[index] for index in order])
    for index, advantage in zip(order, shuffled, strict=True):
        np.testing.assert_allclose(advantage, found[index], rtol=1e-12, atol=1e-12)
    assert max(np.abs(advantage).max() for advantage in found) > 0.1


@pytest.mark.parametrize(("kind", "word"), ESTIMATORS)
def test_better_rewards_get_higher_advantages_and_equal_ones_none(kind, word):
    config = estimator(kind, word)
    rows = trajectories(OUTCOMES)
    acted = [advantage[-1] for advantage in advantages_of(config, rows)]
    for group in range(len(OUTCOMES)):
        mine = [index for index, row in enumerate(rows) if row.group == group]
        mine.sort(key=lambda index: rows[index].reward.value)
        advantages = [acted[index] for index in mine]
        assert advantages == sorted(advantages)
        assert advantages[0] < 0 < advantages[-1]
    # A value head, where there is one, has predicted them.
    equal = [
        dataclasses.replace(row, values=np.ones(len(row.tokens)))
        for row in trajectories([[1.0, 1.0], [1.0, 1.0, 1.0]])
    ]
    assert all((advantage == 0).all() for advantage in advantages_of(config, equal))


@pytest.mark.parametrize("word", EVERY)
def test_advantages_are_clipped_and_those_of_a_strategy_are_kept(word):
    rows = trajectories(OUTCOMES)
    own = np.full(len(rows[0].tokens), 7.0)
    rows[0] = dataclasses.replace(rows[0], advantages=own)
    found = advantages_of(RLConfig(method=made_method(word, advantage_clip=0.1)), rows)
    assert found[0] is own
    assert max(np.abs(advantage).max() for advantage in found[1:]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dapoo", "unknown method 'dapoo' (perhaps dapo?): choose one of grpo, dr_grpo"),
        ("dapo(clip=1)", "method 'dapo(clip=1)': write dapo(clip_low=0.2, clip_high=0.28, "),
        ("dapo(kl=-1)", "kl=-1"),
        ("rebn(gamma=0.0)", "gamma=0.0: choose more than 0"),
        ("grpo(advantage_clip=-1.0)", "advantage_clip=-1.0: choose more than 0"),
        ("grpo(gamma=0.9)", "write grpo("),
    ],
)
def test_mistakes_are_one_line(text, message):
    with pytest.raises(ValueError) as error:
        part_from_text("method", text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_part_needs_a_word_of_its_own(monkeypatch):
    """Else a run folder would name another one."""
    mine = type("Mine", (GRPO,), {})
    monkeypatch.setitem(METHODS, "mine", mine)
    with pytest.raises(
        ValueError, match="method 'mine' has the word 'grpo': set its `word` to 'mine'"
    ):
        part_from_text("method", "mine")
    with pytest.raises(ValueError, match="Mine has the word 'grpo' of another method"):
        RLConfig(method=mine())
    with pytest.raises(ValueError, match="Other has the word 'rloo' of another advantage"):
        RLConfig(advantage=type("Other", (LeaveOneOut,), {})())
    with pytest.raises(ValueError, match="LeaveOneOut is no PolicyLoss: inherit from it"):
        RLConfig(loss=LeaveOneOut())  # pyright: ignore[reportArgumentType]


def test_one_reward_shaping_needs_no_tuple():
    several = RLConfig(reward=(OverlongPenalty(8),))
    assert RLConfig(reward="overlong(buffer=8)") == RLConfig(reward=OverlongPenalty(8)) == several


def test_a_plugin_adds_a_method(tmp_path: Path, monkeypatch, capsys):
    """In a folder with a train.py of its own: `test_command.py`."""
    (tmp_path / "own_plugin.py").write_text(
        "import dataclasses\n"
        "from typing import ClassVar\n"
        "from train.rl.methods import GRPO, METHODS\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Mine(GRPO):\n"
        "    word: ClassVar[str] = 'own_method'\n"
        "    strength: float = 1.0\n"
        "METHODS['own_method'] = Mine\n"
        "from train.rl.rollout.budgets import ALLOCATORS, Uniform\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Half(Uniform):\n"
        "    'The same for half of the problems.'\n"
        "    word: ClassVar[str] = 'own_half'\n"
        "ALLOCATORS['own_half'] = Half\n"
    )
    words = [
        "--plugin",
        "own_plugin",
        "--method",
        "own_method(strength=2)",
        "--allocator",
        "own_half",
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["thoughtbubbles", "rl", "--task", "help", *words])
    monkeypatch.setattr(sys, "path", [*sys.path])
    for registry, word in (
        (METHODS, "own_method"),
        (ALLOCATORS, "own_half"),
        (sys.modules, "own_plugin"),
    ):
        monkeypatch.setitem(registry, word, None)  # so that it is taken out again
    del sys.modules["own_plugin"]
    try:
        entry.main()
    except SystemExit as left:
        assert not left.code
    assert "reverse(" in capsys.readouterr().out
    assert METHODS["own_method"] and ALLOCATORS["own_half"]


# Here parts are looked at without a run; test_rl_run runs dapo, test_rl_ppo a value head,
# test_rl_search deepsearch, and the next test the parts of a page. Each method, after a change:
# `python -m pytest -m experiment tests/test_rl_methods.py`.
@pytest.mark.experiment
@pytest.mark.parametrize("word", EVERY)
def test_a_method_improves_and_goes_on_bit_for_bit_after_a_kill(tmp_path, word):
    """On an easy task, in a few steps; the killed run repeats step 3 and ends as the whole one."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    found = train(job(whole, made_method(word)))
    assert np.mean(rewards(whole)[-2:]) > rewards(whole)[0] + 0.15
    with pytest.raises(KeyboardInterrupt):
        train(job(killed, made_method(word), Dies(killed)))
    assert len(rewards(killed)) == 3
    assert train(job(killed, made_method(word))) == found
    assert timeless(killed) == timeless(whole)
    ours, theirs = (load_params(folder)[1] for folder in (killed, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_parts_of_the_page_improve_and_go_on(tmp_path, monkeypatch):
    """An allocator and a strategy of a user's own, as docs/architecture.md writes them."""
    monkeypatch.setitem(ALLOCATORS, "unsolved", None)  # not there afterwards
    monkeypatch.setitem(STRATEGIES, "second_chance", None)
    parts = {"allocator": "unsolved()", "strategy": "second_chance(hint=' No: ')"}
    module = types.ModuleType("of_the_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(PARTS, module.__dict__)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    found = train(job(whole, GRPO(), **parts))
    lines = [line for line in read_metrics(whole) if "reward" in line]
    assert lines[-1]["reward"] > lines[0]["reward"]
    assert lines[0]["length"] > 2  # the longest of one response
    with pytest.raises(KeyboardInterrupt):
        train(job(killed, GRPO(), Dies(killed), **parts))
    assert train(job(killed, GRPO(), **parts)) == found
    assert timeless(killed) == timeless(whole)


class Raises(Vowels):
    """Vowels by a scorer that raises for some responses, or for all."""

    def __init__(self, below: int):
        self.below = below

    def score(self, completion):
        return super().score(completion) if completion.tokens[0] < self.below else 1 / 0


def test_why_a_scorer_raised_is_shown_and_one_that_always_does_ends_the_run(tmp_path, capsys):
    train(job(tmp_path / "some", GRPO(), Raises(below=200), steps=2))
    shown = capsys.readouterr().err
    assert shown.count("Traceback (most recent call last)") == 1  # the first one alone
    raised = [line for line in shown.splitlines() if "the scorer raised in" in line]
    assert any("held-out" in line for line in raised)
    lines = [line for line in raised if "held-out" not in line]
    assert len(lines) == 2
    assert all("% (ZeroDivisionError: division by zero)" in line for line in lines)
    with pytest.raises(ValueError, match="step 1: the scorer of vowels raised for every") as error:
        train(job(tmp_path / "all", GRPO(), Raises(below=0)))
    assert str(error.value).endswith("response, ZeroDivisionError: division by zero: mend it")


def test_an_infinite_option_is_written_so_that_it_is_read():
    endless = GRPO(clip_high=math.inf)
    assert part_from_text("method", text_of("grpo", endless)) == endless


def test_a_strategy_learns_nothing_from_held_out_problems():
    @dataclasses.dataclass(frozen=True)
    class Counts(OneResponse):
        word: ClassVar[str] = "counts"
        seen: dict = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

        def collect(self, sampler, task, problems, counts, seed):
            self.seen[seed] = len(problems)
            return []

    strategy = Counts()
    collector = Collector(RLConfig(), Vowels(), strategy, ALLOCATORS["uniform"]())
    assert collector.held_out(cast(Any, None)) == [] and strategy.seen == {}
    strategy.collect(None, None, [1, 2], [1, 1], (0,))
    assert strategy.seen == {(0,): 2}

"""Episodes keep to their environment's number of turns; the command that plays one."""

import dataclasses
import threading
import time
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from rl_tiny import language_model

from train.play import PlayConfig, main
from train.rl.config import RLConfig
from train.rl.environments import ENVIRONMENTS
from train.rl.environments.generated import GeneratedEnvironment, Move
from train.rl.environments.guess_number import GuessNumber
from train.rl.environments.players import score_player
from train.rl.named_tasks import make_task
from train.rl.rollout.collector import strategy_for
from train.rl.rollout.formatter import PromptFormatter
from train.rl.rollout.sampler import Sampled


class Says:
    """A sampler in whose place a policy says one text again and again."""

    max_rows = 4

    def __init__(self, formatter: PromptFormatter, text: str):
        ids = np.array(formatter.observation(text, 9), np.int32)
        self._said = Sampled(ids, np.zeros(len(ids), np.float32), np.full(len(ids), -1, np.int8))
        self.capacity = 0

    def open(self, texts, source, keys, capacity, responses=1) -> Any:
        self.capacity = capacity
        return types.SimpleNamespace(
            respond=lambda limit, active=None: [self._said] * len(source), observe=lambda ids: None
        )


@pytest.fixture(scope="module")
def formatter() -> PromptFormatter:
    return PromptFormatter(language_model("shallow"))


@pytest.mark.parametrize("keep_context", [True, False])
@pytest.mark.parametrize(
    ("task", "options", "turns"),
    [
        ("guess_number(max_turns=12)", "", 12),  # more than the 8 of those that say none
        ("guess_number(max_turns=3)", "", 3),
        ("guess_number(max_turns=12)", "max_turns=5, ", 5),
    ],
)
def test_episodes_last_as_long_as_the_environment_says(
    formatter, keep_context, task, options, turns
):
    environment = make_task(task, 0)
    config = RLConfig(
        strategy=f"turns({options}keep_context={keep_context})", task=task, train="all",
        max_new_tokens=2,
    )  # fmt: skip
    strategy = strategy_for(config, environment, formatter)
    sampler: Any = Says(formatter, "0")
    problem = environment.problem("train", 0)
    rows = strategy.collect(sampler, environment, [problem], [2], (0, 0))
    assert len(rows) == (2 if keep_context else 2 * turns)
    for row in rows:
        assert len(row.turn_rewards) == turns == row.reward.info["turns"]
        assert len(row.begins) == (turns if keep_context else 1) == strategy.responses_per_row
    if keep_context:
        assert sampler.capacity == turns * (2 + 64)


@dataclasses.dataclass(frozen=True)
class Stuck(GuessNumber):
    """Guessing that hangs, or gives no finite reward, where the guess is 7."""

    gate: Any = dataclasses.field(default_factory=threading.Event, repr=False)
    reward: float | None = None

    def step(self, state, action):
        turn = super().step(state, action)
        if action.text == "7" and self.reward is None:
            self.gate.wait(20)
        return dataclasses.replace(turn, reward=self.reward or turn.reward)


@pytest.mark.parametrize("keep_context", [True, False])
def test_an_environment_that_hangs_costs_its_limit_and_is_counted(formatter, keep_context):
    """And ends the collection where it always does."""
    config = RLConfig(
        strategy=f"turns(keep_context={keep_context})", task="guess_number", train="all",
        max_new_tokens=2, environment_limit_s=0.02,
    )  # fmt: skip

    def collect(environment: Any, count: int) -> list[Any]:
        sampler: Any = Says(formatter, "7")
        sampler.max_rows = 64  # all in one batch
        strategy = strategy_for(config, environment, formatter)
        problem = environment.problem("train", 0)
        return strategy.collect(sampler, environment, [problem], [count], (0, 0))

    stuck = Stuck()
    rows = collect(stuck, 2)
    assert [row.reward.info for row in rows] == [{"turns": 1, "timeouts": 1}] * 2
    assert all(row.reward.error == "no result after 0.02 seconds" for row in rows)
    begin = time.monotonic()
    with pytest.raises(ValueError, match="hangs: 8 calls .* `rl` by --environment-limit-s 300"):
        collect(stuck, 40)
    assert time.monotonic() - begin < 10
    stuck.gate.set()
    [row] = collect(Stuck(reward=float("nan")), 1)
    assert row.reward.info["invalid_turns"] == 1 and "the reward nan" in row.reward.error


def test_an_environment_that_says_none_gets_eight(formatter):
    config = RLConfig(task="guess_number", train="all")
    silent: Any = types.SimpleNamespace(name="silent", step=None)
    assert strategy_for(config, silent, formatter).responses_per_row == 8


def keyboard(monkeypatch, texts: Sequence[str]) -> None:
    said = iter(texts)

    def answer(prompt: str) -> str:
        text = next(said, None)
        if text is None:
            raise EOFError
        return text

    monkeypatch.setattr("builtins.input", answer)


def test_a_person_plays(monkeypatch, capsys):
    keyboard(monkeypatch, ["999", "four", "222", "333"])
    code = make_task("mastermind", 0).problem("train", 2).answer
    main(PlayConfig("mastermind", index=2))
    printed = capsys.readouterr().out
    assert printed.startswith("Mastermind: a prompt is") and "3 of 1-6? \n" in printed
    assert printed.count(" 3 of 1-6? \n") == 2 and f" {code.count('2')} exact 0 near " in printed
    assert printed.endswith("left before the end\n")
    keyboard(monkeypatch, ["999", code])
    main(PlayConfig("mastermind", index=2))
    assert capsys.readouterr().out.endswith("solved after 2 turns, reward 0.9\nmalformed 1\n")
    task = make_task("reverse", 0)
    keyboard(monkeypatch, [task.problem("test", 0).answer])
    main(PlayConfig("reverse", split="test"))
    assert capsys.readouterr().out.endswith(" right \nsolved after 1 turn, reward 1\n")


def test_players_are_watched(capsys):
    main(PlayConfig("hanoi(disks=2)", "scripted"))
    printed = capsys.readouterr().out
    assert printed.count("> ") <= 3 and " - - 21 \nsolved after" in printed
    main(PlayConfig("guess_number(max_turns=1)", "random", index=3))
    assert "cut after 1 turn, reward 0" in capsys.readouterr().out
    main(PlayConfig())
    assert "environments of several turns" in capsys.readouterr().out


def test_why_an_episode_failed_is_printed(monkeypatch, capsys):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Broken(GuessNumber):
        """Broken."""

        word = "broken"

        def move(self, game, said):
            raise RuntimeError("no rules")

    monkeypatch.setitem(ENVIRONMENTS, "broken", Broken)
    main(PlayConfig("broken", "random"))
    printed = capsys.readouterr().out
    assert "not solved after 1 turn, reward 0\nscorer_errors 1\nTraceback" in printed
    assert printed.endswith("RuntimeError: no rules\n")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PlayConfig("mastermin"), "perhaps mastermind"),
        (PlayConfig("guess_number", index=8), "index=8: choose from 0 to 7"),
        (PlayConfig("mastermind", index=-1), "index=-1: choose from 0"),
        (PlayConfig("reverse", "scripted"), "reverse has no such player: play it yourself"),
    ],
)
def test_mistakes_are_one_line(config, words):
    with pytest.raises(ValueError, match=words) as error:
        main(config)
    assert "\n" not in str(error.value)


def test_an_environment_is_one_short_class():
    """With options, splits, limits and counted mistakes, of six methods."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Parity(GeneratedEnvironment):
        word = "parity"

        def draw(self, rng):
            return int(rng.integers(100)), ""

        def prompt(self, answer):
            return f"{answer}? "

        def begin(self, answer):
            return answer

        def move(self, game, said):
            right = said == ("odd" if game % 2 else "even")
            return Move(game, " right " if right else " no ", right) if said.isalpha() else None

        def reminder(self, game):
            return " odd or even? "

    task = Parity(max_turns=2)
    assert task.name == "parity(max_turns=2)"
    problem = task.problem("test", 0)
    turn = task.step(task.reset(problem), types.SimpleNamespace(text="1"))  # pyright: ignore
    assert (turn.observation, turn.reward) == (" odd or even? ", -0.1)
    for player in ("random", "scripted"):
        with pytest.raises(ValueError, match=f"{player}.*parity.* has no such player: play it you"):
            score_player(task, player, 1, 0)
    with pytest.raises(NotImplementedError, match=r"lacks a method: write draw\(rng\)"):
        GeneratedEnvironment()

"""Promises that every method in `METHODS` keeps, and a method of the user's own."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from train.cli.calls import text_of
from train.cli.config_json import as_json
from train.rl.config import RLConfig
from train.rl.learning.credit import Episodes
from train.rl.methods import GRPO, METHODS, Method, method_from_text
from train.rl.types import Problem, Reward, Trajectory


@dataclasses.dataclass(frozen=True)
class Ranks(GRPO):
    """A user's method: the rank of a reward in its group in place of the reward."""

    word: ClassVar[str] = "ranks"
    power: float = 1.0

    def estimate(self, reward, group, valid):
        below = (group[:, None] == group) & (reward[:, None] > reward)
        return super().estimate(below.sum(axis=1) ** self.power, group, valid)


EVERY = {**METHODS, "ranks": Ranks}


def trajectories(rewards: list[list[float]]) -> list[Trajectory]:
    """One row for each episode, groups of unequal sizes, rows of unequal lengths."""
    rng = np.random.default_rng(0)
    rows = []
    for group, values in enumerate(rewards):
        for episode, value in enumerate(values):
            length = int(rng.integers(3, 9))
            trained = np.arange(length) >= 2
            rows.append(
                Trajectory(
                    group=group,
                    problem=Problem(f"p{group}", "?"),
                    tokens=rng.integers(0, 9, length, dtype=np.int32),
                    trained=trained,
                    log_probs=np.where(trained, -1.0, 0.0).astype(np.float32),
                    decisions=np.full(length, -1, np.int8),
                    begins=(2,),
                    reward=Reward(value, value > 0),
                    finished=True,
                    texts=("",),
                    turn_rewards=(value,),
                    episode=episode,
                )
            )
    return rows


REWARDS = [[0.0, 1.0, 0.25], [1.0, 0.0], [1.0, 1.0, 0.0, 0.5]]


def assign_advantages(method: Method, rows: list[Trajectory]) -> list[np.ndarray]:
    episodes = Episodes.of(rows)
    return method.assign_advantages(rows, episodes, episodes.reward.copy())


@pytest.mark.parametrize("word", EVERY)
def test_a_method_is_made_of_parts(word):
    method = EVERY[word]()
    assert method.word == word and type(method).__doc__
    allocator = method.allocator()
    assert sum(allocator.plan(["a", "b", "c"], 8)) == 8
    allocator.restore(allocator.state)
    allocator.observe("a", [True, False])
    default = object()
    assert method.strategy(default) is default or hasattr(method.strategy(default), "collect")
    assert method.loss.clip_low == method.clip_low


@pytest.mark.parametrize("word", METHODS)
def test_a_method_is_written_as_it_is_read(word):
    """On the command line and in config.json, with all options."""
    method = dataclasses.replace(METHODS[word](), kl=0.5, clip_high=0.3)
    assert method_from_text(text_of(word, method)) == method
    saved = as_json(RLConfig(method=method))["method"]
    assert method_from_text(saved) == method and "kl=0.5" in saved
    assert RLConfig(method=word).recipe == METHODS[word]()


@pytest.mark.parametrize("word", EVERY)
def test_the_order_of_rows_changes_nothing(word):
    rows = trajectories(REWARDS)
    found = assign_advantages(EVERY[word](), rows)
    assert [len(advantage) for advantage in found] == [len(row.tokens) for row in rows]
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = assign_advantages(EVERY[word](), [rows[index] for index in order])
    for index, advantage in zip(order, shuffled, strict=True):
        np.testing.assert_allclose(advantage, found[index], rtol=1e-12, atol=1e-12)
    assert max(np.abs(advantage).max() for advantage in found) > 0.1


@pytest.mark.parametrize("word", EVERY)
def test_better_rewards_get_higher_advantages_and_equal_ones_none(word):
    rows = trajectories(REWARDS)
    acted = [advantage[-1] for advantage in assign_advantages(EVERY[word](), rows)]
    for group in range(len(REWARDS)):
        mine = [index for index, row in enumerate(rows) if row.group == group]
        mine.sort(key=lambda index: rows[index].reward.value)
        advantages = [acted[index] for index in mine]
        assert advantages == sorted(advantages)
        assert advantages[0] < 0 < advantages[-1]
    equal = assign_advantages(EVERY[word](), trajectories([[1.0, 1.0], [1.0, 1.0, 1.0]]))
    assert all((advantage == 0).all() for advantage in equal)


@pytest.mark.parametrize("word", EVERY)
def test_advantages_are_clipped_and_those_of_a_strategy_are_kept(word):
    rows = trajectories(REWARDS)
    own = np.full(len(rows[0].tokens), 7.0)
    rows[0] = dataclasses.replace(rows[0], advantages=own)
    found = assign_advantages(EVERY[word](advantage_clip=0.1), rows)
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
        method_from_text(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_method_needs_a_word_of_its_own(monkeypatch):
    """Else a run folder would name another method."""
    monkeypatch.setitem(METHODS, "mine", type("Mine", (GRPO,), {}))
    with pytest.raises(ValueError, match="Mine has the word 'grpo' of another method"):
        method_from_text("mine")


def test_a_plugin_adds_a_method_in_a_folder_with_a_train_of_its_own(tmp_path: Path):
    (tmp_path / "train.py").write_text("raise SystemExit('the wrong train')")
    (tmp_path / "mine.py").write_text(
        "import dataclasses\n"
        "from typing import ClassVar\n"
        "from train.rl.methods import GRPO, METHODS\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Mine(GRPO):\n"
        "    word: ClassVar[str] = 'mine'\n"
        "    strength: float = 1.0\n"
        "METHODS['mine'] = Mine\n"
    )
    command = [str(Path(sys.executable).with_name("thoughtbubbles")), "rl", "--task", "help"]

    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)

    known = ask("--plugin", "mine", "--method", "mine(strength=2)")
    assert known.returncode == 0 and "reverse(" in known.stdout, known.stderr
    unknown = ask("--method", "mine(strength=2)")
    assert unknown.returncode == 2 and "unknown method 'mine'" in unknown.stderr
    missing = ask("--plugin", "nowhere")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: plugin 'nowhere': No module named 'nowhere'")

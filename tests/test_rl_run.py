"""Whole runs: they end, go on after a kill as if nothing had been, and refuse what can't be."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import jax
import numpy as np
import pytest
from flax import nnx
from rl_runs import trajectories
from rl_tiny import LORA, MEMGEN, Vowels, language_model

from memgen import TriggerParam, WeaverParam, trained_params
from train.cli.config_json import as_json
from train.engine.config import EvalConfig
from train.engine.loop import NonFiniteLoss
from train.engine.optim import OptimizerConfig
from train.models.load import LanguageModel, load_model
from train.rl.config import RLConfig
from train.rl.job import RLJob
from train.rl.loop import train
from train.rl.methods import GRPO, DrGRPO, TriggerGRPO
from train.rl.reports import examples
from train.rl.rollout.budgets import Uniform
from train.rl.types import Reward
from train.runs.checkpoint import load_params
from train.runs.metrics import read_metrics

CLOCK = ("time", "seconds", "tokens_per_second", "memory")


def config(out: Path, **changes) -> RLConfig:
    base = RLConfig(
        lora=LORA,
        # Memory before responses alone; within them: test_rl_sampler.
        memgen=dataclasses.replace(MEMGEN, trigger=None, max_inference_events=0),
        weights="base",
        method="dapo(kl=0.01)",
        minibatches=2,
        steps=4,
        batch_size=4,
        num_generations=4,
        max_batches=2,
        max_new_tokens=4,
        save_every=2,
        log_every=1,
        evaluation=EvalConfig(every=2, rows=8),
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.0, final_ratio=1.0),
        out=str(out),
    )
    return dataclasses.replace(base, **changes)


def work(out: Path, task=None, start: LanguageModel | None = None, **changes) -> RLJob:
    return RLJob(
        config(out, **changes),
        start or language_model("shallow"),
        task or Vowels(),
        devices=jax.devices()[:1],
    )


def numbers(out: Path) -> list[dict]:
    """Metrics without what a clock or the machine says."""
    return [
        {name: value for name, value in line.items() if not any(word in name for word in CLOCK)}
        for line in read_metrics(out)
    ]


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    # One update a step, without a reference: there is nothing that it scores.
    "weaver": {"train": "weaver", "method": "grpo", "minibatches": 1},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A run to its end and what it found last."""

    @functools.cache
    def run(kind: str) -> tuple[Path, Any]:
        out = tmp_path_factory.mktemp("whole") / kind
        return out, train(work(out, **KINDS[kind]))

    return run


@pytest.mark.parametrize("kind", ["lora", pytest.param("weaver", marks=pytest.mark.experiment)])
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, whole, kind):
    """Metrics and parameters bit for bit; what is dropped by filtering, KL and shuffling too."""
    out, held_out = whole(kind)

    class Dies(Vowels):
        def score(self, completion):
            if int(completion.problem.uid.removeprefix("test").removeprefix("train")) >= limit:
                raise KeyboardInterrupt
            return super().score(completion)

    marks = [line["groups"] for line in numbers(out) if "groups" in line]
    limit = sum(marks[:3]) - 1  # the last batch of problems of step 3
    with pytest.raises(KeyboardInterrupt):
        train(work(tmp_path, Dies(), **KINDS[kind]))
    again = train(work(tmp_path, **KINDS[kind]))
    assert train(work(tmp_path, **KINDS[kind])) == again  # it is over: nothing is written
    assert again == held_out
    assert numbers(tmp_path) == numbers(out)
    ours, theirs = (load_params(folder)[1] for folder in (tmp_path, out))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_weavers_ratio_is_exactly_one_where_there_is_one_update(whole):
    steps = [line for line in read_metrics(whole("weaver")[0]) if "reward" in line]
    assert len(steps) == 4
    for line in steps:
        assert (line["ratio"], line["approx_kl"], line["clipped"]) == (1, 0, 0)
        assert line["grad_norm"] > 0


@dataclasses.dataclass(frozen=True)
class Favourites(Uniform):
    """Gives all but two rollouts of each other problem to the first, and counts successes."""

    word: ClassVar[str] = "favourites"
    told: dict = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def plan(self, uids, total):
        return [total - 2 * (len(uids) - 1)] + [2] * (len(uids) - 1)

    def observe(self, uid, successes):
        self.told[uid] = [int(success) for success in successes]

    @property
    def state(self):
        return self.told

    def restore(self, state):
        self.told.update(state)


def test_an_allocator_gives_unequal_groups_and_remembers(tmp_path):
    config = Favourites()

    def told(steps: int) -> dict:
        reinforcing = work(tmp_path, allocator=config, method="grpo", steps=steps)
        train(reinforcing)
        return cast(Favourites, reinforcing.collector.allocator).told

    first = told(2)
    assert sorted(map(len, first.values())) == [2] * 6 + [10] * 2
    later = told(3)
    assert {uid: later[uid] for uid in first} == first
    assert len(later) == 12
    assert not config.told, "what a run learns is not the config's"


def test_what_a_run_writes_down(tmp_path):
    reinforcing = work(tmp_path, method="grpo(kl=0.01)", train="all")
    found = train(reinforcing)
    update: Any = reinforcing.learner.programs.step
    assert update._cache_size() == 1, "four steps of one shape: one program"
    lines = read_metrics(tmp_path)
    steps = [line for line in lines if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for name in ("success", "length", "finished", "ref_kl", "clipped", "info/first", "grad_norm",
                 "rollout_tokens_per_second", "update_tokens_per_second"):  # fmt: skip
        assert all(math.isfinite(line[name]) for line in steps), name
    held = [line for line in lines if "eval/success" in line]
    assert [line["step"] for line in held] == [0, 2, 4]
    assert held[-1]["eval/success"] == found["success"]
    loaded = load_model(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["method"].startswith("grpo(")
    before = nnx.to_pure_dict(nnx.state(reinforcing.lm.model))
    after = nnx.to_pure_dict(nnx.state(loaded.model))
    assert not np.array_equal(before["embed"], after["embed"])


def test_two_stages_of_memgen(tmp_path, monkeypatch, whole):
    """A weaver, then a trigger beside it: each moves its own parameters; both are read back."""
    monkeypatch.setattr(
        "train.models.load.load_language_model", lambda name, shardings=None: starts[name]
    )
    starts = {"base": language_model("shallow")}
    woven = load_model(whole("weaver")[0])
    assert woven.memgen is not None and woven.memgen.trigger is None
    starts["woven"] = woven
    second = work(
        tmp_path / "trigger", start=woven, train="trigger", weights="woven", method="grpo", steps=2,
        # As held-out problems are answered, and as many of them: one program.
        temperature=0.0, evaluation=EvalConfig(every=2, rows=16),
    )  # fmt: skip
    train(second)
    asked = [line for line in read_metrics(tmp_path / "trigger") if "reward" in line]
    assert all(0 < line["invocation_rate"] < 1 for line in asked)
    both = load_model(tmp_path / "trigger")
    assert both.memgen is not None
    mine, theirs = (
        nnx.to_pure_dict(nnx.state(model.memgen, WeaverParam)) for model in (both, woven)
    )
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    moved = trained_params(both.memgen)["trigger"]
    assert np.abs(moved["kernel"]).max() > 0
    starts["both"] = both
    third = work(tmp_path / "more", start=both, train="trigger", weights="both", steps=1)
    begins = nnx.to_pure_dict(third.first_state().params)["memgen"]["trigger"]
    np.testing.assert_array_equal(begins["kernel"], moved["kernel"])
    with pytest.raises(ValueError, match="would drop the trigger of both"):
        work(tmp_path / "more", start=both, train="weaver", weights="both")
    saved = load_params(tmp_path / "trigger")[1]
    assert set(saved["memgen"]) == {"trigger"}
    assert nnx.state(both.memgen, TriggerParam)


def test_a_trigger_has_a_method_of_its_own():
    recipe = RLConfig(train="trigger").recipe
    assert recipe == TriggerGRPO() and isinstance(recipe, DrGRPO)
    assert (recipe.loss.aggregate, recipe.loss.kl) == ("sequence", 0.02)
    assert RLConfig(train="trigger", method="grpo").recipe == GRPO()
    assert RLConfig(train="trigger", method="trigger(kl=0.0)").recipe.loss.kl == 0.0
    assert RLConfig(train="weaver").recipe == GRPO()


@pytest.mark.parametrize(("train", "method"), [("trigger", "trigger"), ("lora", "grpo")])
def test_a_run_goes_on_by_its_method_told_or_not(train, method):
    told, untold = (as_json(RLConfig(train=train, **how)) for how in ({"method": method}, {}))
    assert told == untold and untold["method"].startswith(f"{method}(")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"num_generations": 1},
            "num_generations=1: grpo compares rollouts of one problem: choose 2 or more",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens=0: choose 1 or more"),
        ({"temperature": 0.0}, "all rollouts of a problem would be equal"),
        ({"temperature": math.inf}, "temperature=inf: choose a number above 0"),
        ({"temperature": 1e-30}, "temperature=1e-30: choose 1e-06 or more"),
        ({"reward": ("overlong(buffer=9)",)}, "overlong.buffer=9. is more than max_new_tokens=4"),
        ({"minibatches": 0}, "minibatches=0: choose 1 or more"),
        ({"method": "grpo(clip_low=-1.0)"}, "clip_low"),
        ({"train": "trigger"}, "needs weights with a weaver"),
        ({"method": "rebn", "reward": ("overlong(buffer=2)",)}, "which no reward shaping changes"),
        (
            {"train": "trigger", "method": "grpo(importance_cap=2.0)"},
            r"importance_cap\), train=.trigger. learns decisions",
        ),
        (
            {"method": "rebn(filter_groups=True)", "num_generations": 1},
            "filter_groups keeps no group of num_generations=1",
        ),
        (
            {"reward": ("invocation",)},
            "invocation penalty is of a trigger, train='lora' trains none",
        ),
        ({"advantage": "max"}, "unknown advantage 'max': choose one of grpo, dr_grpo, rloo"),
        ({"allocator": "uniform(n=2)"}, "allocator 'uniform.n=2.': write uniform"),
        ({"strategy": "turns(max_turns=0)"}, "max_turns=0: choose 1 or more"),
        ({"strategy": "turns(max_turns=20000)"}, "max_turns=20000: choose 10000 or less"),
        ({"environment_limit_s": 0.0}, "environment_limit_s=0.0: choose a number of seconds above"),
        ({"strategy": "turns"}, "strategy turns does not fit vowels, which is a task: leave"),
        (
            {"method": "rebn(gamma=0.9)", "advantage": "grpo"},
            r"gamma=0.9 of method rebn is of its advantage, which advantage grpo\(\) replaces",
        ),
        (
            {"loss": "clipped"},
            "kl=0.01 of method dapo is of its loss, which",
        ),
        ({"batch_size": 2**31 - 8}, "rollouts a step: choose 4,194,304 at most"),
        ({"reward": ("short",)}, "unknown reward 'short': choose one of overlong, invocation"),
    ],
    ids=str,
)
def test_mistakes_in_a_config_are_one_line(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        work(tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_a_policy_that_diverges_ends_the_run(tmp_path):
    """Not as a success: all rollouts of NaN agree, which filtering would take for a reason."""
    wild = OptimizerConfig(learning_rate=1e30, weight_decay=0.0, warmup=0.0)
    with pytest.raises(NonFiniteLoss, match="stopped; .*the last checkpoint is untouched"):
        train(work(tmp_path, optimizer=wild, train="all", method="grpo"))


def test_the_standard_error_knows_that_problems_repeat(tmp_path):
    class Few(Vowels):
        def problem(self, split, index):
            return super().problem(split, index % 4)

    reinforcing = work(tmp_path, Few())
    found, rows = reinforcing.evaluate(reinforcing.first_state().variables)
    assert len({row.problem.uid for row in rows}) == 4
    rate = found["success"]
    assert 0 < rate < 1
    np.testing.assert_allclose(found["standard_error"], np.sqrt(rate * (1 - rate) / 4))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_problems_is_one_line(tmp_path, split):
    class Empty(Vowels):
        sizes: Any = {"train": 8, "test": 8} | {split: 0}

    with pytest.raises(ValueError, match=f"vowels has 0 problems of the split '{split}'"):
        work(tmp_path, Empty()).collector.problems(split, 0, 1)


def test_examples_are_whole_episodes():
    """Also where each turn is a row of its own."""
    rows = [
        dataclasses.replace(row, turn=turn, texts=(f"{name}{turn}",))
        for name, row in zip("ab", trajectories([[0.5, 1.0]]), strict=True)
        for turn in range(2)
    ]
    assert examples(rows, 2) == ["    ? -> a0 | a1   (0.5)", "    ? -> b0 | b1   (1)"]


def test_an_allocator_that_plans_too_much_is_one_line(tmp_path):
    class Spends(Uniform):
        word = "spends"

        def plan(self, uids, total):
            return [total] * len(uids)

    with pytest.raises(ValueError, match="Spends.plan gave 64 rollouts to 4 problems, the budget"):
        train(work(tmp_path, allocator=Spends()))


@pytest.mark.parametrize(
    ("value", "words"), [(math.nan, "nan"), (math.inf, "inf"), (None, "reward")], ids=str
)
def test_a_reward_that_is_no_number_is_one_line(tmp_path, value, words):
    class Bad(Vowels):
        def score(self, completion):
            return None if value is None else Reward(value, False)

    with pytest.raises(ValueError, match=words) as error:
        train(work(tmp_path, Bad()))
    assert "\n" not in str(error.value) and "vowels" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "grpo"}, r'method: saved "dapo\(.*\)", now "grpo\(.*\)"'),
        ({"num_generations": 8}, "num_generations: saved 4, now 8"),
        ({"seed": 1}, "seed: saved 0, now 1"),
    ],
    ids=str,
)
def test_a_run_of_another_kind_is_not_continued(whole, changes, words):
    with pytest.raises(ValueError, match=words):
        train(work(whole("lora")[0], **{"steps": 5} | changes))


def test_a_run_on_another_task_is_not_continued(whole):
    class Other(Vowels):
        name = "other"

    with pytest.raises(ValueError, match="was trained on data vowels .*, they are now other"):
        train(work(whole("lora")[0], Other(), steps=5))

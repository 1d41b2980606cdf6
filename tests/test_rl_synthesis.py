"""Latent memory, forks, tree search, budgets and turns in one run; each alone has its own tests."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest
from rl_runs import rewards, timeless
from rl_tiny import finetunable, language_model, sampling
from test_rl_sampler import ASCII, MESH, POLICIES, SPEECH, STOP, Echoes

from train.engine.config import EvalConfig
from train.experiments import synthesis
from train.experiments.study import read_results
from train.models.load import LanguageModel
from train.rl.config import RLConfig
from train.rl.job import RLJob
from train.rl.learning.policy import sampler_of
from train.rl.loop import train
from train.rl.rollout.collector import Collector, strategy_for
from train.rl.rollout.sampler import Sampler
from train.rl.types import Trajectory
from train.runs.checkpoint import load_params

METHOD = "deepsearch(width=2, probe=4, threshold=0.75, max_observation=2)"


class Rated(Echoes):
    """Episodes of one to three turns that succeed by what the last turn says, seldom or half."""

    def __init__(self, left: int = 10**9):
        self.left = left  # steps before the process is killed

    def step(self, state, action):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        turn = super().step(state, action)
        rate = {1: 0.5, 2: 0.2, 3: 0.0}[action.problem.answer] if turn.terminated else 0
        won = sum(action.tokens) % 100 < 100 * rate
        return dataclasses.replace(turn, success=won, reward=float(won))


class Watched:
    """A collector of turns that are searched with budgets by Knapsack, and all rows that it saw."""

    def __init__(self, task: Rated):
        config = RLConfig(
            method=METHOD, allocator="knapsack(high=6)", batch_size=3, num_generations=4,
            pool=3, max_new_tokens=3, environment_limit_s=None,
        )  # fmt: skip
        self.strategy = strategy_for(config, task, SPEECH)
        self.allocator = dataclasses.replace(config.parts.allocator)
        self.collector = Collector(config, task, self.strategy, self.allocator)
        collect, self.plans, self.rows = self.strategy.collect, [], []

        def watched(sampler, task, problems, counts, seed):
            found = collect(sampler, task, problems, counts, seed)
            self.plans.append(dict(zip([p.uid for p in problems], counts, strict=True)))
            self.rows.append(found)
            return found

        object.__setattr__(self.strategy, "collect", watched)
        self.sampler = Sampler(
            sampler_of(finetunable("all", "shallow")),
            sampling(stop=STOP, valid_vocab_size=ASCII), 1, MESH,
        )  # fmt: skip

    def step(self) -> list[Trajectory]:
        return self.collector.collect(self.sampler).trajectories


def texts(rows: list[Trajectory]) -> list[tuple[Any, ...]]:
    return [(row.source, row.reward.success, *row.tokens.tolist()) for row in rows]


def test_a_tree_has_as_many_backups_as_the_knapsack_gives_it_and_probes_tell_its_rate():
    """A killed search is done again: from the state of the checkpoint the same rows come."""
    whole = Watched(Rated())
    after, trained = [], []
    for _ in range(4):
        trained.append(texts(whole.step()))
        after.append(json.loads(json.dumps(whole.collector.state)))
    history: dict[str, str] = {}
    unequal = 0
    for plan, rows in zip(whole.plans, whole.rows, strict=True):
        for uid, count in plan.items():
            mine = [row for row in rows if row.problem.uid == uid]
            searched = [row for row in mine if row.source == "search"]
            probes = [row for row in mine if row.source == "probe"]
            if searched:
                assert (len(searched), len(probes)) == (count, 4)
                unequal += count != 4
            direct = [row for row in mine if row.source in ("direct", "probe")]
            history[uid] = history.get(uid, "") + "".join(
                "01"[row.reward.success] for row in direct
            )
    for uid, outcomes in history.items():
        assert whole.allocator.state[uid] == outcomes[-len(whole.allocator.state[uid]) :]
    assert sum(whole.plans[0].values()) == 12 and set(whole.plans[0].values()) == {4}
    assert unequal, "rates are known, and trees have other budgets than evenly"
    sources = {row.source for rows in whole.rows for row in rows}
    assert {"search", "probe"} <= sources and len(sources) > 2

    killed = Watched(Rated(left=5))
    killed.collector.restore(after[1])
    with pytest.raises(KeyboardInterrupt):
        killed.step()
    again = Watched(Rated())
    again.collector.restore(after[1])
    assert [texts(again.step()) for _ in range(2)] == trained[2:]
    assert json.loads(json.dumps(again.collector.state)) == after[3]


@pytest.mark.experiment
def test_a_trigger_on_forks_is_searched_with_budgets_and_goes_on_bit_for_bit(tmp_path: Path):
    """python -m pytest -n 0 tests/test_rl_synthesis.py -m experiment"""
    policy = finetunable("trigger", "one rank", 3, POLICIES["trigger on forks"][2])
    assert policy.memgen is not None
    lm: Any = LanguageModel(policy.memgen.reasoner.model, language_model().tokenizer, policy.memgen)
    config = RLConfig(
        weights="woven", train="trigger", task="rated", method=METHOD, allocator="knapsack(high=6)",
        steps=4, batch_size=3, num_generations=4, pool=3, max_new_tokens=3, save_every=2,
        log_every=1, max_rows=2, evaluation=EvalConfig(every=0, rows=1), environment_limit_s=None,
    )  # fmt: skip

    def run(folder: str, task: Rated) -> Any:
        made = RLJob(
            dataclasses.replace(config, out=str(tmp_path / folder)), lm, task, jax.devices()[:1]
        )
        return train(made)

    counted = Rated()
    final = run("whole", counted)
    lines = [line for line in timeless(tmp_path / "whole") if "reward" in line]
    assert max(line["search/trees"] for line in lines) > 0
    assert max(line["invocations"] for line in lines) > 0
    assert max(abs(line["grad_norm"]) for line in lines) > 0
    used = 10**9 - counted.left
    with pytest.raises(KeyboardInterrupt):
        run("killed", Rated(left=used * 2 // 3))
    assert 2 <= len(rewards(tmp_path / "killed")) < 4
    assert run("killed", Rated()) == final
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    ours, theirs = (load_params(tmp_path / folder)[1] for folder in ("killed", "whole"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_results_of_other_options_are_refused():
    published = read_results(Path(__file__).parent.parent / "docs/results/synthesis.jsonl")
    assert "| without knapsack | 0 1 2 |" in synthesis.report(published)
    config = synthesis.Experiment()
    synthesis.check_options(config, published)
    synthesis.check_options(config, [{name: getattr(config, name) for name in synthesis.SHARED}])
    for name, value in {"batch_size": 4, "learning_rate": 0.1, "environment": "hanoi"}.items():
        other = dataclasses.replace(config, **{name: value})
        with pytest.raises(ValueError, match=f"has results of {name}=.*, now it is {value!r}: "):
            next(synthesis.train_missing(other, cast(Any, SimpleNamespace(found=published))))
    results = cast(Any, SimpleNamespace(found=[{"supervised": 9}]))
    with pytest.raises(ValueError, match="supervised=9, now it is 400: choose another file"):
        next(synthesis.train_missing(config, results))
    endless = dataclasses.replace(config, environment="mastermind")
    with pytest.raises(ValueError, match="environment=mastermind has endless training problems"):
        next(synthesis.train_missing(endless, cast(Any, SimpleNamespace(found=[]))))

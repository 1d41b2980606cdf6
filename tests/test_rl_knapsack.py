"""Knapsack RL: its allocation is optimal, its fallback and its histories are the authors'."""

import itertools
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from rl_runs import Dies, job, rewards, timeless, trajectories
from rl_tiny import Vowels

from train.rl.config import RLConfig
from train.rl.loop import train
from train.rl.rollout import knapsack
from train.rl.rollout.budgets import Knapsack, budget_metrics
from train.rl.rollout.collector import Collector
from train.rl.step_metrics import rollout_metrics
from train.rl.types import Collected

RATES = [0.05, 0.3, 0.5, 0.8, 0.95]


def worth(counts: Any, rates: Any) -> float:
    """Sum of values, written out."""
    total = 0.0
    for n, p in zip(counts, rates, strict=True):
        total += (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2
    return total


@pytest.mark.parametrize(
    ("total", "counts", "value"),
    [
        (20, [2, 7, 6, 3, 2], 0.275828),
        (40, [12, 11, 7, 8, 2], 0.314738),
        (60, [16, 16, 10, 16, 2], 0.327857),
    ],
)
def test_allocations_to_the_digit(total, counts, value):
    found = knapsack.allocate(RATES, total, 2, 16)
    assert found.tolist() == counts
    assert knapsack.value(found, RATES).sum() == pytest.approx(value, abs=5e-7)


def test_values_to_the_digit():
    printed = [0.015188, 0.138516, 0.124023, 0.026631, 0.000799]
    np.testing.assert_allclose(knapsack.value(8, RATES), printed, atol=5e-7)
    assert knapsack.value(8, RATES).sum() == pytest.approx(0.305158, abs=1e-6)
    assert knapsack.value(8, 0.2) / knapsack.value(8, 0.8) == pytest.approx(4)
    assert knapsack.information_gain(1 / 3) == pytest.approx(4 / 27)
    # Chance that a group carries a gradient.
    for p, few, many in ((0.001, 0.0159, 0.4009), (0.01, 0.1485, 0.9942)):
        found = knapsack.mixed_probability(np.array([16, 512]), p)
        np.testing.assert_allclose(found, [few, many], atol=5e-5)


def test_greedy_is_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(60):
        problems, low = int(rng.integers(1, 5)), int(rng.integers(1, 4))
        high = low + int(rng.integers(0, 6))
        rates = rng.choice([0.01, 0.99, *rng.random(4)], problems)
        total = int(rng.integers(low * problems, high * problems + 1))
        every = itertools.product(range(low, high + 1), repeat=problems)
        best = max(worth(counts, rates) for counts in every if sum(counts) == total)
        found = knapsack.allocate(rates.tolist(), total, low, high)
        assert found.sum() == total and found.min() >= low and found.max() <= high
        assert worth(found, rates) == pytest.approx(best, rel=1e-12, abs=1e-15)
    with pytest.raises(ValueError, match="9 rollouts of 2 problems, .*: choose a total from 4 to"):
        knapsack.allocate([0.5, 0.5], 9, 2, 4)


def test_allocation_goes_with_the_order_of_problems():
    rng = np.random.default_rng(0)
    rates = rng.random(40)
    order = rng.permutation(40)
    found = knapsack.allocate(rates.tolist(), 320, 2, 128)
    again = knapsack.allocate(rates[order].tolist(), 320, 2, 128)
    np.testing.assert_array_equal(again, found[order])


@pytest.mark.parametrize(
    ("rates", "high", "counts"),
    [
        ([0, 0, 0.05, 0.3, 0.5, 0.8, 1, 1], 32, [2, 2, 25, 12, 8, 11, 2, 2]),
        ([0, 0, 0, 0.5, 0.5, 1, 1, 1], 32, [16, 16, 16, 5, 5, 2, 2, 2]),
        # The bound is that of fallbacks too: what they can't take goes back, then to the rest.
        ([0, 0, 0, 0.5, 0.5, 1, 1, 1], 12, [12, 12, 12, 11, 11, 2, 2, 2]),
        ([0, 0.5, 1, 1, 1, 1, 1, 1], 12, [12, 12, 7, 7, 7, 7, 6, 6]),
        ([0.5, 1, 1, 1], 32, [5, 9, 9, 9]),
        ([1, 1, 1], 32, [8, 8, 8]),
        ([0, 1, 1], 32, [20, 2, 2]),
        ([None, 0, 0.5, None], 32, [8, 11, 5, 8]),
        ([None, None], 32, [8, 8]),
        ([0.5, 0.05], 32, [7, 9]),
    ],
)
def test_the_whole_flow(rates, high, counts):
    assert knapsack.plan(rates, [8] * len(rates), 2, high) == counts


def test_any_plan_spends_its_budget_within_its_bounds():
    rng = np.random.default_rng(0)
    for _ in range(300):
        problems, low = int(rng.integers(1, 9)), int(rng.integers(2, 5))
        share = low + int(rng.integers(0, 8))
        high = share + 1 + int(rng.integers(0, 12))
        shares = [share + int(index == 0) for index in range(problems)]
        pool = [None, 0.0, 1.0, 0.01, 0.99, 0.5, float(rng.random())]
        rates = [pool[index] for index in rng.integers(0, len(pool), problems)]
        counts = knapsack.plan(rates, shares, low, high)
        assert sum(counts) == sum(shares) and min(counts) >= low and max(counts) <= high
        for rate, count, given in zip(rates, counts, shares, strict=True):
            assert rate is not None or count == given


def test_a_rate_is_of_the_last_visit_or_of_the_newest_16():
    allocator = Knapsack()
    assert allocator.rate("a") is None
    allocator.observe("a", [True] * 7)
    assert allocator.rate("a") is None, "7 rollouts say too little"
    allocator.observe("a", [False])
    assert allocator.rate("a") == 7 / 8
    allocator.observe("a", [False] * 10)
    assert allocator.rate("a") == 5 / 16, "the oldest two are forgotten"
    allocator.observe("a", [True] * 5 + [False] * 15)
    assert allocator.rate("a") == 5 / 20, "all of a visit of 16 or more"
    allocator.observe("a", [True])
    assert allocator.rate("a") == 1 / 16
    again = Knapsack()
    again.restore(json.loads(json.dumps(allocator.state)))
    assert again.state == allocator.state == {"a": "0" * 15 + "1"}


def test_metrics_say_who_got_how_many():
    allocator = Knapsack()
    for uid, successes in {"a": 0, "b": 8, "c": 2, "d": 7}.items():
        allocator.observe(uid, [index < successes for index in range(8)])
    uids = ["a", "b", "c", "d", "e", "a"]
    classes = ["never", "always", "below_50", "below_100", "unknown", "never"]
    assert allocator.classes(uids) == classes
    counts = allocator.plan(uids, 48)
    assert budget_metrics(classes, counts) == {
        "budget/never": (counts[0] + counts[5]) / 2, "budget/always": 2, "budget/unknown": 8,
        "budget/below_50": counts[2], "budget/below_100": counts[3], "budget/most": max(counts),
    }  # fmt: skip
    assert budget_metrics([], counts) == {}


def test_ratios_of_effective_gradients_per_problem_and_per_rollout():
    rows = trajectories([[1.0] * 6, [0.0, 0.0], [0.0, 1.0]])
    found = rollout_metrics(Collected(rows, rows, 3, 3))
    assert found["mixed_groups"] == pytest.approx(1 / 3)
    assert found["mixed_rollouts"] == pytest.approx(2 / 10)


def test_the_per_rollout_ratio_rises_and_the_per_problem_one_does_not():
    """256 problems, a fifth below .03, two fifths above .97: .398 becomes .718 per rollout."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(4):
        rates = np.concatenate([rng.uniform(0, 0.03, 51), rng.uniform(0.97, 1, 102),
                                rng.uniform(0, 1, 103)])  # fmt: skip
        estimates = (rng.binomial(16, rates) / 16).tolist()
        counts = np.array(knapsack.plan(estimates, [8] * 256, 2, 128))
        row = []
        for drawn in (np.full(256, 8), counts):
            mixed = knapsack.mixed_probability(drawn, rates)
            row += [(mixed * drawn).sum() / drawn.sum(), mixed.mean()]
        found.append(row)
    before, before_problems, after, after_problems = np.mean(found, axis=0)
    assert before == pytest.approx(before_problems) == pytest.approx(0.398, abs=0.03)
    assert after == pytest.approx(0.718, abs=0.04)
    assert after_problems == pytest.approx(0.383, abs=0.04)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_generations": 1, "advantage": "rebn"},
            "num_generations=1: knapsack gives a problem from low=2",
        ),
        ({"num_generations": 200}, "num_generations=200: knapsack gives .* to high=128 rollouts"),
        ({"method": "knapsack(low=1)"}, "low=1: choose 2 or more"),
        ({"method": "knapsack(low=8, high=4)"}, "high=4 is less than low=8"),
        ({"pool": 0}, "pool=0: choose 1 or more"),
        (
            {"method": "knapsack(high=64)", "allocator": "uniform"},
            "high=64 of method knapsack is of its allocator",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        RLConfig(**{"method": "knapsack", **changes})
    assert "\n" not in str(error.value)


@pytest.mark.experiment  # test_rl_synthesis does this to a collector, without a job around it
def test_what_was_learned_of_problems_goes_on_after_a_kill(tmp_path: Path):
    """Problems of a pool come again, and get unequal numbers of rollouts."""

    def run(out: Path, task: Any = None) -> Any:
        return job(out, "knapsack(high=20, filter_groups=True)", task, pool=6)

    whole, killed = run(tmp_path / "whole"), tmp_path / "killed"
    found = train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(run(killed, Dies(killed)))
    assert len(rewards(killed)) == 3
    again = run(killed)
    assert train(again) == found and timeless(killed) == timeless(tmp_path / "whole")
    first, second = (cast(Knapsack, made.collector.allocator) for made in (whole, again))
    assert first.state == second.state and len(first.state) == 6
    lines = [line for line in timeless(killed) if "budget/most" in line]
    assert lines[0]["budget/unknown"] == 8
    assert max(line["budget/most"] for line in lines[2:]) > 8
    assert {line["rollouts"] for line in lines} == {32, 64}, "one batch of problems or two"


def test_an_endless_task_needs_a_pool(tmp_path: Path):
    with pytest.raises(ValueError, match="those of vowels never do: set pool") as error:
        job(tmp_path, "knapsack", pool=None)
    assert "\n" not in str(error.value)


def test_a_pool_is_the_tasks_first_problems():
    config = RLConfig(pool=3)
    collector = Collector(config, Vowels(), cast(Any, None), Knapsack())
    uids = [problem.uid for problem in collector.problems("train", 0, 9)]
    assert [sorted(uids[start : start + 3]) for start in (0, 3, 6)] == [
        ["train0", "train1", "train2"]
    ] * 3
    assert [problem.uid for problem in collector.problems("test", 4, 2)] == ["test4", "test5"]

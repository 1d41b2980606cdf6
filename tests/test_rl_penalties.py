"""The penalty on invocations against the numbers of the paper's two versions."""

import dataclasses
import statistics

import numpy as np
import pytest

import memgen
from train.rl.learning.advantages import grpo
from train.rl.learning.penalties import InvocationPenalty


def invocation_penalty(config: InvocationPenalty, *rows: np.ndarray) -> np.ndarray:
    options = {"weight": config.weight, "rate": config.rate, "scope": config.scope}
    return memgen.invocation_penalty(*rows, **options)


FIRST = InvocationPenalty(1.0, rate="tokens", scope="batch")
SECOND = InvocationPenalty(1.0, rate="decisions", scope="group")
FOUR = InvocationPenalty(1.0, rate="tokens"), InvocationPenalty(1.0, scope="batch"), FIRST, SECOND
DECISIONS = np.array(
    [[1, -1, 0, 1, 1], [0, 0, -1, 1, -1], [-1, 1, 1, -1, -1], [0, 0, 0, -1, 0]], np.int8
)
REWARD = np.array([1.0, 1, 0, 0])
LENGTH = np.array([20, 12, 16, 10])
GROUP = np.full(4, 5)
VALID = np.ones(4, bool)
INVOKED = np.array([3, 1, 2, 0])


def test_second_version():
    penalty = invocation_penalty(SECOND, DECISIONS, REWARD, LENGTH, GROUP, VALID)
    expected = [1.375, 0.4583333, 0.9166667, 0]
    np.testing.assert_allclose(penalty, expected, rtol=0, atol=5e-8)
    np.testing.assert_allclose(penalty, INVOKED * (1 - 0.5416667), rtol=0, atol=1.5e-7)
    assert penalty.dtype == np.float64


def test_second_version_shapes_the_reward():
    config = dataclasses.replace(SECOND, weight=0.1)
    shaped = REWARD - invocation_penalty(config, DECISIONS, REWARD, LENGTH, GROUP, VALID)
    np.testing.assert_allclose(shaped, [0.8625, 0.9541667, -0.0916667, 0], rtol=0, atol=5e-8)


def test_first_version():
    penalty = invocation_penalty(FIRST, DECISIONS, REWARD, LENGTH, GROUP, VALID)
    np.testing.assert_allclose(penalty, INVOKED * (1 - 0.1166667), rtol=0, atol=1.5e-7)


def test_median_averages_the_middle_two():
    """The lower of the two is 0 here: all trajectories would be good, and the rate 0.5208333."""
    penalty = invocation_penalty(SECOND, DECISIONS, REWARD, LENGTH, GROUP, VALID)
    assert 1 - penalty[1] == pytest.approx(0.5416667, abs=5e-8)
    everyone = invocation_penalty(SECOND, DECISIONS, np.ones(4), LENGTH, GROUP, VALID)
    assert 1 - everyone[1] == pytest.approx(0.5208333, abs=5e-8)


def one_by_one(config, decisions, reward, length, group, valid) -> np.ndarray:
    """From the definition, with max(0, d - rate) for each decision."""
    penalty, real = np.zeros(len(reward)), np.flatnonzero(valid)
    for row in real:
        peers = [r for r in real if config.scope == "batch" or group[r] == group[row]]
        middle = statistics.median(reward[r] for r in peers)
        rates = []
        for r in peers:
            asked = [d for d in decisions[r] if d >= 0]
            if reward[r] >= middle and (config.rate == "tokens" or asked):
                rates.append(sum(asked) / (length[r] if config.rate == "tokens" else len(asked)))
        rate = statistics.fmean(rates) if rates else 0.0
        penalty[row] = config.weight * sum(max(0, d - rate) for d in decisions[row] if d >= 0)
    return penalty


def random_rows(seed: int, rows: int = 30):
    rng = np.random.default_rng(seed)
    decisions = rng.choice([-1, 0, 1], (rows, 6)).astype(np.int8)
    decisions[rng.random(rows) < 0.2] = -1
    reward = rng.choice([0, 0.1, 0.5, 1.0], rows)
    group = rng.choice([-1, 4, 6, 99], rows, p=[0.5, 0.3, 0.15, 0.05])
    valid = rng.random(rows) < 0.8
    reward[~valid] = np.nan
    decisions[~valid] = 77
    length = np.where(valid, rng.integers(6, 20, rows), 0)
    return decisions, reward, length, group, valid


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("config", FOUR, ids=lambda c: f"{c.rate}-{c.scope}")
def test_unequal_groups_agree_with_a_loop_over_decisions(config: InvocationPenalty, seed: int):
    rows = random_rows(seed)
    penalty = invocation_penalty(config, *rows)
    np.testing.assert_allclose(penalty, one_by_one(config, *rows), rtol=1e-12, atol=1e-14)
    order = np.random.default_rng(seed).permutation(len(penalty))
    permuted = invocation_penalty(config, *(values[order] for values in rows))
    np.testing.assert_allclose(permuted, penalty[order], rtol=1e-12, atol=1e-14)
    real = rows[-1]
    alone = invocation_penalty(config, *(values[real] for values in rows))
    np.testing.assert_array_equal(alone, penalty[real])


def test_trajectories_that_were_never_asked():
    """They pay nothing, count in the median, and say nothing about how often to invoke."""
    decisions = np.array([[-1, -1, -1], [1, 0, 1], [1, 1, 1], [0, -1, -1]], np.int8)
    reward, length = np.array([1.0, 1, 0, 0]), np.full(4, 4)
    found = invocation_penalty(SECOND, decisions, reward, length, GROUP, VALID)
    np.testing.assert_allclose(found, np.array([0, 2, 3, 0]) * (1 - 2 / 3), rtol=1e-14)
    by_token = invocation_penalty(FIRST, decisions, reward, length, GROUP, VALID)
    np.testing.assert_allclose(by_token, np.array([0, 2, 3, 0]) * (1 - (0 + 2 / 4) / 2))
    # The only good trajectory was never asked.
    found = invocation_penalty(
        SECOND, decisions, np.array([1.0, 0, 0, 0]), length, np.array([0, 0, 1, 1]), VALID
    )
    np.testing.assert_array_equal(found, [0, 2, 1.5, 0])


def test_skipping_and_always_invoking_cost_nothing():
    decisions = np.array([[1, 1, 1], [1, 1, -1], [0, 0, 0], [1, 1, -1]], np.int8)
    group = np.array([0, 0, 1, 0])
    found = invocation_penalty(SECOND, decisions, REWARD, LENGTH, group, VALID)
    np.testing.assert_array_equal(found, 0)


def test_without_weight_nothing_changes():
    free = invocation_penalty(InvocationPenalty(0.0), DECISIONS, REWARD, LENGTH, GROUP, VALID)
    np.testing.assert_array_equal(free, 0)
    plain = grpo(REWARD, GROUP, VALID)
    np.testing.assert_array_equal(grpo(REWARD - free, GROUP, VALID), plain)
    nobody = invocation_penalty(SECOND, DECISIONS, REWARD, LENGTH, GROUP, ~VALID)
    np.testing.assert_array_equal(nobody, 0)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="weight=-1: choose 0 or more"):
        InvocationPenalty(-1)
    with pytest.raises(ValueError, match="weight=nan"):
        InvocationPenalty(float("nan"))
    with pytest.raises(ValueError, match="rate='rows': choose one of decisions, tokens"):
        InvocationPenalty(rate="rows")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="scope='all': choose one of group, batch"):
        InvocationPenalty(scope="all")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"decisions \[4, 5\] \[K, L\], got reward \[3\]"):
        invocation_penalty(SECOND, DECISIONS, REWARD[:3], LENGTH, GROUP, VALID)
    with pytest.raises(ValueError, match=r"decisions \[20\]"):
        invocation_penalty(SECOND, DECISIONS.ravel(), REWARD, LENGTH, GROUP, VALID)
    with pytest.raises(ValueError, match="row 2 has no finite reward"):
        invocation_penalty(SECOND, DECISIONS, np.array([1, 0, np.nan, 0]), LENGTH, GROUP, VALID)
    with pytest.raises(ValueError, match="row 1 has decisions besides -1, 0, 1"):
        invocation_penalty(SECOND, np.array([[0], [2], [1], [1]]), REWARD, LENGTH, GROUP, VALID)
    with pytest.raises(ValueError, match="row 3 has no length"):
        invocation_penalty(FIRST, DECISIONS, REWARD, np.array([1, 1, 1, 0]), GROUP, VALID)

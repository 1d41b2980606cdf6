"""Advantages against numbers worked out by hand and a loop over rows."""

import math
import statistics

import numpy as np
import pytest

from train.rl.learning.advantages import (
    discounted_returns,
    dr_grpo,
    grpo,
    in_mixed_group,
    rebn,
    reinforce_pp_baseline,
    rloo,
)
from train.rl.learning.penalties import overlong_penalty

GROUPED = [grpo, dr_grpo, rloo, reinforce_pp_baseline]
# Five rollouts of two problems.
REWARD = np.array([1.0, 0, 0, 1, 0])
GROUP = np.array([7, 7, 7, -2, -2])
VALID = np.ones(5, bool)


def test_grpo_divides_by_the_deviation_of_a_sample():
    found = grpo(REWARD, GROUP, VALID)
    expected = [1.154699, -0.577349, -0.577349, 0.707106, -0.707106]
    np.testing.assert_allclose(found, expected, rtol=0, atol=5.01e-7)
    assert found.dtype == np.float64


def test_grpo_divides_by_the_deviation_of_a_population():
    found = grpo(REWARD, GROUP, VALID, ddof=0)
    expected = [1.414211, -0.707105, -0.707105, 0.999998, -0.999998]
    np.testing.assert_allclose(found, expected, rtol=0, atol=5.01e-7)


def test_dr_grpo_only_subtracts_the_mean():
    expected = [2 / 3, -1 / 3, -1 / 3, 1 / 2, -1 / 2]
    np.testing.assert_allclose(dr_grpo(REWARD, GROUP, VALID), expected, rtol=1e-15)


def test_rloo_subtracts_the_mean_of_the_others():
    expected = [1, -1 / 2, -1 / 2, 1, -1]
    np.testing.assert_allclose(rloo(REWARD, GROUP, VALID), expected, rtol=1e-15)


def test_grpo_of_memgen():
    reward, group, valid = np.array([1.0, 0, 0, 1]), np.zeros(4, int), np.ones(4, bool)
    signs = np.array([1, -1, -1, 1])
    sample = grpo(reward, group, valid, eps=1e-4)
    np.testing.assert_allclose(sample, 0.865875 * signs, rtol=0, atol=5e-7)
    np.testing.assert_array_equal(grpo(reward, group, valid, eps=0, ddof=0), signs)


@pytest.mark.parametrize(
    "rollouts, advantage", [(8, 2.4749), (16, 3.75), (93, 9.5400), (512, 22.5832)]
)
def test_one_success_among_many_is_praised_without_bound(rollouts: int, advantage: float):
    reward = np.zeros(rollouts)
    reward[rollouts // 2] = 1
    found = grpo(reward, np.zeros(rollouts, int), np.ones(rollouts, bool), eps=0)
    assert found.max() == pytest.approx((rollouts - 1) / math.sqrt(rollouts), rel=1e-13)
    assert found.max() == pytest.approx(advantage, abs=5e-5)


def test_reinforce_pp_baseline_whitens_over_the_batch():
    reward = np.array([1.0, 0, 0, 0, 1, 1, 1, 0])
    group, valid = np.repeat([0, 1], 4), np.ones(8, bool)
    centred = [0.75, -0.25, -0.25, -0.25, 0.25, 0.25, 0.25, -0.75]
    np.testing.assert_array_equal(dr_grpo(reward, group, valid), centred)
    found = reinforce_pp_baseline(reward, group, valid)
    expected = [1.732, -0.577, -0.577, -0.577, 0.577, 0.577, 0.577, -1.732]
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-4)
    assert found.std() == pytest.approx(1, abs=1e-5)


EPISODES = [[0.0, 0, 1], [0, -0.1], [1.0]]


def test_return_batch_normalisation():
    turns = [discounted_returns(rewards, 0.9) for rewards in EPISODES]
    expected = [[0.81, 0.9, 1], [-0.09, -0.1], [1]]
    for found, wanted in zip(turns, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-14)
    pooled = np.concatenate(turns)
    assert pooled.mean() == pytest.approx(0.586667, abs=5e-7)
    assert pooled.std() == pytest.approx(0.486336, abs=5e-7)
    normalised = [0.459217, 0.644274, 0.849893, -1.391358, -1.411920, 0.849893]
    np.testing.assert_allclose(rebn(pooled), normalised, rtol=0, atol=5e-7)


def test_grpo_of_whole_episodes():
    reward = np.array([sum(rewards) for rewards in EPISODES])
    found = grpo(reward, np.zeros(3, int), np.ones(3, bool))
    np.testing.assert_allclose(found, [0.577349, -1.154699, 0.577349], rtol=0, atol=5.01e-7)


@pytest.mark.parametrize(
    "numbers, mean, greatest, value", [(10, 2.9, 4, 0.822700), (50, 4.86, 6, 0.671778)]
)
def test_discounted_returns_of_a_balanced_search(numbers, mean, greatest, value):
    """Number n of a balanced search tree is found after as many turns as it lies deep."""
    turns = [depth + 1 for depth in range(10) for _ in range(2**depth)][:numbers]
    assert statistics.mean(turns) == pytest.approx(mean)
    assert max(turns) == greatest
    returns = [discounted_returns([0.0] * (count - 1) + [1.0], 0.9)[0] for count in turns]
    assert statistics.mean(returns) == pytest.approx(value, abs=5e-7)


def test_discounted_returns_without_discount_and_without_future():
    np.testing.assert_array_equal(discounted_returns([1, 2, 3], 1), [6, 5, 3])
    np.testing.assert_array_equal(discounted_returns([1, 2, 3], 0), [1, 2, 3])
    assert discounted_returns([], 0.9).shape == (0,)


def random_rows(rng: np.random.Generator, rows: int = 40):
    """Rewards of groups of very unequal sizes, some alone, some without a difference."""
    group = rng.choice([-5, 3, 10**12, 17, 18, 19], rows, p=[0.5, 0.2, 0.15, 0.1, 0.03, 0.02])
    reward = rng.normal(size=rows)
    reward[group == 3] = 0.1
    valid = rng.random(rows) < 0.8
    reward[~valid] = rng.choice([np.nan, np.inf, 1e30], (~valid).sum())
    return reward, group, valid


def one_by_one(name: str, reward, group, valid) -> np.ndarray:
    """`name`d advantages, a row at a time, from the definitions."""
    found, centred = np.zeros(len(reward)), {}
    for row in np.flatnonzero(valid):
        mine = [reward[r] for r in np.flatnonzero(valid) if group[r] == group[row]]
        others = [reward[r] for r in np.flatnonzero(valid) if group[r] == group[row] and r != row]
        centred[row] = reward[row] - statistics.fmean(mine)
        if not others or min(mine) == max(mine):
            centred[row] = 0.0
        elif name == "grpo":
            found[row] = centred[row] / (statistics.stdev(mine) + 1e-6)
        elif name == "rloo":
            found[row] = reward[row] - statistics.fmean(others)
        else:
            found[row] = centred[row]
    if name == "reinforce_pp_baseline":
        found /= statistics.pstdev(list(centred.values())) + 1e-6
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("estimate", GROUPED, ids=lambda f: f.__name__)
def test_unequal_groups_agree_with_a_loop_over_rows(estimate, seed: int):
    reward, group, valid = random_rows(np.random.default_rng(seed))
    found = estimate(reward, group, valid)
    expected = one_by_one(estimate.__name__, reward, group, valid)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-13)
    assert (found[~valid] == 0).all()


@pytest.mark.parametrize("estimate", GROUPED, ids=lambda f: f.__name__)
def test_order_and_filler_change_nothing(estimate):
    rng = np.random.default_rng(0)
    reward, group, valid = random_rows(rng)
    found = estimate(reward, group, valid)
    order = rng.permutation(len(reward))
    permuted = estimate(reward[order], group[order], valid[order])
    np.testing.assert_allclose(permuted, found[order], rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(estimate(reward[valid], group[valid], valid[valid]), found[valid])


@pytest.mark.parametrize("estimate", GROUPED, ids=lambda f: f.__name__)
def test_nothing_to_compare_with_is_exactly_zero(estimate):
    """0.1 + 0.1 + 0.1 is not 3 x 0.1, and a deviation of 1e-17 must not be blown up."""
    reward = np.array([0.1, 0.1, 0.1, 5.0, 1, 0])
    group = np.array([0, 0, 0, 1, 2, 2])
    found = estimate(reward, group, np.ones(6, bool))
    np.testing.assert_array_equal(found[:4], 0)
    assert found[4] == -found[5] > 0
    kept = group < 2
    np.testing.assert_array_equal(estimate(reward, group, kept), 0)
    assert estimate(reward, group, np.zeros(6, bool)).shape == (6,)
    assert estimate(reward[:0], group[:0], kept[:0]).shape == (0,)


def test_equal_returns_are_normalised_to_zero():
    np.testing.assert_array_equal(rebn(np.full(3, 0.1)), 0)


def test_informative_rows_are_of_groups_that_succeed_and_fail():
    success = np.array([1, 0, 1, 1, 0, 0, 1, 1, 0], bool)
    group = np.array([4, 4, 2, 2, 9, 9, 5, 6, 6])
    valid = np.array([1, 1, 1, 1, 1, 1, 1, 1, 0], bool)
    found = in_mixed_group(success, group, valid)
    np.testing.assert_array_equal(found, [True, True] + [False] * 7)
    assert found.dtype == bool


def test_a_group_of_several_verdicts_is_kept_whole():
    """Right, abstained and wrong: also the row whose verdict is the group's mean."""
    verdict = np.array([0.0, 1, -1, 0, -1, 0, 0])
    group, valid = np.array([3, 3, 3, 1, 1, 2, 2]), np.ones(7, bool)
    np.testing.assert_array_equal(in_mixed_group(verdict, group, valid), [True] * 5 + [False] * 2)


def test_penalties_do_not_make_a_group_informative():
    length = np.array([10, 14, 16])
    group, valid = np.zeros(3, int), np.ones(3, bool)
    shaped = 1 + overlong_penalty(length, 16, 4)
    assert grpo(shaped, group, valid).any()
    assert not in_mixed_group(np.ones(3, bool), group, valid).any()


@pytest.mark.parametrize(
    "rollouts, success, chance",
    [(16, 0.001, 0.0159), (512, 0.001, 0.4009), (16, 0.01, 0.1485), (512, 0.01, 0.9942)],
)
def test_chance_that_a_group_is_informative(rollouts: int, success: float, chance: float):
    """1 - p^N - (1-p)^N, from a group for each number of successes and how likely that is."""
    counts = np.arange(rollouts + 1)
    succeeded = (np.arange(rollouts) < counts[:, None]).ravel()
    group = np.repeat(counts, rollouts)
    kept = in_mixed_group(succeeded, group, np.ones(len(group), bool))[::rollouts]
    likely = [math.comb(rollouts, n) * success**n * (1 - success) ** (rollouts - n) for n in counts]
    assert np.dot(kept, likely) == pytest.approx(chance, abs=5e-5)


def test_overlong_penalty():
    found = overlong_penalty(np.array([0, 10, 12, 13, 14, 16]), 16, 4, 1)
    np.testing.assert_array_equal(found, [0, 0, 0, -0.25, -0.5, -1])
    np.testing.assert_array_equal(overlong_penalty(np.array([14, 40]), 16, 4, 0.5), [-0.25, -0.5])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"reward \[5\], group \[4\], valid \[5\]"):
        grpo(REWARD, GROUP[:4], VALID)
    with pytest.raises(ValueError, match=r"reward \[1, 5\]"):
        grpo(REWARD[None], GROUP[None], VALID[None])
    for bad in (np.nan, -np.inf):
        with pytest.raises(ValueError, match=f"the reward of row 3 is {bad}"):
            rloo(np.array([np.nan, 0, 0, bad, 0]), GROUP, np.array([0, 1, 1, 1, 1], bool))
    with pytest.raises(ValueError, match="gamma=1.1"):
        discounted_returns([1.0], 1.1)
    for buffer in (0, 17):
        with pytest.raises(ValueError, match=f"buffer={buffer} of max_length=16"):
            overlong_penalty(np.array([1]), 16, buffer)

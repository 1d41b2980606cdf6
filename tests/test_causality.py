"""Changing later tokens changes nothing before them, bit for bit, where the policy says so."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny import BASE, VOCAB, logits_of, quick_model

from thoughtbubbles import PrefixRank, Threshold, TopK

DRAWS, TOKENS = 200, 12
CONFIG = dataclasses.replace(BASE, num_layers=3, fork_layers=(1, 2), score_originals=False)
POLICIES = [PrefixRank(1.5), PrefixRank(2.0, window=4, burst=2), Threshold(1.5)]


def largest_leak(config, seed: int = 0, padded: bool = False, devices: int = 1) -> float:
    """Largest change of a logit before place j when tokens from j on change; a j for each row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (DRAWS, TOKENS), dtype=np.int32)
    place = np.arange(TOKENS)
    mask = np.ones((DRAWS, TOKENS), bool)
    if padded:  # on the left, on the right, or on both sides
        left, right = rng.integers(0, 4, (2, DRAWS, 1)) * rng.integers(0, 2, (2, DRAWS, 1))
        mask = (place >= left) & (place < TOKENS - right)
    j = rng.integers(1, TOKENS, (DRAWS, 1))
    changed = np.where(place >= j, rng.integers(0, VOCAB, tokens.shape, dtype=np.int32), tokens)
    assert ((changed != tokens) & mask).any(axis=1).mean() > 0.8
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    rows = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))  # noqa: E731
    model = jax.device_put(quick_model(config), NamedSharding(mesh, PartitionSpec()))
    before, after = (np.asarray(logits_of(model, rows(t), rows(mask))) for t in (tokens, changed))
    assert np.isfinite(before).all() and (before != after).any()
    return float(np.abs(before - after)[place < j].max())


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_causal_policies_leak_nothing(policy):
    config = dataclasses.replace(CONFIG, policy=policy)
    assert config.causal and largest_leak(config) == 0
    assert largest_leak(config, seed=1, padded=True) == 0


# `python -m pytest -m experiment tests/test_causality.py`
@pytest.mark.parametrize(
    "policy", [pytest.param(POLICIES[1], marks=pytest.mark.experiment), POLICIES[2]], ids=str
)
def test_they_leak_nothing_over_eight_devices(policy):
    assert jax.device_count() >= 8
    assert largest_leak(dataclasses.replace(CONFIG, policy=policy), padded=True, devices=8) == 0


def test_the_paper_s_policy_is_caught():
    config = dataclasses.replace(CONFIG, policy=TopK(1.5))
    assert not config.causal and largest_leak(config) > 0.01
    assert largest_leak(config, seed=1, padded=True) > 0.01

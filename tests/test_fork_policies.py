"""Promises that every fork policy keeps: ours, those on the command line, and a user's own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import make_example
from flax import nnx

from thoughtbubbles import Fork, ModelConfig, PolicyDefaults, PrefixRank, Streams, Threshold, TopK
from thoughtbubbles.policy import check_policy
from thoughtbubbles.testing import assert_budget, assert_cached_is_parallel, assert_causal
from train.cli.config_json import POLICIES, as_json, model_from_json, policy_from_text, policy_text
from train.cli.entries import check_entries
from train.cli.plugins import load_plugins
from train.data import DataConfig
from train.evaluation.policy_overrides import override_policy
from train.pretraining.config import RunConfig
from train.pretraining.job import make_run


@dataclasses.dataclass(frozen=True)
class EvenTokens:
    """A user's policy with nothing but what is needed: every even token forks."""

    causal = True

    def capacity(self, num_tokens):
        return 2 * num_tokens

    def keep(self, candidates):
        even = (candidates.token + candidates.first[:, None]) % 2 == 0
        first = jnp.cumsum(jnp.where(candidates.forced, 1, 0), axis=1) == candidates.token
        return candidates.alive & (
            candidates.forced | (even & first & fork_of_original(candidates))
        )


def fork_of_original(candidates):
    """The fork candidate right in front of each forced keep candidate."""
    return jnp.roll(candidates.forced, -1, axis=1)


@dataclasses.dataclass(frozen=True)
class Loud(PolicyDefaults):
    """A user's policy that uses every hook: forks what scores above a tracked level."""

    ratio: float = 2.0
    causal = True

    def capacity(self, num_tokens):
        return 2 * num_tokens

    def keep(self, candidates):
        return self.keep_next(candidates, self.init_state(candidates.token.shape[0], 0))[0]

    def init_state(self, batch, num_candidates):
        return jnp.zeros((batch,), jnp.int32)  # forks so far

    def keep_next(self, candidates, state):
        loud = jnp.exp(candidates.log_score) > candidates.threshold
        loud &= fork_of_original(candidates) & candidates.alive
        return loud | (candidates.forced & candidates.alive), state + loud.sum(axis=1)

    def init_tracked(self):
        return 0.25

    def track(self, candidates):
        return 0.5 * candidates.threshold + 0.5 * jnp.exp(candidates.log_score).mean()

    def explore(self, candidates, key):
        noise = jax.random.normal(key, candidates.log_score.shape)
        return dataclasses.replace(candidates, log_score=candidates.log_score + noise)

    def scores(self, candidates):
        return jnp.where(candidates.forced, candidates.log_score, candidates.log_score / 2)


OWN = {
    "window, burst": PrefixRank(1.5, window=3, burst=2),
    "no gate": Threshold(1.5, gate=False, offset=0.1),
    "streams": TopK(streams=20),
    "own EvenTokens": EvenTokens(),
    "own Loud": Loud(),
}


def made(name: str) -> Any:
    """A policy of the registry by its name, or one of those above."""
    return OWN[name] if name in OWN else make_example(name, POLICIES[name], "policy")


# Settings are in test_policies.py, `streams` in test_forking.py; they run here too with
# `python -m pytest -m experiment tests/test_fork_policies.py`.
SETTINGS = ("window, burst", "no gate", "streams")
EACH = (*POLICIES, *OWN)
NAMES = [pytest.param(name, marks=[pytest.mark.experiment] * (name in SETTINGS)) for name in EACH]


@pytest.mark.parametrize("name", NAMES)
def test_the_budget_holds_and_originals_live(name):
    assert_budget(made(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_causal_policy_does_not_see_later_tokens(name):
    policy = made(name)
    if policy.causal:
        assert_causal(policy)
    else:
        with pytest.raises(AssertionError, match="depends on later tokens"):
            assert_causal(policy)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_in_parts_is_the_whole_row(name):
    policy = made(name)
    if hasattr(policy, "keep_next"):
        assert_cached_is_parallel(policy)
    else:
        with pytest.raises(ValueError, match=r"has no init_state\(\) and keep_next\(\)"):
            assert_cached_is_parallel(policy)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_written_as_it_prints(name):
    policy = made(name)
    if has_ratio := hasattr(policy, "ratio"):
        policy = dataclasses.replace(policy, ratio=1.5)  # pyright: ignore[reportCallIssue]
    assert policy_from_text(policy_text(policy)) == policy
    if type(policy).__name__ == name:
        assert policy_from_text(repr(policy)) == policy
    config = ModelConfig.preset("tiny", policy=policy)
    assert model_from_json(as_json(config)).policy == policy
    if has_ratio:
        changed = dataclasses.replace(policy, ratio=2.0)  # pyright: ignore[reportCallIssue]
        assert override_policy(policy, ratio=2.0) == changed


@dataclasses.dataclass(frozen=True)
class Half(EvenTokens):
    """What becomes of a token depends on how many follow."""

    def keep(self, candidates):
        early = candidates.token < candidates.length[:, None] // 2
        return candidates.alive & (candidates.forced | early & fork_of_original(candidates))


@dataclasses.dataclass(frozen=True)
class Greedy(EvenTokens):
    """Keeps all there is, for which it has no capacity."""

    def keep(self, candidates):
        return candidates.alive


def test_broken_promises_are_found():
    with pytest.raises(AssertionError, match="from which on it has no tokens"):
        assert_causal(Half())
    with pytest.raises(AssertionError, match=r"keeps 48 candidates of a row, capacity\(12\) is 24"):
        assert_budget(Greedy())


def test_a_policy_that_keeps_too_much_is_refused_before_a_run():
    model = ModelConfig.preset("tiny", policy=Greedy())
    config = RunConfig(model=model, data=DataConfig(seq_len=12))
    message = r"policy=Greedy\(\): fork layer 1: .*capacity\(12\) is 24: what is too much would be"
    with pytest.raises(ValueError, match=message):
        make_run(config)
    with pytest.raises(ValueError, match="forced_keep=False lets originals compete"):
        make_run(dataclasses.replace(config, model=dataclasses.replace(model, forced_keep=False)))


def test_a_policy_that_hands_its_methods_on_is_a_policy():
    class Recorder:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

    check_policy(Recorder(PrefixRank(2.0)), "policy")


class Loose:
    causal = True
    capacity = EvenTokens.capacity
    keep = EvenTokens.keep


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Loose, r"policy mine: .*Loose'> is no dataclass, .* put @dataclasses.dataclass\("),
        (TopK(), r"policy mine: TopK\(.*\) is no dataclass"),
        (dataclasses.make_dataclass("Empty", []), "mine is no fork policy, .* no causal, no cap"),
        (dataclasses.make_dataclass("Half", ["causal", "keep"]), "policy, it has no capacity: "),
    ],
)
def test_an_entry_that_is_no_policy_is_named(monkeypatch, entry, message):
    monkeypatch.setitem(POLICIES, "mine", entry)
    with pytest.raises(ValueError, match=message):
        check_entries()


def test_a_plugin_is_checked_when_it_is_loaded(monkeypatch, tmp_path):
    added = "from thoughtbubbles.policies import POLICIES\nPOLICIES['mine'] = int\n"
    (tmp_path / "unfinished_plugin.py").write_text(added)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(POLICIES, "mine", EvenTokens)  # undone, with what the plugin puts there
    with pytest.raises(ValueError, match="policy mine: <class 'int'> is no dataclass"):
        load_plugins(["--plugin", "unfinished_plugin"])


def test_a_policy_without_a_name_is_refused_before_a_run():
    with pytest.raises(
        ValueError, match=r"policy EvenTokens\(\) has no name: .* thoughtbubbles.policies.POL"
    ):
        as_json(ModelConfig.preset("tiny", policy=EvenTokens()))


def test_hooks_of_a_users_policy_are_used():
    """Tracked state, exploration, and the scores that streams go on with."""
    fork = Fork(8, Loud(), score_originals=True, rngs=nnx.Rngs(0))
    assert float(fork.threshold[...]) == 0.25
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9, 8)), jnp.float32)
    fork.score[...] = jnp.asarray(np.random.default_rng(1).normal(size=(8, 2)), jnp.float32)
    streams = Streams.start(x)
    quiet, drawn = fork(streams), fork(streams, key=jax.random.key(0))
    assert not np.array_equal(quiet.token, drawn.token)
    assert float(fork.threshold[...]) == 0.25
    fork(streams, track=True)
    assert float(fork.threshold[...]) != 0.25
    own = Fork(8, EvenTokens(), score_originals=True, rngs=nnx.Rngs(0))
    own.score[...] = fork.score[...]
    forks = ~np.asarray(quiet.original) & np.asarray(quiet.alive)
    assert forks.any() and own.threshold is None
    halved = np.asarray(quiet.log_score)[forks]
    full = np.asarray(own.candidates(streams).log_score)[:, ::2]
    by_token = full[np.nonzero(forks)[0], np.asarray(quiet.token)[forks]]
    np.testing.assert_allclose(halved, by_token / 2, rtol=1e-6)


def test_a_dial_that_a_policy_has_not_is_one_line():
    with pytest.raises(ValueError, match="ratio=2.0: the policy EvenTokens.* has no ratio"):
        override_policy(EvenTokens(), ratio=2.0)
    with pytest.raises(ValueError, match="window=3 is a setting of PrefixRank"):
        override_policy(Loud(), window=3)

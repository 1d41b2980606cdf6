"""The learner: exact first steps, and nothing that order, filler or splits could change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rl_tiny import LORA, MEMGEN, Echo, Vowels, language_model

from train.devices.mesh import MeshConfig
from train.engine.optim import OptimizerConfig
from train.rl.config import RLConfig
from train.rl.job import RLJob
from train.rl.learning.credit import assign_advantages
from train.rl.learning.policy import scores
from train.rl.rollout.rows import make_rows
from train.rl.types import Episodes

RATE = 1e-2
CONFIG = RLConfig(
    lora=LORA,
    memgen=dataclasses.replace(MEMGEN, trigger=None),
    steps=3,
    batch_size=4,
    num_generations=4,
    max_new_tokens=6,
    optimizer=OptimizerConfig(
        learning_rate=RATE, weight_decay=0.0, warmup=0.0, final_ratio=1.0, clip=1e9
    ),
)


def work(model: str = "shallow", task=None, devices: int = 1, **changes) -> RLJob:
    config = dataclasses.replace(CONFIG, **changes)
    return RLJob(config, language_model(model), task or Vowels(), devices=jax.devices()[:devices])


def stacked(reinforcing: RLJob, trajectories, multiple: int = 1):
    """Credited rows, moved by random advantages so that nothing cancels."""
    config = reinforcing.config
    advantages = assign_advantages(trajectories, Episodes.from_trajectories(trajectories), config)
    return make_rows(trajectories, advantages, multiple, reinforcing.events_per_row)


@functools.cache
def rollouts(train: str = "lora", model: str = "shallow"):
    reinforcing = learner_of(model, train=train)
    state = reinforcing.first_state()
    return reinforcing, state, reinforcing.collect(state.variables).trajectories


learner_of = functools.cache(work)  # what it compiles is found again


def updated(trajectories, multiple=1, **changes):
    """Gradients and metrics of the updates of one step.

    Adam's first moment is the gradient, of which parameters after a first step have the sign.
    """
    reinforcing = learner_of("shallow", **{"train": "lora"} | changes)
    rows = stacked(reinforcing, trajectories, multiple)
    state, metrics = reinforcing.learner.update(
        reinforcing.first_state(), rows, np.random.default_rng(0)
    )
    return jax.device_get(optax.tree.get(state.opt_state, "mu")), metrics


def assert_close(ours, theirs, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), ours, theirs)


@pytest.mark.parametrize(
    ("train", "model"),
    [("lora", "shallow"), pytest.param("all", "one rank", marks=pytest.mark.experiment)],
)
def test_the_ratio_of_the_first_step_is_exactly_one(train, model):
    """A weaver's is looked at in a whole run; forks' scores, in test_rl_sampler."""
    reinforcing, _, trajectories = rollouts(train, model)
    rows = stacked(reinforcing, trajectories)
    _, metrics = reinforcing.learner.update(
        reinforcing.first_state(), rows, np.random.default_rng(0)
    )
    sums = metrics["sums"]
    assert sums["tokens"] == rows["trained"].sum() > 0
    assert sums["ratio"] == sums["tokens"]
    assert sums["approx_kl"] == sums["clipped"] == 0
    assert metrics["grad_norm"] > 0


def test_later_steps_are_off_policy():
    """The second minibatch of the first epoch already: near the policy that the data came from."""
    _, _, trajectories = rollouts()
    reinforcing = learner_of("shallow", train="lora", minibatches=2)
    rows = stacked(reinforcing, trajectories, 2)
    update = reinforcing.learner.update
    _, moved = update(reinforcing.first_state(), rows, np.random.default_rng(0))
    tokens = moved["sums"]["tokens"]
    assert 1e-6 < moved["sums"]["approx_kl"] / tokens < 0.02
    assert 0 < abs(moved["sums"]["ratio"] / tokens - 1) < 0.1


def test_the_gradient_is_that_of_weighted_log_probabilities():
    """On policy: minus the sum of A log p, each token by its row's length and the rows."""
    reinforcing, state, trajectories = rollouts()
    rows = stacked(reinforcing, trajectories)
    trained = rows["trained"]
    weight = trained * rows["advantages"] / trained.sum(axis=1, keepdims=True) / len(trajectories)

    @jax.jit
    @jax.grad
    def slope(params):
        model = reinforcing.trainable.model(dataclasses.replace(state, params=params).variables)
        return -(scores(model, placed, reinforcing.sampling()) * weight).sum()

    placed = {name: jnp.asarray(values) for name, values in rows.items()}
    grads = jax.device_get(slope(state.params))
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(grads)))
    _, metrics = updated(trajectories)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"accumulate": 4}, marks=pytest.mark.experiment),
        {"accumulate": 2, "method": "grpo(aggregate='token')"},
    ],
    ids=str,
)
def test_parts_of_a_minibatch_add_up(changes):
    _, _, trajectories = rollouts()
    whole = {name: value for name, value in changes.items() if name != "accumulate"}
    one, metrics = updated(trajectories, 4, **whole)
    parts, others = updated(trajectories, 4, **changes)
    np.testing.assert_allclose(metrics["grad_norm"], others["grad_norm"], rtol=1e-5)
    assert_close(one, parts)


BY_CONSTANT = {"method": "grpo(aggregate='constant')"}


@pytest.mark.parametrize(
    "changes", [{}, pytest.param(BY_CONSTANT, marks=pytest.mark.experiment)], ids=str
)
def test_order_and_filler_change_nothing(changes):
    """By sequences; by tokens, and but for experiments by a constant, the loss's test alone."""
    _, _, trajectories = rollouts()
    one, metrics = updated(trajectories, **changes)
    other, others = updated(trajectories[::-1], 24, **changes)  # 8 rows of filler
    np.testing.assert_allclose(metrics["grad_norm"], others["grad_norm"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], others["loss"], atol=1e-6)
    assert_close(one, other)


def test_groups_that_agree_give_exactly_no_gradient():
    _, _, trajectories = rollouts()
    same = [
        dataclasses.replace(row, reward=dataclasses.replace(row.reward, value=0.3))
        for row in trajectories
    ]
    grads, metrics = updated(same)
    assert metrics["grad_norm"] == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_a_filtered_step_changes_nothing_and_counts():
    class Never(Vowels):
        def score(self, completion):
            return dataclasses.replace(super().score(completion), success=False, value=0.0)

    reinforcing = work(task=Never(), method="dapo", max_batches=2)
    state = reinforcing.first_state()
    before = jax.device_get(state.params)
    state, metrics, collected = reinforcing.step(state)
    assert (collected.groups, collected.kept) == (8, 0)
    assert reinforcing.collector.position == 8
    assert (reinforcing.steps_done, int(state.step)) == (1, 0)
    assert metrics["mixed_groups"] == 0
    assert_close(jax.device_get(state.params), before, 0)


def test_filtering_keeps_whole_groups_that_differ():
    reinforcing = work(method="dapo", num_generations=2, max_batches=8)
    collected = reinforcing.collect(reinforcing.first_state().variables)
    assert collected.kept == 4 < collected.groups
    kept = Episodes.from_trajectories(collected.trajectories)
    for group in set(kept.group):
        assert sorted(kept.success[kept.group == group]) == [False, True]


class Letters(Echo):
    """Three turns of so few tokens that they fit the least room; one of four ends at once."""

    def problem(self, split, index):
        answer = 3 if index % 4 else 1
        return dataclasses.replace(
            super().problem(split, index), prompt=chr(97 + index % 26), answer=answer
        )

    def step(self, state, action):
        return dataclasses.replace(super().step(state, action), reward=action.tokens[0] / 257)


@functools.cache
def played(keep_context: bool):
    """Rollouts of all parameters' policy."""
    strategy = f"turns(max_turns=3, max_observation=2, keep_context={keep_context})"
    reinforcing = work(task=Letters(), strategy=strategy, train="all", max_new_tokens=2)
    return reinforcing.collect(reinforcing.first_state().variables).trajectories


def test_credit_of_turns_is_by_return():
    """Rows of whole episodes and rows of turns get the same advantages at the same turns."""
    found = {}
    for keep_context in (True, False):
        rows = played(keep_context)
        config = dataclasses.replace(CONFIG, method="rebn(gamma=0.9)")
        advantages = assign_advantages(rows, Episodes.from_trajectories(rows), config)
        found[keep_context] = {
            (row.group, row.episode, row.turn + offset): advantage[begin]
            for row, advantage in zip(rows, advantages, strict=True)
            for offset, begin in enumerate(row.begins)
        }
        # Pooled over turns they have mean 0 and population standard deviation 1.
        pooled = np.array([*found[keep_context].values()])
        np.testing.assert_allclose([pooled.mean(), pooled.std()], [0, 1], atol=1e-6)
        # Values of 0 and λ = 1: what GAE gives all tokens of a turn, before anything is normalised.
        config = dataclasses.replace(CONFIG, method="ppo(gamma=0.9, lam=1.0, whiten=False)")
        returns = assign_advantages(rows, Episodes.from_trajectories(rows), config)
        turns = np.concatenate([of[row.trained] for row, of in zip(rows, advantages, strict=True)])
        tokens = np.concatenate([of[row.trained] for row, of in zip(rows, returns, strict=True)])
        scale = np.polyfit(tokens, turns, 1)
        np.testing.assert_allclose(np.polyval(scale, tokens), turns, atol=1e-6)
    assert found[True].keys() == found[False].keys()
    assert {turn for _, _, turn in found[True]} == {0, 1, 2}


def test_a_strategy_may_bring_its_own_advantages():
    """Token by token, beside rows that are credited as usual."""
    reinforcing, _, rows = rollouts()
    own = np.arange(len(rows[1].tokens)) / 7
    mixed = [dataclasses.replace(rows[1], advantages=own) if i == 1 else r
             for i, r in enumerate(rows)]  # fmt: skip
    usual = assign_advantages(rows, Episodes.from_trajectories(rows), reinforcing.config)
    found = assign_advantages(mixed, Episodes.from_trajectories(mixed), reinforcing.config)
    np.testing.assert_array_equal(found[1], own)
    np.testing.assert_array_equal(found[0], usual[0])
    arrays = make_rows(mixed, found)
    np.testing.assert_allclose(arrays["advantages"][1, : len(own)], own, rtol=1e-6)


def test_episodes_count_once_in_their_group():
    """GRPO of episodes whose turns are rows: statistics are of episodes, not of rows."""
    rows = played(False)
    advantages = assign_advantages(rows, Episodes.from_trajectories(rows), CONFIG)
    for group in {row.group for row in rows}:
        mine = [(row, a) for row, a in zip(rows, advantages, strict=True) if row.group == group]
        reward = {row.episode: row.reward.value for row, _ in mine}
        values = np.array([*reward.values()])
        assert len({*values.tolist()}) > 1
        by_hand = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
        for row, advantage in mine:
            np.testing.assert_allclose(advantage, by_hand[[*reward].index(row.episode)])


def test_eight_devices_do_what_one_does():
    """The same texts; parameters after two optimizer steps differ by float noise."""
    found = {}
    for devices, mesh in ((1, MeshConfig()), (8, MeshConfig(data=4, fsdp=2))):
        reinforcing = work(
            devices=devices, mesh=mesh, train="all", minibatches=2, method="grpo(kl=0.1)"
        )
        state, metrics, collected = reinforcing.step(reinforcing.first_state())
        found[devices] = jax.device_get(state.params), metrics, collected
    (one, metrics, mine), (eight, others, theirs) = found[1], found[8]
    for row, other in zip(mine.trajectories, theirs.trajectories, strict=True):
        np.testing.assert_array_equal(row.tokens, other.tokens)
    for name in ("grad_norm", "loss", "ref_kl"):
        np.testing.assert_allclose(metrics[name], others[name], rtol=1e-4, atol=1e-6)
    assert_close(one, eight, 1e-4)

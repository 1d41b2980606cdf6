"""PPO: advantages of tokens against numbers by hand and a loop, the value head, and its loss."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rl_runs import STEPS, job
from rl_tiny import LORA, MEMGEN, finetunable, language_model, sampling

from train.cli.config_json import as_json
from train.models.finetunable import AdapterParam, ValueParam
from train.models.load import checksum, finetuned_model, load_model
from train.rl.config import RLConfig
from train.rl.learning.advantages import whiten
from train.rl.learning.credit import assign_advantages, token_advantages
from train.rl.learning.critic import ValueLoss, value_metrics
from train.rl.learning.estimators import GAE
from train.rl.learning.losses import PolicyLoss
from train.rl.learning.policy import predictors, scores_and_values
from train.rl.loop import train
from train.rl.methods import PPO
from train.rl.rollout.rows import make_rows
from train.rl.types import Episodes, Problem, Reward, Trajectory
from train.runs.checkpoint import load_params
from train.runs.metrics import read_metrics


def row(
    turns: list[int], rewards: list[float], values: list[float] | None = None, **changes: Any
) -> Trajectory:
    """A prompt of two tokens, responses of `turns` tokens, and an observation of one after each.

    Values of what is not generated are NaN: nothing reads them.
    """
    trained = [False, False]
    begins = []
    for length in turns:
        begins.append(len(trained))
        trained += [True] * length + [False]
    trained = np.array(trained)
    found = np.full(len(trained), np.nan)
    if values is not None:
        found[trained] = values
    base = Trajectory(
        group=0,
        problem=Problem("p", "?"),
        tokens=np.arange(len(trained), dtype=np.int32),
        trained=trained,
        log_probs=np.where(trained, -1.0, 0.0).astype(np.float32),
        decisions=np.full(len(trained), -1, np.int8),
        begins=tuple(begins),
        reward=Reward(float(sum(rewards)), False),
        finished=True,
        texts=("",) * len(turns),
        turn_rewards=tuple(rewards),
        episode=0,
        values=None if values is None else found,
    )
    return dataclasses.replace(base, **changes)


def estimated(
    rows: list[Trajectory], gamma: float, lam: float, shaped: float = 0.0
) -> list[np.ndarray]:
    """Advantages of the generated tokens of each row."""
    episodes = Episodes.from_trajectories(rows)
    found = token_advantages(rows, episodes, episodes.reward + shaped, gamma, lam)
    for one, of in zip(rows, found, strict=True):
        assert one.trained.shape == of.shape and not of[~one.trained].any()
    return [of[one.trained] for one, of in zip(rows, found, strict=True)]


def test_an_episode_of_two_turns_by_hand():
    """Two turns of two and one tokens, rewards 0 and 1, γ = 0.5, λ = 0.5.

    token      V     r   γ_t   δ = r + γ_t V' - V            A = δ + γ_t λ A'
    1 of 1    0.4    0   1     0 + 1 · 0.2 - 0.4 = -0.2      -0.2 + 1 · 0.5 · 0.15 = -0.125
    2 of 1    0.2    0   0.5   0 + 0.5 · 0.6 - 0.2 = 0.1     0.1 + 0.5 · 0.5 · 0.4 = 0.2
    1 of 2    0.6    1   0.5   1 + 0 - 0.6 = 0.4             0.4

    A of the first token: 0.5 · 0.2 = 0.1, so -0.2 + 0.1 = -0.1. Returns A + V: 0.3, 0.4, 1.
    """
    episode = row([2, 1], [0.0, 1.0], [0.4, 0.2, 0.6])
    np.testing.assert_allclose(estimated([episode], 0.5, 0.5)[0], [-0.1, 0.2, 0.4], atol=1e-15)
    episodes = Episodes.from_trajectories([episode])
    [returns] = GAE(gamma=0.5, lam=0.5).value_targets([episode], episodes, episodes.reward)
    np.testing.assert_allclose(returns[episode.trained], [0.3, 0.4, 1.0], atol=1e-15)
    # Shaping by -0.2 comes with the last token: A = 0.2, 0.1 + 0.25 · 0.2, -0.2 + 0.5 · 0.15.
    [shaped] = estimated([episode], 0.5, 0.5, shaped=-0.2)
    np.testing.assert_allclose(shaped, [-0.125, 0.15, 0.2], atol=1e-15)


def test_whitened_advantages_by_hand():
    """-0.1, 0.2 and 0.4 have the mean 1/6 and the population variance (0.01 + 0.04 + 0.16)/3 - 1/36
    = 0.0422222, so the standard deviation 0.205480; what was not generated stays 0."""
    episode = row([2, 1], [0.0, 1.0], [0.4, 0.2, 0.6])
    config = RLConfig(method="ppo(gamma=0.5, lam=0.5)")
    [found] = assign_advantages([episode], Episodes.from_trajectories([episode]), config)
    expected = [-1.297771, 0.162221, 1.135550]
    np.testing.assert_allclose(found[episode.trained], expected, atol=5e-7)
    assert not found[~episode.trained].any()
    plain = dataclasses.replace(config, method=PPO(gamma=0.5, lam=0.5, whiten=False))
    [found] = assign_advantages([episode], Episodes.from_trajectories([episode]), plain)
    np.testing.assert_allclose(found[episode.trained], [-0.1, 0.2, 0.4], atol=1e-15)
    assert (whiten(np.full(4, 0.3)) == 0).all()


def episodes_of_rows(rng: np.random.Generator, split: bool) -> list[Trajectory]:
    """Seven episodes of up to four turns, one row each or a row for each turn."""
    rows = []
    for episode in range(7):
        turns = rng.integers(1, 5, rng.integers(1, 5)).tolist()
        rewards = rng.normal(size=len(turns)).tolist()
        values = rng.normal(size=sum(turns)).tolist()
        whole = row(turns, rewards, values, episode=episode, group=episode % 2)
        if not split:
            rows.append(whole)
            continue
        ends = np.cumsum(turns)
        for turn, (length, end) in enumerate(zip(turns, ends, strict=True)):
            part = row([length], rewards, values[end - length : end], turn=turn)
            changes = {"episode": episode, "group": episode % 2, "reward": whole.reward}
            rows.append(dataclasses.replace(part, **changes))
    return rows


def by_loop(rows: list[Trajectory], gamma: float, lam: float) -> list[float]:
    """Advantages of one episode by their definition, A_t = Σ_k (Π γ λ) δ_{t+k}, token by token."""
    steps: list[tuple[float, float, float]] = []
    for one in rows:
        for offset, begin in enumerate(one.begins):
            position = begin
            while position < len(one.tokens) and one.trained[position]:
                last = position + 1 == len(one.tokens) or not one.trained[position + 1]
                paid = one.turn_rewards[one.turn + offset] if last else 0.0
                assert one.values is not None
                steps.append((paid, float(one.values[position]), gamma if last else 1.0))
                position += 1
    found = []
    for start in range(len(steps)):
        total, factor = 0.0, 1.0
        for index in range(start, len(steps)):
            paid, value, discount = steps[index]
            following = steps[index + 1][1] if index + 1 < len(steps) else 0.0
            total += factor * (paid + discount * following - value)
            factor *= discount * lam
        found.append(total)
    return found


@pytest.mark.parametrize("split", [False, True], ids=["a row each", "a row a turn"])
def test_random_episodes_agree_with_a_loop(split: bool):
    for seed, (gamma, lam) in enumerate([(0.9, 0.95), (1.0, 0.3), (0.5, 1.0), (0.7, 0.0)]):
        rows = episodes_of_rows(np.random.default_rng(seed), split)
        found = estimated(rows, gamma, lam)
        for mine in Episodes.from_trajectories(rows).rows:
            ours = np.concatenate([found[index] for index in mine])
            theirs = by_loop([rows[index] for index in mine], gamma, lam)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_without_values_and_decay_advantages_are_the_returns_that_rebn_normalises():
    """GEM's three episodes, [0, 0, 1], [0, -0.1] and [1] with γ = 0.9: tokens of a turn share its
    return, however many they are."""
    rewards = [[0.0, 0.0, 1.0], [0.0, -0.1], [1.0]]
    rows = [
        row([2, 1, 3][: len(paid)], paid, episode=number) for number, paid in enumerate(rewards)
    ]
    found = estimated(rows, 0.9, 1.0)
    expected = [[0.81, 0.81, 0.9, 1, 1, 1], [-0.09, -0.09, -0.1], [1, 1]]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-15)
    # With λ = 1 a value head learns these returns, whatever its values are.
    valued = [
        dataclasses.replace(one, values=np.random.default_rng(0).normal(size=len(one.tokens)))
        for one in rows
    ]
    episodes = Episodes.from_trajectories(valued)
    targets = GAE(gamma=0.9, lam=1.0).value_targets(valued, episodes, episodes.reward)
    for one, target, theirs in zip(rows, targets, expected, strict=True):
        np.testing.assert_allclose(target[one.trained], theirs, atol=1e-12)


def test_clipped_value_loss_by_hand():
    """ε = 0.2, R = 1, V_old = 0, five values and one that does not count.

    V       clipped   (V - R)²   (clipped - R)²   loss = ½ max   gradient V - R, 0 if clipped wins
    0.1     0.1       0.81       0.81             0.405          -0.9
    0.5     0.2       0.25       0.64             0.32           0
    -0.5    -0.2      2.25       1.44             1.125          -1.5
    1.9     0.2       0.81       0.64             0.405          0.9
    """
    with jax.enable_x64():
        values = np.array([[0.1, 0.5, -0.5, 1.9, np.nan]])
        counts = np.array([[True] * 4 + [False]])
        old, returns = np.array([[0.0] * 4 + [np.nan]]), np.array([[1.0] * 4 + [np.nan]])

        def total(values, old, returns):
            loss, sums = ValueLoss(clip=0.2, coef=0.5)(values, old, returns, counts)
            return loss.sum(), (loss, sums)

        derived = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))
        slopes, (loss, sums) = jax.device_get(derived(values, old, returns))
    np.testing.assert_allclose(loss, [[0.2025, 0.16, 0.5625, 0.2025, 0]], atol=1e-15)
    np.testing.assert_allclose(slopes[0], [[-0.45, 0, -0.75, 0.45, 0]], atol=1e-15)
    assert not np.any(slopes[1]) and not np.any(slopes[2])
    np.testing.assert_allclose(sums["value_loss"], 2.255, rtol=1e-14)
    assert float(sums["value_clipped"]) == 1
    plain, sums = ValueLoss(clip=None, coef=1.0)(*map(jnp.float32, (values, old, returns)), counts)
    np.testing.assert_allclose(plain, [[0.405, 0.125, 1.125, 0.405, 0]], rtol=1e-6)
    assert sums["value_clipped"] == 0


def test_explained_variance_by_hand():
    """Returns 0, 1, 2 of variance 2/3; values 0, 1, 1 leave 0, 0, 1 of variance 2/9: 1 - 1/3."""
    rows = {
        "trained": np.array([[True, True, False], [True, False, False], [True] * 3]),
        "valid": np.array([True, True, False]),
        "values": np.array([[0.0, 1.0, np.nan], [1.0, np.nan, np.nan], [np.nan] * 3]),
        "returns": np.array([[0.0, 1.0, np.nan], [2.0, np.nan, np.nan], [np.nan] * 3]),
    }
    found = value_metrics(rows)
    assert found == {"value": pytest.approx(2 / 3), "explained_variance": pytest.approx(2 / 3)}
    assert value_metrics(rows | {"returns": np.ones((3, 3))})["explained_variance"] == 0


@pytest.mark.parametrize(
    ("method", "model"), [("lora", "one rank"), ("weaver", "shallow")], ids=lambda name: name
)
def test_a_value_is_of_the_state_before_its_token(method, model):
    """Of the hidden state that predicts it: forks are merged, and latents were attended to."""
    memgen = dataclasses.replace(MEMGEN, trigger=None)
    policy = finetunable(method, model, memgen=memgen, value_head=True)
    invoked = np.full(9, -1, np.int8)
    invoked[2] = method == "weaver"
    rows = [row([3, 2], [0, 1], decisions=invoked), row([2], [0.5], decisions=invoked[:5])]
    arrays = make_rows(rows, np.zeros(2), events=memgen.events if method == "weaver" else 0)

    @jax.jit
    def program(policy, arrays):
        return *scores_and_values(policy, arrays, sampling()), predictors(policy, arrays)

    log_probs, values, hidden = jax.device_get(program(policy, arrays))
    head = policy.value_head
    assert head is not None
    by_hand = np.float64(hidden) @ np.float64(head.kernel[...]) + np.float64(head.bias[...])
    np.testing.assert_allclose(values, by_hand, rtol=1e-5, atol=1e-5)
    assert values.shape == arrays["tokens"].shape == (2, 16) and values.dtype == np.float32
    assert (log_probs != 0).sum() == arrays["trained"].sum() == 7
    changed = dict(arrays) | {"tokens": arrays["tokens"].copy()}
    changed["tokens"][:, 4:] += 11
    _, later, _ = jax.device_get(program(policy, changed))
    np.testing.assert_allclose(later[:, 1:5], values[:, 1:5], rtol=1e-5, atol=1e-5)
    assert np.abs(later[0, 5:9] - values[0, 5:9]).min() > 1e-3


@functools.cache
def of_contract(out: Path) -> Any:
    """The job of the contract of all methods, whose programs are compiled once."""
    return job(out, PPO())


def test_the_first_step_of_the_value_head_by_hand(tmp_path):
    """At V = 0 the gradient of ½ c mean (V - R)² over tokens is -c mean R h; R = 0.95^k r."""
    mine = of_contract(tmp_path)
    state = mine.first_state()
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.params["value_head"]))
    trajectories = mine.collect(state.variables).trajectories
    rows = mine.rows(trajectories, state.variables)
    assert not rows["values"].any()
    expected = np.zeros(rows["returns"].shape)
    for of, one in zip(expected, trajectories, strict=False):
        for position in np.flatnonzero(one.trained):
            of[position] = 0.95 ** (len(one.tokens) - 1 - position) * one.reward.value
    np.testing.assert_allclose(rows["returns"], expected, atol=1e-7)
    hidden = jax.jit(lambda variables, rows: predictors(mine.trainable.model(variables), rows))(
        state.variables, {name: rows[name] for name in ("tokens", "length")}
    )
    trained = rows["trained"]
    slope = -0.5 * (expected[trained][:, None] * hidden[trained]).mean(axis=0)
    state, metrics = mine.learner.update(state, rows, np.random.default_rng(0))
    moment = optax.tree.get(state.opt_state, "mu")["value_head"]
    scale = 0.1 / max(metrics["grad_norm"], 1)  # Adam's 1 - b1, and clipping by the global norm
    np.testing.assert_allclose(moment["kernel"][...], scale * slope, rtol=1e-4, atol=1e-7)
    bias = -0.5 * expected[trained].mean()
    np.testing.assert_allclose(moment["bias"][...], scale * bias, rtol=1e-4)
    sums = metrics["sums"]
    np.testing.assert_allclose(sums["value_loss"], 0.5 * (expected[trained] ** 2).sum(), rtol=1e-5)
    assert sums["ratio"] == sums["tokens"] == trained.sum()
    # Values that are off teach the decoder too, where the policy has nothing to learn.
    kernel = state.params["value_head"]["kernel"]
    kernel.set_value(jnp.linspace(-1, 1, kernel.shape[0], dtype=jnp.float32))
    rows["advantages"] *= 0
    before = jax.device_get(optax.tree.get(state.opt_state, "mu")["model"])
    state, _ = mine.learner.update(state, rows, np.random.default_rng(0))
    after = jax.device_get(optax.tree.get(state.opt_state, "mu")["model"])
    left = jax.tree.map(lambda new, old: np.abs(new - 0.9 * old).max(), after, before)
    assert max(jax.tree.leaves(left)) > 1e-5


def test_a_value_head_has_a_learning_rate_of_its_own(tmp_path):
    """Gradients of ones give updates of the learning rate, by Adam; its state stays as it is."""
    rates = []
    for number, method in enumerate((PPO(), PPO(value_learning_rate=0.3))):
        made = job(tmp_path / str(number), method).trainable
        assert jax.tree.structure(made.abstract.opt_state) == (
            jax.tree.structure(jax.eval_shape(made.optimizer.init, made.abstract.params))
        )

        def second(params, optimizer=made.optimizer):
            grads, state = jax.tree.map(jnp.ones_like, params), optimizer.init(params)
            _, state = optimizer.update(grads, state, params)  # its rate is that of step 0: none
            return optimizer.update(grads, state, params)[0]

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), made.abstract.params)
        found = nnx.to_pure_dict(jax.device_get(jax.jit(second)(zeros)))
        rates.append({name: jax.tree.leaves(part) for name, part in found.items()})
    for part, factor in (("model", 1.0), ("value_head", 10.0)):
        for plain, own in zip(*(rate[part] for rate in rates), strict=True):
            np.testing.assert_allclose(plain, -0.03, rtol=1e-3)
            np.testing.assert_allclose(own, factor * plain, rtol=1e-6)


def test_several_updates_of_one_rollout_of_each_problem(tmp_path):
    changes = {"num_generations": 1, "batch_size": 32, "epochs": 2, "steps": STEPS // 2}
    train(job(tmp_path, PPO(), **changes))
    lines = [line for line in read_metrics(tmp_path) if "reward" in line]
    assert lines[0]["value"] == 0 and lines[0]["rollouts"] == 32
    assert lines[-1]["value"] != 0 and lines[-1]["explained_variance"] != 0
    assert all(0 <= line["value_clipped"] <= 1 and line["value_loss"] > 0 for line in lines)
    assert max(line["value_clipped"] for line in lines) > 0
    saved = load_params(tmp_path)[1]
    assert saved.keys() == {"model", "value_head"} and saved["value_head"]["bias"] != 0
    assert not nnx.state(load_model(tmp_path).model, ValueParam)


def test_an_adapter_is_read_without_the_value_head_beside_it(monkeypatch):
    base = language_model("shallow")
    monkeypatch.setattr("train.models.load.load_language_model", lambda *given: base)
    policy = finetunable("lora", "shallow", value_head=True)
    params = nnx.to_pure_dict(nnx.state(policy, (AdapterParam, ValueParam)))
    assert params.keys() == {"adapter", "value_head"}
    config = as_json(RLConfig(method="ppo", train="lora", lora=LORA))
    meta = {"config": config, "base": checksum(base.model)}
    merged, _ = finetuned_model(meta, params)
    without, _ = finetuned_model(meta, {"adapter": params["adapter"]})
    ours, theirs = nnx.state(merged), nnx.state(without)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    with pytest.raises(ValueError, match="other_head"):
        finetuned_model(meta, {**params, "other_head": params["value_head"]})


@dataclasses.dataclass(frozen=True)
class Bare(PolicyLoss):
    """A loss of a user that is never reduced by others."""

    word: ClassVar[str] = "bare"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": "trigger"}, "train='trigger' learns decisions between them: choose another"),
        ({"strategy": "tree_search"}, "what strategy tree_search finds is none: choose another"),
        ({"loss": Bare()}, "loss bare has no `reduce` by which its loss could be added: write"),
        ({"method": "deepsearch", "advantage": "gae"}, "advantage gae needs a value head, which"),
        ({"advantage": "gae(lam=1.5)"}, "lam=1.5: choose from 0 to 1"),
        ({"method": "ppo(gamma=0.0)"}, "gamma=0.0: choose more than 0 and at most 1"),
        ({"method": "ppo(value_clip=0.0)"}, "value_clip=0.0: choose more than 0, or None"),
        ({"method": "ppo(value_learning_rate=0.0)"}, "value_learning_rate=0.0: choose more than 0"),
        ({"method": "ppo(value_coef=-1.0)"}, "value_coef=-1.0: choose more than 0"),
        (
            {"method": "ppo(lam=0.5)", "advantage": "rebn"},
            "lam=0.5 of method ppo is of its advantage, which advantage rebn(gamma=1.0) replaces",
        ),
    ],
    ids=str,
)
def test_mistakes_are_one_line(changes, words):
    with pytest.raises(ValueError) as error:
        RLConfig(**{"method": "ppo"} | changes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_episodes_without_a_reward_for_each_response_are_one_line():
    for turns, rewards, words in (
        ([1, 2], [1.0], "problem p has 2 responses and 1 rewards of turns: a value head needs"),
        ([1, 0], [1.0, 0.0], "response 1 to problem p has no token that its reward could come"),
    ):
        with pytest.raises(ValueError, match=words):
            estimated([row(turns, rewards)], 1.0, 0.95)
    repeated = [row([1, 2], [1.0])]
    with pytest.raises(ValueError, match="problem p has 2 responses and 1 rewards of turns: rebn"):
        assign_advantages(repeated, Episodes.from_trajectories(repeated), RLConfig(method="rebn"))


def test_a_value_head_that_diverges_is_named(tmp_path):
    mine = of_contract(tmp_path)
    state = mine.first_state()
    rows = mine.collect(state.variables).trajectories
    state.params["value_head"]["bias"].set_value(jnp.float32(np.nan))
    with pytest.raises(FloatingPointError, match="the value head gives NaN or infinity"):
        mine.rows(rows, state.variables)


def test_any_method_takes_the_advantage_and_groups_of_one():
    config = RLConfig(method="dapo(filter_groups=False)", advantage="gae", num_generations=1)
    assert config.parts.advantage.value_loss == ValueLoss(0.2, 0.5)
    assert RLConfig(method="ppo", num_generations=1, train="weaver").parts.loss == PPO().loss
    assert RLConfig(method="ppo", advantage="rloo").parts.advantage.value_loss is None

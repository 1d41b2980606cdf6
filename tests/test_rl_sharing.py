"""Updates that compute a prompt once for its rollouts: the gradients of those that do not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rl_tiny
from flax import nnx

from thoughtbubbles import ModelConfig, Thoughtbubbles, attention, branches
from train.engine.optim import OptimizerConfig
from train.rl.config import RLConfig
from train.rl.job import RLJob
from train.rl.learning import sharing
from train.rl.rollout.rows import make_rows
from train.rl.types import Problem, Reward, Trajectory

GROUPS = ((3, 4), (20, 5), (9, 1), (1, 3))  # tokens of a prompt, rollouts of it


def trajectories() -> list[Trajectory]:
    """Ragged prompts and responses, a group of one, rows without an end, a row of no response."""
    rng = np.random.default_rng(0)
    rows = []
    for group, (prompt, count) in enumerate(GROUPS):
        begin = rng.integers(0, 256, prompt, dtype=np.int32)
        for episode in range(count):
            written = 0 if (group, episode) == (1, 2) else int(rng.integers(1, 7))
            later = 2 if episode == 1 else 0  # an observation, and what is said to it
            tokens = np.concatenate([begin, rng.integers(0, 256, written + 2 * later, np.int32)])
            trained = np.arange(len(tokens)) >= prompt
            trained[prompt + written : prompt + written + later] = False
            value = float(rng.normal())
            rows.append(
                Trajectory(
                    group=group,
                    problem=Problem(f"p{group}", "?"),
                    tokens=tokens,
                    trained=trained,
                    log_probs=np.where(trained, rng.normal(-5, 0.3, len(tokens)), 0).astype("f4"),
                    decisions=np.full(len(tokens), -1, np.int8),
                    begins=(prompt,),
                    reward=Reward(value, value > 0),
                    finished=group % 2 == 0,
                    texts=("",),
                    turn_rewards=(value,),
                    episode=episode,
                    weight=1.0 + group,
                )
            )
    return rows


@pytest.fixture
def always(monkeypatch):
    """Sharing of all that is alike, however little it saves."""
    monkeypatch.setattr(sharing, "LEAST_SAVED", -(2**30))
    monkeypatch.setattr(sharing, "LEAST_FACTOR", 0.0)


def rows_of(found: list[Trajectory], multiple: int = 1):
    rng = np.random.default_rng(1)
    return make_rows(found, [rng.normal(size=len(row.tokens)) for row in found], multiple)


@pytest.mark.parametrize("order", [1, -1])
def test_branches_hold_each_row_once(always, order: int):
    """Prefix and inputs are a row up to its last token but one; values return to their places."""
    found = trajectories()[::order]
    rows = rows_of(found, 3)
    layout = sharing.branches_of(rows, 2, 3)
    assert layout is not None and len(layout.row) % 2 == 0
    held = layout.row[layout.row >= 0].tolist()
    assert sorted(held) == list(range(len(found)))
    laid = layout.laid_out(rows)
    assert laid["valid"].tolist() == (layout.row >= 0).tolist()
    assert laid["prefix"].shape == (len(layout.row), layout.prefix_size)
    for at in zip(*np.nonzero(layout.row >= 0), strict=True):
        index = layout.row[at]
        tokens, trained = found[index].tokens, found[index].trained
        size = laid["prefix_length"][at[0]]
        before = np.concatenate([laid["prefix"][at[0]][:size], laid["inputs"][at]])
        if not trained.any():
            assert not laid["trained"][at].any() and laid["weight"][at] == rows["weight"][index]
            continue
        begin, last = np.flatnonzero(trained)[[0, -1]]
        assert size == begin - 1
        np.testing.assert_array_equal(before[:last], tokens[:last])
        assert not before[last:].any()
        for name in ("tokens", "trained", "sampler", "advantages"):
            cut = laid[name][at][: last + 1 - begin]
            np.testing.assert_array_equal(cut, rows[name][index, begin : last + 1])
    back = layout.by_row(laid["sampler"], rows["tokens"].shape[1])
    np.testing.assert_array_equal(back, np.where(rows["trained"], rows["sampler"], 0))


def test_the_layout_has_the_fewest_positions(always):
    """6 rollouts of a prompt of 100 and 2 of another: by hand 1, 2, 4, 8 or 6 branches."""
    row = trajectories()[0]
    make = lambda first, size: dataclasses.replace(  # noqa: E731
        row,
        tokens=np.full(size + 16, first, np.int32),
        **{name: np.zeros(size + 16, np.float32) for name in ("log_probs", "decisions")},
        trained=np.arange(size + 16) >= size,
    )
    rows = rows_of([make(1, 100)] * 6 + [make(2, 100)] * 2)
    layout = sharing.branches_of(rows, 1, 6)
    by_hand = {1: 8, 2: 4, 4: 4, 8: 2, 6: 2}  # branches: shared rows, a power of two of them
    costs = {n: shared * (128 + 16 * n) for n, shared in by_hand.items()}
    assert layout is not None and costs[6] == min(costs.values())
    assert (layout.row.shape, layout.positions) == ((2, 6), costs[6])
    assert [sharing.prefix_bucket(n) for n in (0, 16, 17, 24, 25, 48, 49, 97, 191)] == [
        16, 16, 24, 24, 32, 48, 64, 128, 192
    ]  # fmt: skip


def test_small_updates_and_rows_without_a_prompt_share_nothing(always, monkeypatch):
    rows = rows_of(trajectories())
    assert sharing.branches_of(rows, 1, 1) is not None
    first = rows | {"trained": rows["trained"] | (np.arange(rows["trained"].shape[1]) == 0)}
    assert sharing.branches_of(first, 1, 1) is None
    monkeypatch.undo()
    few = rows_of([dataclasses.replace(trajectories()[4], episode=i) for i in range(64)])
    assert sharing.branches_of(few, 1, 8) is None  # 1,048 positions of 2,048
    once = rows_of([row for row in trajectories() if row.episode == 0])
    many = rows_of([dataclasses.replace(trajectories()[4], episode=i) for i in range(512)])
    layout = sharing.branches_of(many, 1, 8)
    assert layout is not None and many["tokens"].size - layout.positions >= sharing.LEAST_SAVED
    monkeypatch.setattr(sharing, "LEAST_SAVED", -(2**30))
    assert sharing.branches_of(once, 1, 1) is None
    assert sharing.branches_of(many, 1, 8) is not None


@functools.cache
def learner_of(share: bool, **changes) -> RLJob:
    config = RLConfig(
        lora=rl_tiny.LORA,
        steps=3,
        batch_size=4,
        num_generations=4,
        max_new_tokens=16,
        share_prompts=share,
        optimizer=OptimizerConfig(
            learning_rate=1e-2, weight_decay=0.0, warmup=0.0, final_ratio=1.0, clip=1e9
        ),
    )
    config = dataclasses.replace(config, **changes)
    job = RLJob(config, rl_tiny.language_model("shallow"), rl_tiny.Vowels(), jax.devices()[:1])
    assert job.describe().endswith(
        "prompts are shared in updates" if share else "in updates: share_prompts=False"
    )
    return job


def norm(tree) -> float:
    return float(optax.tree.norm(tree))


# The other: `python -m pytest -m experiment tests/test_rl_sharing.py`.
@pytest.mark.parametrize(
    "changes",
    [
        {"train": "all", "method": "grpo(importance_cap=2.0)", "accumulate": 3},
        pytest.param(
            {"train": "lora", "method": "ppo(whiten=False)", "minibatches": 2},
            marks=pytest.mark.experiment,
        ),
    ],
    ids=lambda changes: changes["method"],
)  # fmt: skip
def test_gradients_and_metrics_are_those_of_unshared_prompts(always, changes):
    """The learning rate of a first step is 0: the first moment is of the gradients of all."""
    found = {}
    for share in (False, True):
        job = learner_of(share, **changes)
        state = job.first_state()
        # With a value head each row has a token that its reward comes with.
        collected = [
            row for row in trajectories() if row.trained.any() or "ppo" not in str(changes)
        ]
        rows = job.rows(collected, state.variables)
        state, metrics = job.learner.update(state, rows, np.random.default_rng(0))
        values = {name: rows[name] for name in ("values", "returns", "advantages") if name in rows}
        found[share] = jax.device_get(optax.tree.get(state.opt_state, "mu")), metrics, values
    (whole, others, before), (shared, metrics, values) = found[False], found[True]
    assert 0 < norm(jax.tree.map(np.subtract, shared, whole)) < 1e-6 * norm(whole)
    assert metrics["sums"]["tokens"] == sum(row.trained.sum() for row in collected)
    assert metrics.keys() == others.keys() and metrics["sums"].keys() == others["sums"].keys()
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], others[name], rtol=1e-5, atol=1e-6)
    for name, value in metrics["sums"].items():
        np.testing.assert_allclose(value, others["sums"][name], rtol=1e-5, atol=1e-6)
    assert ("values" in values) == ("ppo" in changes["method"])
    for name, value in values.items():
        np.testing.assert_allclose(value, before[name], rtol=1e-5, atol=1e-5)


def test_branches_have_the_states_of_whole_rows(monkeypatch):
    """Grouped queries, prefixes of 0 to 5 vectors; weights kept, computed again, in two parts."""
    config = ModelConfig(vocab_size=8, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2)
    build = lambda: Thoughtbubbles(config, rngs=nnx.Rngs(0))  # noqa: E731
    decoder = rl_tiny.filled(nnx.eval_shape(build), scale=0.2).backbone()
    rng = np.random.default_rng(0)
    prefix, x = (jnp.asarray(rng.normal(size=shape), "f4") for shape in ((3, 5, 16), (3, 2, 4, 16)))
    weigh, length = rng.normal(size=x.shape), np.array([5, 2, 0])

    def together(decoder, prefix, x):
        return decoder.branch_states(prefix, jnp.asarray(length), x)

    def apart(decoder, prefix, x):
        rows = [jnp.concatenate([prefix[i, :size], x[i, j], prefix[i, size:]])
                for i, size in enumerate(length) for j in range(2)]  # fmt: skip
        states = decoder.hidden_states(jnp.stack(rows)).reshape(3, 2, 9, 16)
        return jnp.stack([states[i, :, size : size + 4] for i, size in enumerate(length)])

    def slopes(states):
        def weighed(*arrays):
            found = states(*arrays)
            return (found * weigh).sum(), found

        grad = jax.jit(jax.grad(weighed, (0, 1, 2), has_aux=True))
        return jax.device_get(grad(decoder, prefix, x))

    theirs = slopes(apart)
    whole = 4 * 3 * 4 * 2 * 4 * (5 + 4)  # bytes of the weights of all branches
    for kept, held in ((whole, whole), (whole - 1, whole // 2)):
        monkeypatch.setattr(attention, "LARGEST_PROBABILITIES", kept)
        monkeypatch.setattr(branches, "LARGEST_BRANCHES", held)
        for mine, other in zip(slopes(together), theirs, strict=True):
            assert 0 < norm(jax.tree.map(np.subtract, mine, other)) < 1e-6 * norm(other)


def test_a_run_says_why_prompts_are_not_shared():
    config = RLConfig(steps=1, batch_size=1, num_generations=2, max_new_tokens=2, train="weaver",
                      memgen=dataclasses.replace(rl_tiny.MEMGEN, trigger=None))  # fmt: skip

    def line(model: str, **changes) -> str:
        job = RLJob(dataclasses.replace(config, **changes), rl_tiny.language_model(model),
                    rl_tiny.Vowels(), jax.devices()[:1])  # fmt: skip
        return job.describe().rpartition("; ")[2]

    assert line("shallow") == (
        "prompts are not shared in updates: latent memory is woven into each rollout"
    )
    assert line("one rank", train="all") == "prompts are not shared in updates: the model forks"

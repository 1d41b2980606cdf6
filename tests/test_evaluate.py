"""Held-out loss: prefix-only against brute force, and what is reported for which model."""

import dataclasses
import functools
import math
import types
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import SMALL, VOCAB, by_reference, quick_model

from thoughtbubbles import PrefixRank, Threshold, TopK
from train.devices.mesh import MeshConfig, make_mesh
from train.engine.config import EvalConfig
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable
from train.evaluate import EvaluateConfig, models_of
from train.evaluation.held_out import Evaluator, _error_of_mean, readable
from train.evaluation.policy_overrides import Setting, figure, override_policy, table


class Rows:
    """Five rows of eight tokens; the last ends early."""

    def __init__(self):
        self.tokens = np.random.default_rng(0).integers(0, VOCAB, (5, 8)).astype(np.int32)
        self.tokens[-1, 5:] = -1

    def __len__(self):
        return len(self.tokens)

    def read(self, rows):
        tokens = self.tokens[list(rows)]
        return tokens, (tokens[:, 1:] >= 0).sum(axis=1).astype(np.int32) * 2


@functools.cache
def evaluate(config, positions=0, devices=1):
    mesh = make_mesh(MeshConfig(devices, 1, 1), jax.devices()[:devices])
    trainable = make_trainable(config, OptimizerConfig(), 10, mesh)
    variables = jax.device_put(nnx.state(quick_model(config)), trainable.shardings.variables)
    settings = EvalConfig(rows=0, positions=positions)
    evaluator = Evaluator(trainable, 8 if devices > 1 else 2, settings)
    return evaluator(variables, Rows())  # pyright: ignore


def brute_force(config):
    """Each target scored by the reference from nothing but its prefix."""
    nats = []
    for row in Rows().tokens:
        row = row[row >= 0]
        for end in range(1, len(row)):
            logits = by_reference(config, row[:end]).logits[-1]
            nats.append(np.log(np.exp(logits).sum()) - logits[row[end]])
    return float(np.mean(nats))


def check_streams_per_token(config, metrics):
    """Counted after the last fork layer."""
    rows = [row[row >= 0] for row in Rows().tokens[:, :-1]]
    streams = sum(len(by_reference(config, row).streams) for row in rows)
    expected = streams / sum(map(len, rows))
    assert metrics["streams_per_token"] == pytest.approx(expected)
    assert f"{expected:.2f} streams/token" in readable(metrics)


def test_settings_mistakes():
    for wrong in ({"rows": -1}, {"positions": 1}, {"every": -5}):
        with pytest.raises(ValueError, match="choose 0 or more"):
            EvalConfig(**wrong)
    for tasks, message in (
        ({"rows": 3}, "rows=3 is for held-out rows"),
        ({"positions": 3}, "positions=3 is for held-out rows"),
        ({"json": "a", "records": "a"}, "json and records are both a: name two files"),
    ):
        with pytest.raises(ValueError, match=message):
            EvaluateConfig(checkpoint="run", tasks=("a.jsonl",), **tasks)
    loaded: Any = types.SimpleNamespace(model=types.SimpleNamespace(fork_policy=PrefixRank()))
    for name, sweep in (("ratio", "sweep"), ("threshold_offset", "sweep_offset")):
        config = EvaluateConfig(checkpoint="run", **{name: 1.5, sweep: (1.0, 2.0)})
        with pytest.raises(ValueError, match=f"{name}=1.5 is swept: leave it out"):
            models_of(config, loaded)


@pytest.mark.parametrize("kind", ["residual", "probability"])
def test_prefix_only_is_brute_force(kind):
    config = dataclasses.replace(SMALL, merge=kind)
    metrics = evaluate(config)
    assert metrics["loss"] == pytest.approx(brute_force(config), rel=1e-5)
    assert metrics["standard_error"] == 0.0
    assert abs(metrics["blockwise_loss"] - metrics["loss"]) > 1e-4, "TopK looks ahead"
    assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] / math.log(2) / 2)
    assert "not causal" in readable(metrics)
    check_streams_per_token(config, metrics)


def test_a_plain_decoder_has_one_number():
    config = dataclasses.replace(SMALL, fork_layers=())
    metrics = evaluate(config)
    assert set(metrics) == {"loss", "bits_per_byte", "standard_error", "streams_per_token"}
    assert metrics["streams_per_token"] == 1
    assert metrics["loss"] == pytest.approx(brute_force(config), rel=1e-5)
    assert "teacher-forced" not in readable(metrics)


@pytest.mark.parametrize("policy", [PrefixRank(1.5, window=3), Threshold(1.5)], ids=str)
def test_a_causal_policy_has_one_number_and_it_is_honest(policy):
    """Blockwise is prefix-only, to float noise; for `TopK` it is not (above)."""
    config = dataclasses.replace(SMALL, policy=policy)
    metrics = evaluate(config)
    assert metrics["loss"] == pytest.approx(brute_force(config), rel=1e-5)
    assert "blockwise_loss" not in metrics and "teacher-forced" not in readable(metrics)
    check_streams_per_token(config, metrics)


@pytest.mark.parametrize(
    ("policy", "overrides", "turned"),
    [
        (TopK(2.0), {}, TopK(2.0)),
        (TopK(streams=30), {"ratio": 1.5}, TopK(1.5)),
        (PrefixRank(2.0, burst=3), {"ratio": 1.5, "window": 4}, PrefixRank(1.5, 4, 3)),
        (Threshold(2.0), {"threshold_offset": 0.0}, Threshold(2.0)),
        (Threshold(2.0), {"threshold_offset": -0.1}, Threshold(2.0, offset=-0.1)),
    ],
)
def test_dials(policy, overrides, turned):
    assert override_policy(policy, **overrides) == turned


@pytest.mark.parametrize(
    ("policy", "overrides", "message"),
    [
        (TopK(2.0), {"window": 4}, "window=4 is a setting of PrefixRank, the policy is TopK"),
        (PrefixRank(2.0), {"threshold_offset": 0.1}, "0.1 is a setting of Threshold"),
        (Threshold(2.0), {"threshold_offset": 2.0}, "offset=2.0"),
        (PrefixRank(2.0), {"ratio": 0.5}, "ratio=0.5 is below 1"),
    ],
)
def test_dials_that_are_not_there(policy, overrides, message):
    with pytest.raises(ValueError, match=message):
        override_policy(policy, **overrides)


def test_dial_figure_and_table():
    points = [(1.0, 1.0, 2.5), (1.5, 1.4, 2.2), (2.0, 1.9, 2.1)]
    settings = [
        Setting(
            f"{ratio:g}",
            PrefixRank(ratio),
            {"streams_per_token": s, "loss": 2 * b, "bits_per_byte": b, "standard_error": 0.01},
        )
        for ratio, s, b in points
    ]
    axis = figure(settings, "title", PrefixRank(1.5)).axes[0]
    line, *_, trained = axis.lines
    assert axis.get_title() == "title"
    [bars] = axis.collections  # half of the error in nats, as bits here are half the nats
    ends = np.array(bars.get_segments())[:, :, 1]
    np.testing.assert_allclose(ends, [[b - 0.005, b + 0.005] for *_, b in points])
    assert list(zip(*line.get_data(), strict=True)) == [point[1:] for point in points]
    assert list(zip(*trained.get_data(), strict=True)) == [(1.4, 2.2)]
    assert trained.get_zorder() > line.get_zorder()  # seen above the white point of the line
    assert len(figure(settings, "title", TopK()).axes[0].lines) == len(axis.lines) - 1
    lines = table(settings).splitlines()
    assert len({len(line) for line in lines}) == 1 and "1.400" in lines[2]


def test_sampled_positions_estimate_the_whole():
    exact, sampled = evaluate(SMALL), evaluate(SMALL, positions=20)
    assert 0 < sampled["standard_error"] < 1
    assert abs(sampled["loss"] - exact["loss"]) < 4 * sampled["standard_error"]


def test_standard_error_is_that_of_the_rows():
    """All rows: no error. Some rows: the spread of estimates over all choices of rows."""
    rng = np.random.default_rng(0)
    nats = rng.normal(3, 1, (200, 6)) + rng.normal(0, 1, (200, 1))  # rows differ as documents do
    weight = np.ones_like(nats, bool)
    weight[::5, 3:] = False
    means, errors = [], []
    for _ in range(400):
        rows = rng.choice(200, 50, replace=False)
        means.append(nats[rows][weight[rows]].mean())
        errors.append(_error_of_mean(nats[rows], weight[rows], 200))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
    assert _error_of_mean(nats, weight, 200) == 0.0


def test_a_mesh_gives_the_same_numbers():
    assert evaluate(SMALL, devices=8) == pytest.approx(evaluate(SMALL), rel=1e-5)

"""Held-out loss: prefix-only against brute force, and what is reported for which model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import BASE, heavy_model, logits_of

from train.config import EvalConfig
from train.evaluate import Evaluator, _error_of_mean, readable
from train.mesh import MeshConfig, make_mesh
from train.optim import OptimizerConfig
from train.state import make_trainable


class Rows:
    """Five rows of eight tokens; the last ends early."""

    def __init__(self):
        self.tokens = np.random.default_rng(0).integers(0, BASE.vocab_size, (5, 8)).astype(np.int32)
        self.tokens[-1, 5:] = -1

    def __len__(self):
        return len(self.tokens)

    def read(self, rows):
        tokens = self.tokens[list(rows)]
        return tokens, (tokens[:, 1:] >= 0).sum(axis=1).astype(np.int32) * 2


def evaluate(config, mesh=None, **settings):
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    trainable = make_trainable(config, OptimizerConfig(), 10, mesh)
    params = nnx.state(heavy_model(config), nnx.Param)
    params = jax.device_put(params, trainable.shardings.params)
    evaluator = Evaluator(trainable, 8 if mesh.size > 1 else 2, EvalConfig(**settings))
    return evaluator(params, Rows())  # pyright: ignore


def brute_force(config):
    """Each target scored by a forward pass over nothing but its prefix."""
    nats = []
    for row in Rows().tokens:
        row = row[row >= 0]
        for end in range(1, len(row)):
            logits = logits_of(heavy_model(config), jnp.asarray(row[None, :end]))
            nats.append(-jax.nn.log_softmax(logits[0, -1])[row[end]])
    return float(np.mean(nats))


def test_settings_mistakes():
    for wrong in ({"rows": -1}, {"positions": 1}, {"every": -5}):
        with pytest.raises(ValueError, match="choose 0 or more"):
            EvalConfig(**wrong)


@pytest.mark.parametrize("kind", ["residual", "probability"])
def test_prefix_only_is_brute_force(kind):
    config = dataclasses.replace(BASE, merge=kind)
    metrics = evaluate(config, rows=0, positions=0)
    assert metrics["loss"] == pytest.approx(brute_force(config), rel=1e-5)
    assert metrics["standard_error"] == 0.0
    assert abs(metrics["blockwise_loss"] - metrics["loss"]) > 1e-4, "TopK looks ahead"
    assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] / math.log(2) / 2)
    assert "not causal" in readable(metrics)


def test_a_plain_decoder_has_one_number():
    config = dataclasses.replace(BASE, fork_layers=())
    metrics = evaluate(config, rows=0)
    assert set(metrics) == {"loss", "bits_per_byte", "standard_error"}
    assert metrics["loss"] == pytest.approx(brute_force(config), rel=1e-5)
    assert "blockwise" not in readable(metrics)


def test_sampled_positions_estimate_the_whole():
    exact = evaluate(BASE, rows=0, positions=0)
    sampled = evaluate(BASE, rows=0, positions=20)
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
    alone = evaluate(BASE, rows=0, positions=0)
    sharded = evaluate(
        dataclasses.replace(BASE), mesh=make_mesh(MeshConfig(8, 1, 1)), rows=0, positions=0
    )
    assert sharded == pytest.approx(alone, rel=1e-5)

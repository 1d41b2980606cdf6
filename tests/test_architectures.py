"""Promises that every architecture keeps: ours, those of the registry, and a user's own.

The user's is the block of docs/architecture.md, taken through the ordinary commands.
"""

import ast
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from contracts import EXAMPLES, make_example
from flax import nnx
from test_pretrain import mistake, run_here
from tiny import BASE

from memgen import LoRAConfig, MemGenConfig, WeaverConfig
from memgen.backbone import check_cache
from thoughtbubbles import (
    ARCHITECTURES,
    Architecture,
    ArchitectureConfig,
    PrefixRank,
)
from thoughtbubbles.architecture import architecture_name
from thoughtbubbles.decoding import generate as generate_ids
from thoughtbubbles.decoding import generate_with_bubbles
from thoughtbubbles.hatchling import ForkingHatchlingConfig, HatchlingConfig
from thoughtbubbles.testing import (
    _decoder_logits,
    assert_decoder_cached_is_parallel,
    assert_decoder_causal,
)
from thoughtbubbles.typed_json import required_options
from train import evaluate, generate, sft
from train.aot.config import presets
from train.aot.fitting import remedies
from train.cli.calls import from_text
from train.cli.config_json import as_json, model_from_json
from train.cli.entries import check_entries
from train.devices.mesh import MeshConfig, make_mesh, place
from train.engine.optim import OptimizerConfig
from train.engine.state import make_trainable
from train.engine.step import make_train_step
from train.evaluate import EvaluateConfig
from train.finetuning.job import SFTConfig
from train.generate import GenerateConfig
from train.models.finetunable import FinetunableModel
from train.models.load import load_model
from train.rl.__main__ import main as rl_main
from train.rl.config import RLConfig
from train.runs.metrics import read_metrics

ROOT = Path(__file__).parents[1]
[EXAMPLE] = re.findall(
    r"```python\n((?:(?!```).)*ARCHITECTURES\[.*?)```",
    (ROOT / "docs" / "architecture.md").read_text(),
    flags=re.DOTALL,
)
SMALL: dict[str, ArchitectureConfig] = {
    "thoughtbubbles": dataclasses.replace(
        BASE, vocab_size=64, num_layers=1, fork_layers=(0,), policy=PrefixRank(2.0)
    ),
    "hatchling": HatchlingConfig(
        vocab_size=64, embed_dim=16, num_neurons=64, num_layers=2, num_heads=2
    ),
    "forking_hatchling": ForkingHatchlingConfig(
        vocab_size=64, embed_dim=16, num_neurons=64, num_layers=2, num_heads=2
    ),
}
"""Small configs of the library's entries; of others the defaults or `--example`, with 64 tokens."""


def small(name: str) -> Any:
    if name in SMALL:
        return SMALL[name]
    config: Any = ARCHITECTURES[name].config_class
    if name not in EXAMPLES and required_options(config) == {"vocab_size"}:
        return config(vocab_size=64)
    return dataclasses.replace(make_example(name, config, "architecture"), vocab_size=64)


@pytest.fixture(scope="module", autouse=True)
def recurrent(tmp_path_factory):
    """The example of the docs as a module `mine_recurrent`, in the registry while tests run."""
    folder = tmp_path_factory.mktemp("plugin")
    named = EXAMPLE.replace('"recurrent"', '"own_recurrent"')  # beside a plugin's entry
    (folder / "mine_recurrent.py").write_text(named)
    sys.path.append(str(folder))
    known = dict(ARCHITECTURES)
    import mine_recurrent  # pyright: ignore[reportMissingImports]

    SMALL["own_recurrent"] = mine_recurrent.RecurrentConfig(vocab_size=64, embed_dim=16)
    yield mine_recurrent
    ARCHITECTURES.clear()
    ARCHITECTURES.update(known)
    sys.path.remove(str(folder))
    del sys.modules["mine_recurrent"]  # a worker may come back to this file


NAMES = dict.fromkeys((*ARCHITECTURES, "own_recurrent"))  # with those of --plugin


@pytest.fixture(params=NAMES)
def model(request) -> Architecture:
    made = ARCHITECTURES[request.param](small(request.param), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    noise = lambda leaf: (rng.normal(size=leaf.shape) / 4).astype(np.float32)  # noqa: E731
    nnx.update(made, jax.tree.map(noise, nnx.state(made, nnx.Param)))
    return made


def each_but(*elsewhere: str) -> pytest.MarkDecorator:
    """Every architecture; those that other files test only with `-m experiment`."""
    mark = pytest.mark.experiment
    names = [pytest.param(name, marks=[mark] * (name in elsewhere)) for name in NAMES]
    return pytest.mark.parametrize("model", names, indirect=True)


# What Thoughtbubbles promises alone: test_causality.py, test_cache.py and test_decoding.py.
@each_but("thoughtbubbles")
def test_logits_know_no_later_token_and_no_padding(model):
    assert_decoder_causal(model)
    tokens, length = np.arange(48, dtype=np.int32).reshape(4, 12), np.full(4, 7, np.int32)
    zero, unknown = (
        _decoder_logits(model, np.where(np.arange(12) < 7, tokens, padding), length)[:, :7]
        for padding in (np.int32(0), np.int32(64))
    )
    np.testing.assert_array_equal(zero, unknown)


@each_but("thoughtbubbles")
def test_cached_decoding_is_the_parallel_forward_pass(model):
    assert_decoder_cached_is_parallel(model)


def test_a_model_is_saved_and_read(model):
    config = model_from_json(json.loads(json.dumps(as_json(model.config))))
    assert config == model.config
    again = type(model).from_params(config, nnx.to_pure_dict(nnx.state(model)))
    assert nnx.graphdef(again) == nnx.graphdef(model)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


# "forking_hatchling": test_hatchling_forking.py.
@each_but("thoughtbubbles", "forking_hatchling")
def test_generation_with_a_cache_is_generation_without(model):
    prompts = [[1, 2, 3], [4]]
    cached = generate_ids(model, prompts, 6)
    assert cached == generate_ids(model, prompts, 6, cached=False)
    assert [len(text) for text in cached] == [6, 6]


def test_counts_are_those_of_the_model(model):
    held = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert model.config.num_params() == held
    assert 0 < model.config.forward_flops(8) < model.config.forward_flops(16)


# These: test_step.py, test_hatchling.py and test_hatchling_forking.py.
@each_but("thoughtbubbles", "hatchling", "forking_hatchling")
def test_steps_on_a_mesh_are_those_of_one_device_and_learn(model):
    optimizer = OptimizerConfig(learning_rate=5e-2, schedule="wsd", warmup=0)
    rows = np.tile(np.arange(9, dtype=np.int32), (4, 1))
    losses = {}
    for sizes in (MeshConfig(1, 1, 1), MeshConfig(1, 2, 2)):
        mesh = make_mesh(sizes, jax.devices()[: sizes.fsdp * sizes.tensor])
        trainable = make_trainable(model.config, optimizer, 8, mesh)
        state, step = trainable.init(), make_train_step(trainable)
        for _ in range(8):
            state, metrics = step(state, place(rows, mesh))
            losses.setdefault(sizes.tensor, []).append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-4)
    assert losses[1][-1] < 0.9 * losses[1][0], losses
    shown = trainable.architecture.step_metrics(trainable.config, jax.device_get(metrics["aux"]))
    assert all(np.isfinite(value).all() for value in shown.values())


def test_the_rows_of_a_cache_are_where_it_says(model):
    check_cache(model.backbone())


def test_a_config_outside_of_the_registry_is_named():
    @dataclasses.dataclass(frozen=True)
    class Stray(ArchitectureConfig):
        vocab_size: int = 8
        embed_dim: int = 4

    with pytest.raises(ValueError, match="Stray is the config of no architecture: .*--plugin"):
        architecture_name(Stray())
    with pytest.raises(ValueError, match="unknown architecture 'gone': choose one of thoughtb"):
        model_from_json({"architecture": "gone"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "mine", type("Mine", (ARCHITECTURES["hatchling"],), {}))
        with pytest.raises(ValueError, match="hatchling and mine share HatchlingConfig: give each"):
            architecture_name(SMALL["hatchling"])
    with pytest.raises(
        ValueError, match="unknown architecture 'gone': .*, or import the module that"
    ):
        from_text("gone", {"hatchling": HatchlingConfig}, "architecture")
    with pytest.raises(ValueError, match="names no architecture, an older version made it"):
        model_from_json({"vocab_size": 64})
    with pytest.raises(ValueError, match="architecture own_recurrent has no field 'depth'"):
        model_from_json({"architecture": "own_recurrent", "depth": 3})


def test_what_an_architecture_lacks_is_said_in_one_line(recurrent):
    config = SMALL["own_recurrent"]
    model = recurrent.Recurrent(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Recurrent has no bubbles: use generate"):
        generate_with_bubbles(model, [[1]], 2)
    with pytest.raises(ValueError, match="Recurrent has no fork layers"):
        model.with_policy(None)
    with pytest.raises(ValueError, match="Recurrent has no linear layers that take an adapter"):
        model.apply_lora({})
    halfway = type("Halfway", (recurrent.Recurrent,), {
        "lora_targets": {"mix": ((), 16, 32)}, "apply_lora": lambda self, adapter: self,
    })(config, rngs=nnx.Rngs(0))  # fmt: skip
    with pytest.raises(ValueError, match="Halfway takes adapters and can't merge them"):
        FinetunableModel(
            halfway, "lora", lora=LoRAConfig(targets=("mix",)), rngs=nnx.Rngs(0),
            memgen=MemGenConfig(WeaverConfig()), boundary=None,
        )  # fmt: skip
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with pytest.raises(ValueError, match="attention='splash': RecurrentConfig takes no kernel"):
        make_trainable(config, OptimizerConfig(), 1, mesh, attention="splash")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "config", "smaller", "targets"),
    [
        ("own_recurrent(embed_dim=16)", "RecurrentConfig", "own_recurrent(embed_dim=8)", ()),
        pytest.param(
            "hatchling(embed_dim=16, num_neurons=32, num_layers=2, num_heads=2)",
            "hatchling (released) of 32 neurons",
            "hatchling(embed_dim=8, num_neurons=32, num_layers=2, num_heads=2)",
            ("dx", "e"),
            marks=pytest.mark.experiment,  # its runs in CI: tests/test_hatchling_growth.py
        ),
    ],
    ids=["own_recurrent", "hatchling"],
)
def test_ordinary_commands_run_it(
    monkeypatch, capsys, tmp_path, recurrent, text, config, smaller, targets
):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(20):
        (texts / f"{index}.txt").write_text("the cat sat on the mat " * (40 + index))
    run = [
        *("tiny", "--plugin", "mine_recurrent", "--architecture", text),
        *("--data.corpus", "texts", "--data.cache-dir", "cache", "--data.seq-len", "16"),
        *("--batch-size", "8", "--log-every", "1", "--evaluation.rows", "4", "--out", "run"),
    ]
    assert run_here(monkeypatch, *run, "--steps", "2") == 0
    assert run_here(monkeypatch, *run, "--steps", "4") == 0  # resumes
    printed = capsys.readouterr()
    shown = printed.err
    assert "continuing run from step 2" in shown and config in shown
    assert "streams" not in shown
    assert "--plugin mine_recurrent" in printed.out and "--bubbles" not in printed.out
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert run_here(monkeypatch, *run, "--architecture", smaller, "--steps", "6") == 2
    mistake(capsys, "model.embed_dim: saved 16, now 8")

    words = ["--checkpoint", "run", "--prompt", "the ", "--max-new-tokens", "4"]
    assert (
        run_here(monkeypatch, *words, main=generate.main, config=GenerateConfig, presets=None) == 0
    )
    assert capsys.readouterr().out.startswith("the ")
    ratio = [*words, "--ratio", "1.5"]
    assert (
        run_here(monkeypatch, *ratio, main=generate.main, config=GenerateConfig, presets=None) == 2
    )
    mistake(capsys, "run is a plain decoder: it has no policy to change")
    scored = ["--checkpoint", "run", "--rows", "4"]
    assert (
        run_here(monkeypatch, *scored, main=evaluate.main, config=EvaluateConfig, presets=None) == 0
    )
    assert "bits/byte" in capsys.readouterr().out

    with open("chats.jsonl", "w") as file:
        for index in range(40):
            file.write(json.dumps({"prompt": f"{index} plus 0", "completion": f" {index}"}) + "\n")
    tuned = [
        *("--weights", "run", "--data.path", "chats.jsonl", "--data.seq-len", "24"),
        *("--batch-size", "4", "--steps", "2", "--out", "tuned", "--evaluation.rows", "2"),
    ]
    main = {"main": sft.main, "config": SFTConfig, "presets": None}
    named = ("--plugin", "mine_recurrent")
    assert run_here(monkeypatch, *tuned, "--train", "all", *named, **main) == 0
    assert load_model("tuned").model.config.embed_dim == 16
    command = "thoughtbubbles generate --checkpoint {} --prompt '...' --plugin mine_recurrent"
    assert capsys.readouterr().out.splitlines()[-1] == command.format("tuned")
    lora = [*tuned, "--train", "lora", "--out", "adapted", "--lora.targets"]
    if targets:
        assert run_here(monkeypatch, *lora, *targets, **main) == 0
        assert load_model("adapted").model.config.embed_dim == 16
    else:
        assert run_here(monkeypatch, *lora, "q", **main) == 2
        mistake(capsys, "Recurrent names no linear layers for adapters")
    learned = [
        *("--weights", "tuned", "--train", "all", "--task", "copy", "--steps", "1"),
        *("--batch-size", "2", "--num-generations", "2", "--max-new-tokens", "4", "--out", "rl"),
        *named,
    ]
    assert run_here(monkeypatch, *learned, main=rl_main, config=RLConfig, presets=None) == 0
    assert capsys.readouterr().out.splitlines()[-1] == command.format("rl")
    assert load_model("rl").model.config.embed_dim == 16


def test_advice_changes_only_what_a_config_has(recurrent):
    """Of how much is recomputed: what its own field offers."""
    configs = {"hatchling": {"none": {"none", "full"}}, "own_recurrent": {"none": {"none"}}}
    for name, by_start in configs.items():
        for start, known in by_start.items():
            model = SMALL[name]
            if name == "hatchling":
                model = dataclasses.replace(model, remat=start)  # pyright: ignore
            run = dataclasses.replace(presets()["tiny"], model=model)
            assert {changed.model.remat for _, changed in remedies(run, 8)} == known


@pytest.mark.parametrize(
    "path", sorted((ROOT / "train" / "engine").glob("*.py")), ids=lambda p: p.name
)
def test_the_engine_names_no_architecture(path):
    known = [*ARCHITECTURES.values()]
    forbidden = {cls.__name__ for entry in known for cls in (entry, entry.config_class)}
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {node.name for node in nodes if isinstance(node, ast.alias)}
    assert not names & forbidden
    assert "fork_layers" not in names


def test_an_entry_that_is_no_architecture_is_named(monkeypatch, recurrent):
    """Whatever a plugin forgets is one line before a run, with its way out."""
    Recurrent = recurrent.Recurrent

    class Bare(Architecture):
        config_class = recurrent.RecurrentConfig

        def __init__(self, config, *, rngs, constrain=None, attend=None): ...

        def embed_tokens(self, tokens): ...

        def run(self, tokens, length=None, *, key=None): ...

    class Narrow(Recurrent):
        def __init__(self, config, *, rngs): ...

    class Unattended(Recurrent):
        def __init__(self, config, *, rngs, constrain=None): ...

    for entry, message in (
        (Unattended, "Unattended.__init__: got an unexpected keyword argument 'attend': write de"),
        (Recurrent.config_class, "RecurrentConfig'> does not derive from thoughtbubbles.Arch"),
        (type("Mine", (Architecture,), {}), "Mine.config_class is None: set it to a dataclass"),
        (type("Mine", (Recurrent,), {"config_class": int}), "config_class is <class 'int'>: set"),
        (Narrow, "Narrow.__init__: got an unexpected keyword argument 'constrain': write def __in"),
        (Bare, "architecture mine: Bare has no unembed or logits of its own: write it; docs/arch"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(ARCHITECTURES, "mine", entry)
            with pytest.raises(ValueError, match=message):
                check_entries()

    class Renamed(Recurrent):
        def __init__(self, settings, **options): ...

    monkeypatch.setitem(ARCHITECTURES, "mine", Renamed)
    check_entries()

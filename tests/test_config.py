"""Run configs as text and JSON: policies above all, of which there are several kinds."""

import dataclasses
import json
import math
from typing import Any

import pytest

from thoughtbubbles import ModelConfig, PrefixRank, Threshold, TopK
from thoughtbubbles.positions import RopeScaling
from train.cli.command import parse
from train.cli.config_json import as_json, from_json, model_from_json, policy_from_text
from train.data import DataConfig
from train.engine.optim import OptimizerConfig
from train.finetuning.job import SFTConfig
from train.pretraining.config import RunConfig
from train.pretraining.presets import PRESETS
from train.rl.config import RLConfig
from train.runs.resume import FREE, differences


@pytest.mark.parametrize(
    "policy", [TopK(1.5), TopK(streams=300), PrefixRank(1.5, 64), Threshold(2.0, 1, False, -0.1)]
)
def test_a_policy_is_written_as_it_prints(policy):
    """On the command line and in config.json."""
    words = ["--model.policy", repr(policy), "--model.embed-dim", "64"]
    config = parse(RunConfig, words, PRESETS["tiny"])
    assert config.model.policy == policy and config.model.embed_dim == 64
    saved = json.loads(json.dumps(as_json(config)))
    assert model_from_json(saved["model"]) == config.model
    assert not differences(saved, config)


def test_rope_scaling_and_blocks_without_positions_are_options_and_json():
    scaling = '{"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 8192}'
    words = ["--model.rope-scaling", scaling, "--model.nope-layers", "1", "3"]
    config = parse(RunConfig, words, PRESETS["tiny"])
    assert config.model.rope_scaling == RopeScaling("llama3", 8, 8192)
    assert config.model.nope_layers == (1, 3)
    saved = json.loads(json.dumps(as_json(config)))
    assert model_from_json(saved["model"]) == config.model


def test_an_infinite_option_is_read_back():
    """A run with `--optimizer.clip inf` could be neither grown nor merged."""
    config = OptimizerConfig(clip=math.inf)
    written = json.loads(json.dumps(as_json(config)))
    assert from_json(OptimizerConfig, written, "optimizer") == config
    with pytest.raises(ValueError, match="optimizer: eps='inf' is not float"):
        from_json(OptimizerConfig, written | {"eps": "inf"}, "optimizer")


def test_a_run_folder_in_the_home_is_one_folder(monkeypatch):
    """The shell leaves `~` in `--out=~/run`; only some of a run's files were put into the home."""
    monkeypatch.setenv("HOME", "/home/her")
    assert parse(RunConfig, ["--out=~/run"], PRESETS["tiny"]).out == "/home/her/run"
    assert parse(RLConfig, ["--out=~/run", "--weights", "w"]).out == "/home/her/run"
    assert parse(SFTConfig, ["--out", "a~b"]).out == "a~b"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--model.scan-layers", "True"], "Unrecognized options: True (see --help)"),
        (["--model.scan-layer"], "--model.scan-layer (perhaps --model.scan-layers? see --help)"),
        (["--steps", "x"], "Error parsing --steps: invalid literal for int() with base 10: 'x'"),
        (["--attention", "flash"], "invalid choice 'flash' for argument '--attention'"),
        (["--model.rope-scaling", "{}"], "write none or JSON with rope_type, factor"),
        (["--peak-tflops", "0"], "peak_tflops=0.0 is not positive"),
        (["--profile", "20:10"], "profile='20:10': write the first and the last step"),
    ],
)
def test_a_mistaken_option_is_one_line(words, line):
    with pytest.raises(ValueError) as error:
        parse(RunConfig, words, PRESETS["tiny"])
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        *("", "PrefixRank(1.5)", "PrefixRank(window=6.5)", "PrefixRank(burst=True)", "TopK(**{})"),
        *("Threshold(gate=1)", "TopK(ratio=1, ratio=2)", "TopK(windw=1)", "__import__('os')"),
        *("TopK(ratio=os)", "TopK(", "[TopK]", "TopK(ratio='2')"),
    ],
)
def test_text_that_is_no_policy(text):
    choices = r"choose one of TopK|write (TopK|PrefixRank|Threshold)\(ratio="
    with pytest.raises(ValueError, match=choices):
        policy_from_text(text)


def test_divisors_of_the_largest_width_are_found_at_once():
    with pytest.raises(ValueError, match="choose a divisor such as 1 or 2147483647"):
        ModelConfig(64, 2**31 - 1, 1, 3, mlp_dim=8)
    with pytest.raises(ValueError, match="choose a divisor such as 4 or 6, "):
        ModelConfig(64, 36, 1, 5)
    with pytest.raises(ValueError, match="choose a divisor such as 6 or 9, "):
        ModelConfig(64, 36, 1, 7)


@dataclasses.dataclass(frozen=True)
class Later(RunConfig):
    """A run with options that came later."""

    rate: float = 1.0
    shown: int = dataclasses.field(default=3, metadata=FREE)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"rate": 2.0}, ["rate: saved 1.0, now 2.0"]),
        ({"seed": 1}, ["seed: saved 0, now 1"]),
        ({"shown": 4, "out": "elsewhere", "dry_run": True, "steps": 9, "accumulate": 2}, []),
        ({"data": DataConfig(seq_len=128, cache_dir="/elsewhere")}, []),
        ({"data": DataConfig(seq_len=8)}, ["data.seq_len: saved 128, now 8"]),
    ],
    ids=str,
)
def test_a_new_option_is_compared_unless_it_says_otherwise(changes, found):
    fields = {f.name: getattr(PRESETS["tiny"], f.name) for f in dataclasses.fields(RunConfig)}
    config = Later(**fields)
    now = dataclasses.replace(config, **changes)
    assert differences(as_json(config), now) == found
    del fields["data"]
    missing = {name: value for name, value in as_json(config).items() if name != "rate"}
    assert differences(missing, config) == ["rate: saved None, now 1.0"]


@pytest.mark.parametrize("name", ["tiny", "tiny_plain", "hatchling_tiny"])
def test_how_a_model_is_computed_may_change(name):
    """Of every architecture, and nothing else of it."""
    run = PRESETS[name]
    saved = as_json(run)
    values: dict[str, Any] = {"scan_layers": True, "remat": "none", "chunk": 4}
    changes = {field: values[field] for field in run.model.execution_fields}
    now = dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))
    assert now.model != run.model and not differences(saved, now)
    other = dataclasses.replace(now, model=dataclasses.replace(now.model, embed_dim=96))
    assert [line.partition(":")[0] for line in differences(saved, other)] == ["model.embed_dim"]


def test_every_option_says_whether_it_may_change():
    """What may change is listed here too, so that nobody frees a field in passing."""
    free = {
        "distributed", "evaluation", "out", "log_every", "save_every", "keep", "keep_every",
        "profile", "peak_tflops", "dry_run", "plugin", "prompt", "max_rows", "examples",
        "environment_limit_s", "battery",
    }  # fmt: skip
    noted = {"mesh", "steps", "accumulate", "attention", "share_prompts"}
    for config in (RunConfig, SFTConfig, RLConfig):
        rules = {f.name: f.metadata.get("resume") for f in dataclasses.fields(config)}
        assert {name for name, rule in rules.items() if rule == "free"} <= free
        assert {name for name, rule in rules.items() if rule == "noted"} == noted & rules.keys()
        assert all(rules[name] == "free" for name in free & rules.keys())

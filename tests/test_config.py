"""Run configs as text and JSON: policies above all, of which there are several kinds."""

import json

import pytest

from thoughtbubbles import PrefixRank, Threshold, TopK
from thoughtbubbles.positions import RopeScaling
from train.cli.command import parse
from train.cli.config_json import as_json, model_from_json, policy_from_text
from train.pretraining.config import RunConfig
from train.pretraining.presets import PRESETS
from train.runs.resume import differences


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
    assert not differences(saved, as_json(config))


def test_rope_scaling_and_blocks_without_positions_are_options_and_json():
    scaling = '{"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 8192}'
    words = ["--model.rope-scaling", scaling, "--model.nope-layers", "1", "3"]
    config = parse(RunConfig, words, PRESETS["tiny"])
    assert config.model.rope_scaling == RopeScaling("llama3", 8, 8192)
    assert config.model.nope_layers == (1, 3)
    saved = json.loads(json.dumps(as_json(config)))
    assert model_from_json(saved["model"]) == config.model
    for name in ("rope_scaling", "nope_layers", "context_length"):
        del saved["model"][name]
    assert model_from_json(saved["model"]).nope_layers == ()  # from before there were any


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
    with pytest.raises(ValueError, match="choose one of TopK"):
        policy_from_text(text)


def test_configs_from_before_there_were_policies():
    """Their fields stand without a name, and fields that came later are missing."""
    old = as_json(PRESETS["tiny_topk"])
    old["model"]["policy"] = {"ratio": 1.5, "streams": None}
    del old["model"]["score_originals"]
    assert model_from_json(old["model"]).policy == TopK(1.5)
    now = as_json(PRESETS["tiny_topk"])
    assert differences(old, now)[0].startswith("model.policy: saved 'TopK(ratio=1.5")
    old["model"]["policy"]["ratio"] = 2
    assert not differences(old, now)

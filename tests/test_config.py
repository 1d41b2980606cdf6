"""Run configs as text and JSON: policies above all, of which there are several kinds."""

import json

import pytest

from thoughtbubbles import PrefixRank, Threshold, TopK
from train.command import parse
from train.config import RunConfig, as_json, differences, model_from_json, policy_from_text
from train.presets import PRESETS


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

"""Types that a user's checker sees: `tests/downstream`, which `pyright` checks, names them all."""

import ast
import dataclasses
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import memgen
import thoughtbubbles
from thoughtbubbles import ModelConfig, Streams, merge
from thoughtbubbles.config import ModelConfigChanges
from thoughtbubbles.hatchling.config import HatchlingConfig, HatchlingConfigChanges
from thoughtbubbles.hatchling.forking import (
    ForkingHatchlingConfig,
    ForkingHatchlingConfigChanges,
)
from thoughtbubbles.streams import StreamsChanges

DOWNSTREAM = Path(__file__).parent / "downstream/every_name.py"


def test_the_file_of_a_user_names_everything_public():
    named = {
        (node.value.id, node.attr)
        for node in ast.walk(ast.parse(DOWNSTREAM.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    for short, package in (("tb", thoughtbubbles), ("memgen", memgen)):
        assert [name for name in package.__all__ if (short, name) not in named] == []


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        (ModelConfigChanges, ModelConfig),
        (HatchlingConfigChanges, HatchlingConfig),
        (ForkingHatchlingConfigChanges, ForkingHatchlingConfig),
        (StreamsChanges, Streams),
    ],
)
def test_keyword_arguments_are_the_fields(changes: type, kind: type):
    hints = typing.get_type_hints(kind)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    assert typing.get_type_hints(changes) == fields
    assert changes.__total__ is False


def test_a_misspelt_field_is_one_line_that_names_the_nearest():
    streams = jax.eval_shape(Streams.start, jnp.zeros((1, 2, 4)))
    for call in (
        lambda: ModelConfig.preset("tiny", polcy=None),
        lambda: HatchlingConfig.preset("tiny", num_neuron=8),
        lambda: streams.replace(log_scores=None),
    ):
        with pytest.raises(TypeError, match=r"^\w+ has no field '\w+': did you mean '\w+'\?$"):
            call()
    with pytest.raises(TypeError, match="did you mean 'policy'"):
        ModelConfig.preset("tiny", polcy=None)


def test_a_merge_of_predictions_is_refused_before_the_first_fork_too():
    for forked in (False, True):
        streams = jax.eval_shape(Streams.start, jnp.zeros((1, 2, 4))).replace(forked=forked)
        with pytest.raises(ValueError, match="merge='probability' has no residual: use 'residual'"):
            jax.eval_shape(lambda streams: merge(streams, "probability"), streams)


def test_a_preset_of_a_config_that_forks_forks():
    config = ForkingHatchlingConfig.preset("tiny", fork_layers=(2,), num_layers=3)
    assert type(config) is ForkingHatchlingConfig
    assert config.fork_layers == (2,) and config.num_layers == 3
    assert config.num_neurons == HatchlingConfig.preset("tiny").num_neurons

"""Mapping between a model's parameters and the tensors of a safetensors or GGUF file."""

import math
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from thoughtbubbles.architecture import architecture_of
from thoughtbubbles.config import ModelConfig
from thoughtbubbles.module import abstract_module

# From our parameter names to Hugging Face's. Names in BLOCK follow `model.layers.N.` there.
TOP = {
    "embed": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "final_norm/bias": "model.norm.bias",
    "head": "lm_head.weight",
}
BLOCK = {
    "blocks/attention_norm/scale": "input_layernorm.weight",
    "blocks/attention_norm/bias": "input_layernorm.bias",
    "blocks/attention/q": "self_attn.q_proj.weight",
    "blocks/attention/k": "self_attn.k_proj.weight",
    "blocks/attention/v": "self_attn.v_proj.weight",
    "blocks/attention/o": "self_attn.o_proj.weight",
    "blocks/attention/q_bias": "self_attn.q_proj.bias",
    "blocks/attention/k_bias": "self_attn.k_proj.bias",
    "blocks/attention/v_bias": "self_attn.v_proj.bias",
    "blocks/attention/o_bias": "self_attn.o_proj.bias",
    "blocks/attention/q_norm/scale": "self_attn.q_norm.weight",
    "blocks/attention/k_norm/scale": "self_attn.k_norm.weight",
    "blocks/mlp_norm/scale": "post_attention_layernorm.weight",
    "blocks/mlp_norm/bias": "post_attention_layernorm.bias",
    "blocks/mlp/gate": "mlp.gate_proj.weight",
    "blocks/mlp/up": "mlp.up_proj.weight",
    "blocks/mlp/down": "mlp.down_proj.weight",
    "blocks/mlp/gate_bias": "mlp.gate_proj.bias",
    "blocks/mlp/up_bias": "mlp.up_proj.bias",
    "blocks/mlp/down_bias": "mlp.down_proj.bias",
}
# Names of an MLP without a gate, as in Starcoder2.
GELU = {
    "blocks/mlp/up": "mlp.c_fc.weight",
    "blocks/mlp/up_bias": "mlp.c_fc.bias",
    "blocks/mlp/down": "mlp.c_proj.weight",
    "blocks/mlp/down_bias": "mlp.c_proj.bias",
}


class StoredParameter(NamedTuple):
    """A model parameter and the tensors of a file that hold its values.

    Attributes:
        names: Names of the tensors: one tensor for each block if `stacked`, else a single tensor.
        shape: Shape of one tensor's part of the parameter, with the axes in the model's order.
        stored_shape: Shape of one tensor in the file.
        transposed: Whether the contracted axes come first in the model and last in the file.
        stacked: Whether the parameter stacks its tensors along a leading axis.
        path: Keys of the parameter in the nested dict of all parameters.
    """

    names: list[str]
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    transposed: bool
    stacked: bool
    path: tuple[Any, ...]

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return (len(self.names), *self.shape) if self.stacked else self.shape

    def from_stored(self, tensor: np.ndarray) -> np.ndarray:
        return (tensor.T if self.transposed else tensor).reshape(self.shape)

    def to_stored(self, tensor: np.ndarray) -> np.ndarray:
        if not self.transposed:
            return tensor.reshape(self.stored_shape)
        return tensor.reshape(self.stored_shape[::-1]).T


def abstract_state(config: Any) -> nnx.State:
    """Return a model's state, with shapes and dtypes instead of arrays, from its config."""
    kind = architecture_of(config)
    return nnx.state(abstract_module(lambda: kind(config, rngs=nnx.Rngs(0))))


def own_parameters(state: nnx.State) -> dict[str, StoredParameter]:
    """Describe how the own format stores parameters: one tensor each, of the same name and shape.

    Args:
        state: Abstract state of the model (`abstract_state`).

    Returns:
        Mapping from parameter name, such as "blocks/attention/q", to its `StoredParameter`.
    """
    found = {}
    for path, variable in nnx.to_flat_state(state):
        name, shape = "/".join(map(str, path)), tuple(variable.shape)
        found[name] = StoredParameter([name], shape, shape, False, False, path)
    return found


def family_parameters(config: ModelConfig, state: nnx.State) -> dict[str, StoredParameter]:
    """Describe how Hugging Face families store parameters, with their tensor names and shapes.

    Args:
        config: Config of a decoder that a Hugging Face family can express.
        state: Abstract state of the model (`abstract_state`).

    Returns:
        Mapping from parameter name, such as "blocks/attention/q", to its `StoredParameter`.
    """
    found = {}
    block = BLOCK | (GELU if config.mlp == "gelu" else {})
    for path, variable in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        if name in block:
            names = [f"model.layers.{index}.{block[name]}" for index in range(config.num_layers)]
            shape = tuple(variable.shape[1:])
        else:
            names, shape = [TOP[name]], tuple(variable.shape)
        # Number of contracted axes; 0 for the embedding, a lookup table with the same axes in both.
        inputs = 0 if name == "embed" else variable.get_metadata()["inputs"]
        if name == "embed":
            stored_shape = shape
        elif inputs:
            stored_shape = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
        else:
            stored_shape = (math.prod(shape),)
        found[name] = StoredParameter(names, shape, stored_shape, bool(inputs), name in block, path)
    return found

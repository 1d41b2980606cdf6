"""Pretrained decoders: Llama, SmolLM2, Qwen2, Qwen3 and SmolLM3 weights in, and out again.

Weights come from a Hugging Face folder (config.json, safetensors, tokenizer.json) or a GGUF file.
Nothing is unpickled and no code of a checkpoint is run.
"""

import dataclasses
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx, traverse_util

from thoughtbubbles.config import ModelConfig
from thoughtbubbles.families import config_from_json, config_to_json
from thoughtbubbles.fields import read_json
from thoughtbubbles.gguf_files import GGUFFile
from thoughtbubbles.model import Thoughtbubbles
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from thoughtbubbles.safetensors_files import SINGLE, SafetensorsFiles, write_safetensors

# Our names of parameters to Hugging Face's; those of a block follow `model.layers.N.` there.
TOP = {
    "embed": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head": "lm_head.weight",
}
BLOCK = {
    "blocks/attention_norm/scale": "input_layernorm.weight",
    "blocks/attention/q": "self_attn.q_proj.weight",
    "blocks/attention/k": "self_attn.k_proj.weight",
    "blocks/attention/v": "self_attn.v_proj.weight",
    "blocks/attention/o": "self_attn.o_proj.weight",
    "blocks/attention/q_bias": "self_attn.q_proj.bias",
    "blocks/attention/k_bias": "self_attn.k_proj.bias",
    "blocks/attention/v_bias": "self_attn.v_proj.bias",
    "blocks/attention/q_norm/scale": "self_attn.q_norm.weight",
    "blocks/attention/k_norm/scale": "self_attn.k_norm.weight",
    "blocks/mlp_norm/scale": "post_attention_layernorm.weight",
    "blocks/mlp/gate": "mlp.gate_proj.weight",
    "blocks/mlp/up": "mlp.up_proj.weight",
    "blocks/mlp/down": "mlp.down_proj.weight",
}


class Pretrained(NamedTuple):
    """A pretrained decoder.

    Attributes:
        config: Sizes and options of the decoder.
        params: Nested dict of arrays, for `Thoughtbubbles.from_params(config, params)`.
        tokenizer: Tokenizer that the decoder was trained with.
    """

    config: ModelConfig
    params: dict[Any, Any]
    tokenizer: PretrainedTokenizer


class _Source(Protocol):
    """Tensors under Hugging Face's names."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> np.ndarray: ...


class _Parameter(NamedTuple):
    """A parameter of our model and the stored tensors that it consists of.

    Attributes:
        names: Names of the tensors; one for each block if `stacked`, else a single one.
        shape: Shape of one tensor in our order of axes.
        stored_shape: Shape of one tensor in the file.
        transposed: Whether the contracted axes come first in our order and last in the file.
        stacked: Whether the tensors lie along a leading axis of the parameter.
    """

    names: list[str]
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    transposed: bool
    stacked: bool

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return (len(self.names), *self.shape) if self.stacked else self.shape

    def from_stored(self, tensor: np.ndarray) -> np.ndarray:
        return (tensor.T if self.transposed else tensor).reshape(self.shape)

    def to_stored(self, tensor: np.ndarray) -> np.ndarray:
        if not self.transposed:
            return tensor.reshape(self.stored_shape)
        return tensor.reshape(self.stored_shape[::-1]).T


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    shardings: Callable[[Any], Any] | None = None,
) -> Pretrained:
    """Load a Hugging Face folder or a GGUF file.

    Everything is checked before the first weight is read. Tensors are read and cast one at a time,
    so that the host holds one parameter (of all blocks) besides what its devices hold. Each process
    reads all tensors and keeps the parts that its devices hold.

    Args:
        path: Folder, or file ending in `.gguf`.
        dtype: Dtype of the parameters and of the computation.
        shardings: Function from an abstract `nnx.State` of the model to the sharding of each leaf,
            such as `train.devices.mesh.state_shardings`; None puts all parameters on the first
            device of the process.

    Returns:
        The decoder with its config and tokenizer.

    Raises:
        ValueError: The family or an option of it is unknown, a file is missing or damaged, a tensor
            is missing, unknown or of another shape, or the tokenizer has more ids than the
            embedding has rows.
    """
    path = Path(path).expanduser()
    source, config, tokenizer = open_pretrained(path)
    config = dataclasses.replace(config, dtype=dtype)
    state = _abstract_state(config)
    parameters = _parameters(config, state)
    _check(path, source, parameters, config)
    sharding = _sharding_by_name(state, shardings)
    params = {
        name: _read(source, parameter, np.dtype(dtype), sharding[name])
        for name, parameter in parameters.items()
    }
    return Pretrained(config, traverse_util.unflatten_dict(params, sep="/"), tokenizer)


def save_pretrained(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Mapping[Any, Any],
    tokenizer: PretrainedTokenizer,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> None:
    """Write a folder that stock `transformers` loads: config.json, safetensors, tokenizer.json.

    The folder gets its name only when it is complete. The host holds one tensor at a time.

    Args:
        path: New folder; an empty one may exist.
        config: Config of a decoder without forks that one of the families can express.
        params: Nested dict of arrays, as `load_pretrained` returns it, or `nnx.to_pure_dict` of a
            model's state; all parts of the arrays must be on this process's devices.
        tokenizer: Tokenizer of the decoder.
        dtype: Dtype of the stored tensors; None keeps that of the embedding.

    Raises:
        ValueError: No family computes what the config computes, the parameters belong to another
            config, or the folder exists and is not empty.
        OSError: The folder can't be written; no part of it remains.
    """
    path = Path(path).expanduser()
    given = _by_name(params)
    stored = np.dtype(dtype) if dtype else given["embed"].dtype
    fields = config_to_json(config, str(stored))
    parameters = _parameters(config, _abstract_state(config))
    for name in {**parameters, **given}:
        expected = parameters[name].whole_shape if name in parameters else "none"
        found = given[name].shape if name in given else "missing"
        if expected != found:
            raise ValueError(
                f"parameter {name}: given {found}, config asks for {expected}: "
                "use the config that the parameters were made with"
            )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is there already: pass another folder, or delete it first")
    sources = {
        name: (parameter, given[key], index if parameter.stacked else None)
        for key, parameter in parameters.items()
        for index, name in enumerate(parameter.names)
    }
    shapes = {name: parameter.stored_shape for name, (parameter, _, _) in sorted(sources.items())}

    def tensor(name: str) -> np.ndarray:
        parameter, array, index = sources[name]
        return parameter.to_stored(np.asarray(array if index is None else array[index]))

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        write_safetensors(unfinished / SINGLE, shapes, stored, tensor)
        for name, text in _texts(fields, tokenizer).items():
            (unfinished / name).write_text(text, encoding="utf-8")
        unfinished.chmod(0o755)  # a temporary folder is private
        unfinished.rename(path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path} could not be written: {reason}; nothing is left of it") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def open_pretrained(path: Path) -> tuple[_Source, ModelConfig, PretrainedTokenizer]:
    """The tensors, the config and the tokenizer of a folder or file.

    No tensor is read yet but a head that stands beside an embedding which the config ties it to.
    """
    if path.is_file() and path.suffix == ".gguf":
        file = GGUFFile(path)
        config = config_from_json(file.fields, str(path))
        _check_sizes(path, file, config)
        config = _untied(path, file, config)
        return file, config, file.tokenizer(config.vocab_size)
    if not path.is_dir():
        raise ValueError(f"{path} is no folder and no .gguf file: pass a model that is on disk")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: pass a Hugging Face folder or a .gguf file")
    fields = read_json(path / "config.json")
    config = config_from_json(fields, str(path / "config.json"))
    files = SafetensorsFiles(path)
    _check_sizes(path / "config.json", files, config)
    config = _untied(path, files, config)
    return files, config, PretrainedTokenizer.from_folder(path, fields, config.vocab_size)


def _untied(path: Path, source: _Source, config: ModelConfig) -> ModelConfig:
    """The config without a tied head where the file has another one, as `transformers` does."""
    embed, head = TOP["embed"], TOP["head"]
    if not config.tied_head or not {embed, head} <= source.shapes.keys():
        return config
    if np.array_equal(source.read(embed), source.read(head)):
        return config
    warnings.warn(
        f"{path}: {head} differs from {embed}, to which the config ties it: the head of the file "
        "is used; set tie_word_embeddings to false",
        stacklevel=3,
    )
    return dataclasses.replace(config, tied_head=False)


def _abstract_state(config: ModelConfig) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: Thoughtbubbles(config, rngs=nnx.Rngs(0))))


def _parameters(config: ModelConfig, state: nnx.State) -> dict[str, _Parameter]:
    """The model's parameters by our names."""
    found = {}
    for path, variable in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        if name in BLOCK:
            names = [f"model.layers.{index}.{BLOCK[name]}" for index in range(config.num_layers)]
            shape = tuple(variable.shape[1:])
        else:
            names, shape = [TOP[name]], tuple(variable.shape)
        # Contracted axes; none of the embedding, which is a lookup table and stored as ours.
        inputs = 0 if name == "embed" else variable.get_metadata()["inputs"]
        if name == "embed":
            stored_shape = shape
        elif inputs:
            stored_shape = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
        else:
            stored_shape = (math.prod(shape),)
        found[name] = _Parameter(names, shape, stored_shape, bool(inputs), name in BLOCK)
    return found


def _check_sizes(path: Path, source: _Source, config: ModelConfig) -> None:
    """Raise a ValueError for sizes that no tensor can have, before any shape is made of them."""
    stored = sum(math.prod(shape) for shape in source.shapes.values())
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_width,
        "num_attention_heads * head_dim": config.num_heads * config.head_width,
    }
    for name, size in sizes.items():
        if size > stored:
            raise ValueError(f"{path}: {name}={size}, but its tensors have {stored} elements")
    if config.num_layers > len(source.shapes):
        raise ValueError(
            f"{path}: num_hidden_layers={config.num_layers}, but it has {len(source.shapes)} "
            "tensors: put the config.json of these weights there"
        )


def _check(
    path: Path, source: _Source, parameters: dict[str, _Parameter], config: ModelConfig
) -> None:
    """Raise a ValueError unless the tensors are those of the config."""
    expected = {
        name: parameter.stored_shape
        for parameter in parameters.values()
        for name in parameter.names
    }
    for name, shape in expected.items():
        if name not in source.shapes:
            raise ValueError(f"{path} has no tensor {name}, which its config asks for")
        if source.shapes[name] != shape:
            raise ValueError(
                f"{path}: {name} has shape {source.shapes[name]}, its config asks for {shape}"
            )
    for name in source.shapes:
        repeated = config.tied_head and name == TOP["head"]
        buffer = name.endswith("rotary_emb.inv_freq")  # old files hold these, computed from config
        if name not in expected and not repeated and not buffer:
            raise ValueError(f"{path} has a tensor {name}, which its config does not have")


def _sharding_by_name(state: nnx.State, shardings: Callable[[Any], Any] | None) -> dict[str, Any]:
    if shardings is None:
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return {name: first for name in _by_name(nnx.to_pure_dict(state))}
    return _by_name(nnx.to_pure_dict(shardings(state)))


def _read(source: _Source, parameter: _Parameter, dtype: np.dtype, sharding: Any) -> jax.Array:
    """A parameter on the devices of its sharding; each tensor is read once."""
    shape = parameter.whole_shape
    local = sharding.addressable_devices_indices_map(shape)
    spans = {device: _spans(index, shape) for device, index in local.items()}
    parts = {
        span: np.empty([last - first for first, last in span], dtype)
        for span in set(spans.values())
    }
    for row, name in enumerate(parameter.names):
        tensor = parameter.from_stored(source.read(name))
        for span, part in parts.items():
            rows, axes = (span[0], span[1:]) if parameter.stacked else ((0, 1), span)
            if rows[0] <= row < rows[1]:
                target = part[row - rows[0]] if parameter.stacked else part
                target[...] = tensor[tuple(slice(*axis) for axis in axes)]
    arrays = [jax.device_put(parts[span], device) for device, span in spans.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _spans(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))


def _texts(fields: dict[str, Any], tokenizer: PretrainedTokenizer) -> dict[str, str]:
    """The contents of a folder's text files, by name."""
    bos_id = None if tokenizer.bos is None else tokenizer.id(tokenizer.bos)
    # All of them, since a family's defaults may lie outside the vocabulary.
    ids = {"bos_token_id": bos_id, "eos_token_id": list(tokenizer.stop_ids), "pad_token_id": None}
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": tokenizer.bos,
        "eos_token": tokenizer.eos,
        "chat_template": tokenizer.chat_template,
    }
    files = {
        "config.json": fields | ids,
        "generation_config.json": ids,
        "tokenizer_config.json": {key: value for key, value in names.items() if value is not None},
    }
    found = {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}
    return found | {"tokenizer.json": tokenizer.to_json()}


def _by_name(params: Mapping[Any, Any]) -> dict[str, Any]:
    flat = jax.tree_util.tree_leaves_with_path(dict(params))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}

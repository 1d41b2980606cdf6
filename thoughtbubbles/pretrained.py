"""Pretrained decoders: Llama, SmolLM2, Qwen2, Qwen3 and SmolLM3 weights in, and out again.

Weights come from a Hugging Face folder (config.json, safetensors, tokenizer.json) or a GGUF file.
Nothing is unpickled and no code of a checkpoint is run.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx, traverse_util

from thoughtbubbles.config import ModelConfig
from thoughtbubbles.families import config_from_json, config_to_json
from thoughtbubbles.gguf_files import GGUFFile
from thoughtbubbles.model import Thoughtbubbles
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from thoughtbubbles.safetensors_files import (
    SINGLE,
    SafetensorsFiles,
    read_json,
    write_safetensors,
)

# Our names of parameters to Hugging Face's; those of blocks stand in `model.layers.N`.
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
    """A decoder as `load_pretrained` found it.

    Attributes:
        config: sizes and options.
        params: nested dict of arrays, for `Thoughtbubbles.from_params(config, params)`.
        tokenizer: the one that it was trained with.
    """

    config: ModelConfig
    params: dict[Any, Any]
    tokenizer: PretrainedTokenizer


class _Source(Protocol):
    """Tensors under Hugging Face's names."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> np.ndarray: ...


class _Leaf(NamedTuple):
    """A parameter of ours and the tensors that it is made of.

    Attributes:
        names: of the tensors; one for each block if `stacked`, else a single one.
        shape: of one tensor in our order.
        stored: of one tensor in theirs.
        transposed: whether ours has the contracted axes first and theirs last.
        stacked: whether the tensors lie along a leading axis of ours.
    """

    names: list[str]
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    transposed: bool
    stacked: bool

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        return (tensor.T if self.transposed else tensor).reshape(self.shape)

    def theirs(self, tensor: np.ndarray) -> np.ndarray:
        if not self.transposed:
            return tensor.reshape(self.stored)
        return tensor.reshape(self.stored[::-1]).T


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    shardings: Callable[[Any], Any] | None = None,
) -> Pretrained:
    """Read a Hugging Face folder or a GGUF file.

    Everything is checked before the first weight is read. Weights are read one tensor at a time,
    cast, and put into their place in the stacked parameter; host memory holds one parameter (all
    blocks of it) beside what is already on the devices. Each process reads all tensors and keeps
    the parts that its devices hold.

    Args:
        path: folder, or file ending in `.gguf`.
        dtype: of the parameters and of the computation.
        shardings: gives the sharding of every leaf of an abstract `nnx.State` of the model, as
            `train.devices.mesh.state_shardings` does; None puts all on the first device of the
            process.

    Raises:
        ValueError: one line; an unknown family or option of one, a missing or damaged file, a
            tensor too many, too few or of another shape, a tokenizer with more ids than the
            embedding has rows.
    """
    path = Path(path).expanduser()
    source, config, tokenizer = open_pretrained(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the embedding "
            f"{config.vocab_size} rows: they belong to different models"
        )
    config = dataclasses.replace(config, dtype=dtype)
    state = _abstract_state(config)
    leaves = _leaves(config, state)
    _check(path, source, leaves, config)
    places = _places(state, shardings)
    params = {
        name: _read(source, leaf, np.dtype(dtype), places[name]) for name, leaf in leaves.items()
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

    The folder gets its name only when it is complete. One tensor at a time is on the host.

    Args:
        path: the new folder; it must not exist, or be empty.
        config: of a decoder without forks that one of the families can express.
        params: nested dict of arrays, as `load_pretrained` gave it, or `nnx.to_pure_dict` of a
            model's state; all their parts must be on this process's devices.
        tokenizer: to be written beside it.
        dtype: of the file; None keeps that of the embedding.

    Raises:
        ValueError: no family computes what this config does, the parameters are of another config,
            or the folder is there already.
        OSError: it can't be written; nothing is left of it.
    """
    path = Path(path).expanduser()
    given = _by_name(params)
    stored = np.dtype(dtype) if dtype else given["embed"].dtype
    fields = config_to_json(config, str(stored))
    leaves = _leaves(config, _abstract_state(config))
    for name in {**leaves, **given}:
        wanted = _whole_shape(leaves[name]) if name in leaves else "none"
        there = given[name].shape if name in given else "missing"
        if wanted != there:
            raise ValueError(
                f"parameter {name}: given {there}, config asks for {wanted}: "
                "use the config that the parameters were made with"
            )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is there already: pass another folder, or delete it first")
    sources = {
        name: (leaf, given[key], index if leaf.stacked else None)
        for key, leaf in leaves.items()
        for index, name in enumerate(leaf.names)
    }
    shapes = {name: leaf.stored for name, (leaf, _, _) in sorted(sources.items())}

    def read(name: str) -> np.ndarray:
        leaf, array, index = sources[name]
        return leaf.theirs(np.asarray(array if index is None else array[index]))

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        write_safetensors(unfinished / SINGLE, shapes, stored, read)
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
    if path.is_file() and path.suffix == ".gguf":
        file = GGUFFile(path)
        return file, config_from_json(file.fields, str(path)), file.tokenizer()
    if not path.is_dir():
        raise ValueError(f"{path} is no folder and no .gguf file: pass a model that is on disk")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: pass a Hugging Face folder or a .gguf file")
    fields = read_json(path / "config.json")
    config = config_from_json(fields, str(path / "config.json"))
    return SafetensorsFiles(path), config, PretrainedTokenizer.from_folder(path, fields)


def _abstract_state(config: ModelConfig) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: Thoughtbubbles(config, rngs=nnx.Rngs(0))))


def _leaves(config: ModelConfig, state: nnx.State) -> dict[str, _Leaf]:
    """By our name."""
    leaves = {}
    for path, variable in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        stacked = name in BLOCK
        shape = tuple(variable.shape)[stacked:]
        inputs = 0 if name == "embed" else variable.get_metadata()["inputs"]
        size = lambda axes: int(np.prod(axes))  # noqa: E731
        stored = (size(shape[inputs:]), size(shape[:inputs])) if inputs else (size(shape),)
        if name == "embed":  # a table to look up, the other way round than a kernel
            stored = shape
        names = [TOP[name]] if not stacked else []
        if stacked:
            names = [f"model.layers.{i}.{BLOCK[name]}" for i in range(config.num_layers)]
        leaves[name] = _Leaf(names, shape, stored, bool(inputs), stacked)
    return leaves


def _whole_shape(leaf: _Leaf) -> tuple[int, ...]:
    return (len(leaf.names), *leaf.shape) if leaf.stacked else leaf.shape


def _check(path: Path, source: _Source, leaves: dict[str, _Leaf], config: ModelConfig) -> None:
    """Raise unless the tensors are those that the config asks for."""
    wanted = {name: leaf.stored for leaf in leaves.values() for name in leaf.names}
    for name, shape in wanted.items():
        if name not in source.shapes:
            raise ValueError(f"{path} has no tensor {name}, which its config asks for")
        if source.shapes[name] != shape:
            raise ValueError(
                f"{path}: {name} has shape {source.shapes[name]}, its config asks for {shape}"
            )
    for name in source.shapes:
        repeated = config.tied_head and name == TOP["head"]
        buffer = name.endswith("rotary_emb.inv_freq")  # old files hold these, computed from config
        if name not in wanted and not repeated and not buffer:
            raise ValueError(f"{path} has a tensor {name}, which its config knows nothing of")


def _places(state: nnx.State, shardings: Callable[[Any], Any] | None) -> dict[str, Any]:
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return {name: here for name in _by_name(nnx.to_pure_dict(state))}
    return _by_name(nnx.to_pure_dict(shardings(state)))


def _read(source: _Source, leaf: _Leaf, dtype: np.dtype, sharding: Any) -> jax.Array:
    """A parameter, each tensor read once, on the devices that the sharding names."""
    shape = _whole_shape(leaf)
    held = sharding.addressable_devices_indices_map(shape)
    spans = {device: _spans(index, shape) for device, index in held.items()}
    parts = {
        span: np.empty([last - first for first, last in span], dtype)
        for span in set(spans.values())
    }
    for row, name in enumerate(leaf.names):
        tensor = leaf.ours(source.read(name))
        for span, part in parts.items():
            rows, axes = (span[0], span[1:]) if leaf.stacked else ((0, 1), span)
            if rows[0] <= row < rows[1]:
                target = part[row - rows[0]] if leaf.stacked else part
                target[...] = tensor[tuple(slice(*axis) for axis in axes)]
    arrays = [jax.device_put(parts[span], device) for device, span in spans.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _spans(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))


def _texts(fields: dict[str, Any], tokenizer: PretrainedTokenizer) -> dict[str, str]:
    """The small files of a folder."""
    begin = None if tokenizer.bos is None else tokenizer.id(tokenizer.bos)
    # All of them, since a family's defaults may lie outside the vocabulary.
    ids = {"bos_token_id": begin, "eos_token_id": list(tokenizer.stop_ids), "pad_token_id": None}
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": tokenizer.bos,
        "eos_token": tokenizer.eos,
        "chat_template": tokenizer.chat_template,
    }
    files = {
        "config.json": fields | ids,
        "generation_config.json": ids,
        "tokenizer_config.json": {name: word for name, word in words.items() if word is not None},
    }
    found = {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}
    return found | {"tokenizer.json": tokenizer.to_json()}


def _by_name(params: Mapping[Any, Any]) -> dict[str, Any]:
    flat = jax.tree_util.tree_leaves_with_path(dict(params))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}

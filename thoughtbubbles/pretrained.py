"""Load and save pretrained decoders: Llama, SmolLM, Qwen2, Qwen3 and Starcoder2.

A decoder is loaded from a Hugging Face folder (config.json, safetensors, tokenizer.json), a folder
in the library's own format (`thoughtbubbles.own_form`), or a GGUF file (not for Starcoder2).
Nothing is unpickled, and no code in a checkpoint is run.
"""

import dataclasses
import json
import math
import os
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
from thoughtbubbles.own_form import check_sizes, is_own, own_from_json, own_to_json
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from thoughtbubbles.safetensors_files import (
    SINGLE,
    SafetensorsFiles,
    check_new_folder,
    new_folder,
    some,
    write_safetensors,
)
from thoughtbubbles.stored_parameters import (
    TOP,
    StoredParameter,
    abstract_state,
    family_parameters,
    own_parameters,
)

_STORED = ("float32", "bfloat16", "float16", "float64")
_UNDERFLOW = 0.01  # share of a tensor's nonzero values that may become 0 in another dtype


class Pretrained(NamedTuple):
    """A pretrained decoder.

    Attributes:
        config: Sizes and options of the decoder: a `ModelConfig`, or the config of any architecture
            if the folder has the library's own format.
        params: Nested dict of arrays, for `architecture_of(config).from_params(config, params)`.
        tokenizer: Tokenizer that the decoder was trained with.
    """

    config: Any
    params: dict[Any, Any]
    tokenizer: PretrainedTokenizer


class _Source(Protocol):
    """Tensors of a folder or file, whose shapes are known and which are read by name."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> np.ndarray: ...


class AnyTokenizer(Protocol):
    """Tokenizer that can be saved: a `PretrainedTokenizer`, or a run's tokenizer (`train.data`)."""

    def to_pretrained(self) -> PretrainedTokenizer:
        """Return a `PretrainedTokenizer` that encodes every text to the same ids."""
        ...


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    shardings: Callable[[Any], Any] | None = None,
    strict: bool = True,
) -> Pretrained:
    """Load a pretrained decoder from a Hugging Face folder, an own-format folder or a GGUF file.

    Names and shapes are checked before the parameters are read. Tensors are read and cast one at a
    time, so that a process holds only one parameter (of all blocks) in RAM in addition to the
    parameters on its devices. Each process reads all tensors and keeps the shards of its devices.

    Args:
        path: Folder, or file ending in `.gguf`.
        dtype: Dtype of the parameters and of the computation. None means float32, except that a
            model in the library's own format then computes in the dtype of its config.
        shardings: Function from an abstract `nnx.State` of the model to the sharding of each leaf,
            such as `train.devices.mesh.state_shardings`; None puts all parameters on the first
            device of the process.
        strict: Whether a tensor that the config does not use is an error. If false, unused tensors
            are skipped with a warning that names them.

    Returns:
        Config, parameters and tokenizer of the decoder.

    Raises:
        ValueError: The family or one of its options is unknown, a file is missing or damaged, a
            tensor is missing, unknown or of another shape, or the tokenizer has more ids than the
            embedding has rows.
    """
    path = Path(path).expanduser()
    source, config, tokenizer, own = _open(path)
    if not own or dtype:
        config = dataclasses.replace(config, dtype=dtype or "float32")
    state = abstract_state(config)
    parameters = own_parameters(state) if own else family_parameters(config, state)
    _check(path, source, parameters, tied=not own and config.tied_head, strict=strict)
    sharding = _sharding_by_name(state, shardings)
    params = {
        parameter.path: _read(source, parameter, np.dtype(dtype or "float32"), sharding[name])
        for name, parameter in parameters.items()
    }
    return Pretrained(config, traverse_util.unflatten_dict(params), tokenizer)


def save_pretrained(
    path: str | os.PathLike[str],
    config: Any,
    params: Mapping[Any, Any],
    tokenizer: AnyTokenizer,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    format: Literal["transformers", "thoughtbubbles"] = "transformers",
) -> None:
    """Save a decoder as a folder that stock `transformers` loads, or in the library's own format.

    A model that no family of `transformers` can express, such as a model with fork layers, needs
    `format="thoughtbubbles"`, the library's own format (`thoughtbubbles.own_form`).
    `load_pretrained` loads both formats. The folder has config.json, model.safetensors and
    tokenizer.json, and gets its name only when it is complete. Tensors are written one at a time,
    to save RAM.

    Args:
        path: New or empty folder.
        config: Config of the decoder. The format "transformers" needs a decoder without forks that
            a family can express; "thoughtbubbles" takes any architecture.
        params: Nested dict of arrays, as `load_pretrained` returns it, or `nnx.to_pure_dict` of a
            model's state; the arrays must be fully addressable from this process.
        tokenizer: Tokenizer of the decoder: a `PretrainedTokenizer`, or the tokenizer of a run.
        dtype: Dtype of the stored tensors; None keeps the dtype of the embedding.
        format: Format of the folder: "transformers", or "thoughtbubbles" for the library's own.

    Raises:
        ValueError: No family can express the config, the parameters belong to another config, the
            tokenizer has more ids than the embedding has rows, the dtype is unknown or too narrow
            for a parameter (a value overflows, or more than 1 % of the nonzero values would become
            0), the own format has no name for the architecture or policy, or the folder exists and
            is not empty.
        OSError: The folder can't be written; no part of it remains.
    """
    path = Path(path).expanduser()
    given = _by_name(params)
    # Without an embedding the parameters are refused below.
    stored = dtype or str(getattr(given.get("embed"), "dtype", "float32"))
    if stored not in _STORED:
        raise ValueError(f"dtype={stored!r}: choose one of {', '.join(_STORED)}")
    saved = tokenizer.to_pretrained()
    if saved.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {saved.vocab_size} ids, the config vocab_size={config.vocab_size}: "
            "pass the tokenizer that the model was trained with"
        )
    if format == "thoughtbubbles":
        fields = own_to_json(config, stored)
        parameters = own_parameters(abstract_state(config))
    else:
        fields = config_to_json(config, stored)
        parameters = family_parameters(config, abstract_state(config))
    for name in {**parameters, **given}:
        expected = parameters[name].whole_shape if name in parameters else "none"
        found = given[name].shape if name in given else "missing"
        if expected != found:
            raise ValueError(
                f"parameter {name}: given {found}, config asks for {expected}: "
                "use the config that the parameters were made with"
            )
    check_new_folder(path)
    sources = {
        name: (parameter, given[key], index if parameter.stacked else None)
        for key, parameter in parameters.items()
        for index, name in enumerate(parameter.names)
    }
    shapes = {name: parameter.stored_shape for name, (parameter, _, _) in sorted(sources.items())}

    def tensor(name: str) -> np.ndarray:
        parameter, array, index = sources[name]
        whole = np.asarray(array if index is None else array[index])
        return parameter.to_stored(_narrowed(whole, np.dtype(stored), name))

    for name, (_, array, _) in sources.items():
        if np.dtype(stored).itemsize < array.dtype.itemsize or stored == "float16":
            tensor(name)  # raises for lost values before anything is written
    with new_folder(path) as folder:
        write_safetensors(folder / SINGLE, shapes, np.dtype(stored), tensor)
        for name, text in _texts(fields, saved).items():
            (folder / name).write_text(text, encoding="utf-8")


def _narrowed(tensor: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Cast a tensor; raise a ValueError if the dtype is too narrow for its values."""
    with np.errstate(over="ignore", under="ignore"):
        found = tensor.astype(dtype, copy=False)
    finite = np.isfinite(tensor.astype(np.float32)).all()
    if finite and not np.isfinite(found.astype(np.float32)).all():
        raise ValueError(
            f"{name} holds magnitudes up to {np.abs(tensor).max():.3g}, which {dtype} can't: "
            "save it as float32"
        )
    nonzero = np.count_nonzero(tensor)
    lost = nonzero - np.count_nonzero(found)
    if lost > _UNDERFLOW * nonzero:
        raise ValueError(
            f"{lost / nonzero:.1%} of the values of {name} are too small for {dtype} and would be "
            "0: save it as float32"
        )
    return found


def open_pretrained(path: Path) -> tuple[_Source, Any, PretrainedTokenizer]:
    """Open a folder or file of a pretrained decoder; the values of tensors are not read yet.

    Only the embedding and the LM head are read, to compare them, if the config ties the two but the
    file holds both.

    Returns:
        Source with the shape of each tensor (`shapes`) and a method that reads a tensor by its name
        (`read`); config; and tokenizer.
    """
    return _open(path)[:3]


def _open(path: Path) -> tuple[_Source, Any, PretrainedTokenizer, bool]:
    """Return the results of `open_pretrained`, and whether the folder has the own format."""
    if path.is_file() and path.suffix == ".gguf":
        file = GGUFFile(path)
        config = config_from_json(file.fields, str(path))
        _check_sizes(path, file, config)
        config = _untied(path, file, config)
        return file, config, file.tokenizer(config.vocab_size), False
    if not path.is_dir():
        raise ValueError(f"{path} is no folder and no .gguf file: pass a model that is on disk")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: pass a Hugging Face folder or a .gguf file")
    fields = read_json(path / "config.json")
    if is_own(fields):
        config = own_from_json(fields, str(path / "config.json"))
        own = SafetensorsFiles(path)
        check_sizes(path / "config.json", own, config)
        return own, config, PretrainedTokenizer.from_folder(path, fields, config.vocab_size), True
    config = config_from_json(fields, str(path / "config.json"))
    files = SafetensorsFiles(path)
    _check_sizes(path / "config.json", files, config)
    config = _untied(path, files, config)
    return files, config, PretrainedTokenizer.from_folder(path, fields, config.vocab_size), False


def _untied(path: Path, source: _Source, config: ModelConfig) -> ModelConfig:
    """Return the config, with an untied LM head if the file's LM head and embedding differ."""
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


def _check_sizes(path: Path, source: _Source, config: ModelConfig) -> None:
    """Raise a ValueError if a size of the config is too large for the stored tensors."""
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
    path: Path, source: _Source, parameters: dict[str, StoredParameter], *, tied: bool, strict: bool
) -> None:
    """Raise a ValueError for missing tensors, wrong shapes or, if strict, unused tensors."""
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
    unknown = {
        name
        for name in source.shapes.keys() - expected.keys()
        if not (tied and name == TOP["head"])
        and not name.endswith("rotary_emb.inv_freq")  # in old files; computed from the config
    }
    if unknown and strict:
        raise ValueError(
            f"{path} has a tensor {min(unknown)}, which its config does not have: correct "
            "config.json, or load_pretrained(..., strict=False) leaves it out"
        )
    if unknown:
        warnings.warn(
            f"{path}: not used are {some(unknown)}, which its config does not have", stacklevel=3
        )


def _sharding_by_name(state: nnx.State, shardings: Callable[[Any], Any] | None) -> dict[str, Any]:
    if shardings is None:
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return {name: first for name in _by_name(nnx.to_pure_dict(state))}
    return _by_name(nnx.to_pure_dict(shardings(state)))


def _read(source: _Source, parameter: StoredParameter, dtype: np.dtype, sharding: Any) -> jax.Array:
    """Read a parameter onto the devices of its sharding; each of its tensors is read once."""
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
    """Return a mapping from name to content of the folder's text files."""
    bos_id = None if tokenizer.bos is None else tokenizer.id(tokenizer.bos)
    # All three ids, since a family's default ids may lie outside the vocabulary.
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

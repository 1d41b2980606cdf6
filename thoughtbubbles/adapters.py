"""Read, check and write LoRA adapters in the format of Hugging Face's `peft`.

An adapter is a folder with adapter_config.json and adapter_model.safetensors. Every config field
that would change what the adapter computes is either applied or rejected with a ValueError.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from thoughtbubbles.backbone import ATTENTION_MAPS, MLP_MAPS
from thoughtbubbles.fields import Fields, cut, read_json, shown
from thoughtbubbles.placement import product_beside
from thoughtbubbles.safetensors_files import SafetensorsFiles, new_folder, write_safetensors
from thoughtbubbles.short_repr import ShortRepr
from thoughtbubbles.stored_parameters import BLOCK

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, PARTS = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
MODULES = {
    name: BLOCK[f"blocks/{part}/{name}"].removesuffix(".weight")
    for part, names in (("attention", ATTENTION_MAPS), ("mlp", MLP_MAPS))
    for name in names
}

# Config fields that do not change what a trained adapter adds to a frozen decoder: notes, training
# options, locations of tensors (tensors are compared with the decoder's layers instead), and
# fan_in_fan_out, which says how the layers of the base model are stored.
NOTES = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
READ = {
    "alpha_pattern", "exclude_modules", "layers_to_transform", "lora_alpha", "r", "rank_pattern",
    "target_modules", "use_rslora",
}  # fmt: skip
# Values of further config fields with which an adapter computes `x A B * scale` and nothing else.
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # Other initialisations change the frozen parameters too.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}

REPEAT = re.compile(r"[*+{]")
# Flags such as (?x) and comments in a pattern change which of its characters are repeats.
UNSAFE = re.compile(r"\)[*+{]|\(\?[a-zA-Z#-]")

Targets = Mapping[str, tuple[tuple[int, ...], int, int]]
ModuleName = Callable[[str, tuple[int, ...]], str]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class LoRAWeights(ShortRepr):
    """A trained LoRA adapter of one linear layer, or of a stack of layers: `x A B * scale`.

    Attributes:
        a: Matrices A, `[*stack, inputs, rank]` float32.
        b: Matrices B, `[*stack, rank, outputs]` float32.
        scale: Scale of each layer, `[*stack]` float32.
    """

    a: jax.Array
    b: jax.Array
    scale: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute what the adapter of a single layer (no stack axes) adds to the layer's output.

        Args:
            x: Input of the layer, `[..., inputs]`.

        Returns:
            Addend to the layer's output, `[..., outputs]`.
        """
        low = product_beside(x, self.a.astype(x.dtype))
        return product_beside(low, self.b.astype(x.dtype)) * self.scale

    @property
    def delta(self) -> jax.Array:
        """Change of the layer's kernel by a merge: `A B * scale`, `[*stack, inputs, outputs]`."""
        return product_beside(self.a, self.b) * self.scale[..., None, None]


def hugging_face_module(target: str, index: tuple[int, ...]) -> str:
    """Return the name that `transformers` gives to a linear layer of a pretrained decoder.

    An example is "model.layers.0.self_attn.q_proj".

    Args:
        target: Name of a linear layer in `Thoughtbubbles.lora_targets`, such as "q".
        index: Index of the layer in its stack, `(block,)`.

    Raises:
        ValueError: `target` is not a linear layer of a pretrained decoder, or `index` is not one
            number.
    """
    if target not in MODULES or len(index) != 1:
        raise ValueError(f"{target!r} has no name in transformers: pass module_name")
    return f"model.layers.{index[0]}.{MODULES[target]}"


class _Layer(NamedTuple):
    """Linear layer of a decoder: its name in `lora_targets`, index in the stack, and sizes."""

    target: str
    index: tuple[int, ...]
    inputs: int
    outputs: int


def load_adapter(
    path: str | os.PathLike[str],
    lora_targets: Targets,
    *,
    module_name: ModuleName = hugging_face_module,
    base: str | None = None,
) -> dict[str, LoRAWeights]:
    """Load an adapter that `peft` wrote.

    Pass the result to `apply_lora`, or the `delta` of each adapter to `merge_lora`. In a stack of
    layers, matrices are zero-padded to the highest rank of the stack, and a layer without an
    adapter gets zero matrices; the padding does not change what the adapter computes. The scale is
    alpha / rank, or alpha / sqrt(rank) if the adapter's config has `use_rslora`.

    Args:
        path: Folder with adapter_config.json and adapter_model.safetensors.
        lora_targets: Mapping from the name of each linear layer of the decoder to the shape of its
            stack, its number of inputs and its number of outputs (`Thoughtbubbles.lora_targets`,
            `memgen.linear_layers`).
        module_name: Function from a name in `lora_targets` and the index of a layer in its stack to
            the name of that layer in `transformers`.
        base: Base model that the adapter's config must name (base_model_name_or_path). By default
            the name is not checked: only layers and shapes are compared.

    Returns:
        Dict from names in `lora_targets` to adapters, without the names of layers that have none.

    Raises:
        ValueError: The adapter belongs to another base model or adds something other than
            `x A B * scale` to the outputs of linear layers, a file is missing or damaged, or
            `module_name` gives two layers the same name.
    """
    path = Path(path).expanduser()
    if not (path / CONFIG).is_file():
        raise ValueError(f"{path} has no {CONFIG}: pass the folder of an adapter")
    fields = Fields(read_json(path / CONFIG), str(path / CONFIG))
    _check_plain(fields)
    given_base = fields.text("base_model_name_or_path", None)
    if base is not None and base != given_base:
        raise ValueError(f"{path} belongs to the base {shown(given_base)}, not to {base!r}")
    files = SafetensorsFiles(path, TENSORS)
    layers: dict[str, _Layer] = {}
    for name, layer in _layers(lora_targets, module_name):
        if name in layers:
            _repeated(name, layers[name].target, layer.target)
        layers[name] = layer
    modules = _modules(files, str(path / TENSORS), layers, given_base)
    _check_targets(fields, modules, layers)
    scales = {module: _scale(fields, module, rank) for module, rank in modules.items()}
    adapter = {}
    for target, (stack, inputs, outputs) in lora_targets.items():
        ours = [module for module in modules if layers[module].target == target]
        if not ours:
            continue
        rank = max(modules[module] for module in ours)
        a, b = np.zeros((*stack, inputs, rank), "f4"), np.zeros((*stack, rank, outputs), "f4")
        scale = np.zeros(stack, "f4")
        for module in ours:
            index, own = layers[module].index, modules[module]
            low, high = (files.read(f"{PREFIX}{module}{part}") for part in PARTS)
            a[(*index, slice(None), slice(own))] = low.T
            b[(*index, slice(own))] = high.T
            scale[index] = scales[module]
        adapter[target] = LoRAWeights(jnp.asarray(a), jnp.asarray(b), jnp.asarray(scale))
    return adapter


def save_adapter(
    path: str | os.PathLike[str],
    adapter: Mapping[str, Any],
    *,
    module_name: ModuleName = hugging_face_module,
    base: str | None = None,
    dropout: float = 0.0,
) -> None:
    """Write an adapter as a folder that `peft` loads.

    Args:
        path: Folder to create; it may exist if it is empty.
        adapter: Mapping from the name of a linear layer to its adapter: a `LoRAWeights`, an adapter
            of `memgen.make_adapter`, or another object with arrays `a [*stack, inputs, rank]` and
            `b [*stack, rank, outputs]` and with `scale`, a number or an array `[*stack]`. A layer
            whose scale is 0 is not written.
        module_name: Function from a name in the adapter and the index of a layer in its stack to
            the name of that layer in `transformers`.
        base: Name or path by which `peft` loads the base model; None to store no name.
        dropout: Dropout rate that the adapter was trained with, stored for further training.

    Raises:
        ValueError: The adapter has no layers or a negative scale, `dropout` is not in [0, 1), a
            layer has no name in `transformers` or the same name as another layer, or the folder
            exists and is not empty.
        OSError: The folder can't be written; a partly written folder is removed.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} is no rate: choose at least 0 and below 1")
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    complete = True
    for target, low in adapter.items():
        a, b = (np.asarray(side[...], np.float32) for side in (low.a, low.b))
        stack, rank = a.shape[:-2], a.shape[-1]
        scale = np.broadcast_to(np.asarray(low.scale, np.float32), stack)
        for index in np.ndindex(stack):
            if not scale[index]:  # a layer that was left out
                complete = False
                continue
            if not scale[index] > 0:
                raise ValueError(f"{target} has the scale {scale[index]}: peft knows those above 0")
            module = module_name(target, index)
            if module in ranks:
                _repeated(module, target, target)
            ranks[module], alphas[module] = rank, float(scale[index] * np.float32(rank))
            for part, side in zip(PARTS, (a, b), strict=True):
                tensors[f"{PREFIX}{module}{part}"] = side[index].T
    if not ranks:
        raise ValueError("an adapter of no layer: choose targets first")
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    short = complete and module_name is hugging_face_module  # names apply to all layers
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({name.rpartition(".")[2] if short else name for name in ranks}),
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: _whole(own) for name, own in alphas.items() if own != alpha},
    }
    shapes = {name: tensors[name].shape for name in sorted(tensors)}
    with new_folder(Path(path).expanduser()) as folder:
        write_safetensors(folder / TENSORS, shapes, np.dtype("f4"), tensors.__getitem__)
        (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _repeated(module: str, one: str, other: str) -> NoReturn:
    where = f"two layers of {one}" if one == other else f"a layer of {one} and one of {other}"
    raise ValueError(
        f"module_name gives {module!r} to {where}: give each index of a stack its own name"
    )


def _whole(number: float) -> float | int:
    return int(number) if number.is_integer() else number


def _layers(lora_targets: Targets, module_name: ModuleName) -> Iterator[tuple[str, _Layer]]:
    for target, (stack, inputs, outputs) in lora_targets.items():
        for index in np.ndindex(stack):
            yield module_name(target, index), _Layer(target, index, inputs, outputs)


def _check_plain(fields: Fields) -> None:
    """Raise a ValueError for a field that makes the adapter compute more than `x A B * scale`."""
    kind = fields.text("peft_type", None)
    if kind != "LORA":
        raise ValueError(f"{fields.source}: peft_type={shown(kind)} is not supported, only LORA")
    for name in fields.names():
        value = fields.raw(name)
        if name in NOTES or name in READ or name in PLAIN and value in PLAIN[name]:
            continue
        if value is False and name not in PLAIN or value in ({}, []):
            continue
        raise ValueError(
            f"{fields.source}: {cut(name)}={shown(value)} is not supported: merge the adapter into "
            "its base with peft, and load that"
        )


def _modules(
    files: SafetensorsFiles, source: str, layers: Mapping[str, _Layer], base: str | None
) -> dict[str, int]:
    """Return the rank of each adapted module; raise a ValueError for missing or wrong tensors."""
    other = f"the adapter belongs to another base ({shown(base)})"
    found: dict[str, set[str]] = {}
    for name in files.shapes:
        part = next((part for part in PARTS if name.endswith(part)), None)
        module = name.removeprefix(PREFIX).removesuffix(part or "")
        if part is None or not name.startswith(PREFIX):
            raise ValueError(f"{source}: {cut(name, 200)} is no matrix of a linear layer's adapter")
        if module not in layers:
            raise ValueError(
                f"{source} adapts {cut(module, 200)}, which is no layer of this model that takes "
                f"an adapter: {other}"
            )
        found.setdefault(module, set()).add(part)
    ranks = {}
    for module, parts in found.items():
        missing = [part for part in PARTS if part not in parts]
        if missing:
            raise ValueError(f"{source} lacks {PREFIX}{module}{missing[0]}: copy it again")
        layer = layers[module]
        a, b = (files.shapes[f"{PREFIX}{module}{part}"] for part in PARTS)
        if len(a) != 2 or a[0] < 1 or a[1] != layer.inputs or b != (layer.outputs, a[0]):
            raise ValueError(
                f"{source}: {module} has matrices of shapes {a} and {b}, this model asks for "
                f"(r, {layer.inputs}) and ({layer.outputs}, r): {other}"
            )
        ranks[module] = a[0]
    if not ranks:
        raise ValueError(f"{source} holds no matrices: copy it again")
    return ranks


def _check_targets(
    fields: Fields, modules: Mapping[str, int], layers: Mapping[str, _Layer]
) -> None:
    """Raise a ValueError unless config and tensors agree on the adapted layers and their ranks."""
    for module, rank in modules.items():
        expected = _pattern(fields, "rank_pattern", module) or fields.integer("r")
        if rank != expected:
            raise ValueError(
                f"{fields.source}: {module} has rank {expected}, its matrices have {rank}: "
                "copy both files again"
            )
    targets = fields.raw("target_modules")
    chosen, excluded = _choice(fields, "target_modules"), _choice(fields, "exclude_modules", [])
    only = fields.raw("layers_to_transform")
    if only is not None and isinstance(targets, str):
        raise ValueError(
            f"{fields.source}: layers_to_transform={shown(only)} with the pattern "
            f"{shown(targets)}, which peft refuses too: name the layers in the pattern"
        )
    only = [only] if type(only) is int else fields.list("layers_to_transform", int, [])
    for module in layers:
        number = next((int(part) for part in module.split(".") if part.isdigit()), None)
        if chosen is None or excluded is None:
            break
        wanted = chosen(module) and not excluded(module) and (not only or number in only)
        if wanted != (module in modules):
            has = "has" if module in modules else "lacks"
            raise ValueError(
                f"{fields.source} names the layers {shown(targets)}, and {TENSORS} {has} "
                f"{module}: the adapter belongs to another base, or copy both files again"
            )
    for target in [] if isinstance(targets, str) else targets:
        if not any(_named(module, [target]) for module in modules):
            raise ValueError(
                f"{fields.source}: target_modules has {shown(target)}, which is no layer of this "
                "model that takes an adapter"
            )


def _choice(fields: Fields, name: str, *default: Any) -> Callable[[str], bool] | None:
    """Return a predicate that tells whether a config field selects a module, as in `peft`.

    A list holds the ends of module names. A string is a regular expression that matches whole
    names, or "all-linear": every linear layer except the LM head. The result is None for a regular
    expression that might take too long to evaluate.
    """
    value = fields.raw(name)
    if not isinstance(value, str):
        names = fields.list(name, str, *default)
        return lambda module: _named(module, names)
    if value.lower() == "all-linear" and name == "target_modules":
        return lambda module: not _named(module, ["lm_head"])
    # Repeated groups, and many repeats, can take for ever on a name that does not match. Without
    # the pattern, tensors are still compared with the layers of the model.
    if len(value) > 500 or len(REPEAT.findall(value)) > 4 or UNSAFE.search(value):
        return None
    try:
        pattern = re.compile(value)
    except re.error as error:
        raise ValueError(
            f"{fields.source}: {name}={shown(value)} is no regular expression ({error}): copy it "
            "again"
        ) from None
    return lambda module: pattern.fullmatch(module) is not None


def _named(module: str, names: list[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _scale(fields: Fields, module: str, rank: int) -> float:
    alpha = _pattern(fields, "alpha_pattern", module)
    alpha = fields.number("lora_alpha") if alpha is None else alpha
    return alpha / (math.sqrt(rank) if fields.flag("use_rslora", False) else rank)


def _pattern(fields: Fields, name: str, module: str) -> Any:
    """Return the number that `rank_pattern` or `alpha_pattern` gives to a module, or None.

    `peft` interprets keys of these fields as regular expressions. Here a key must be the end of a
    module's name, or "^" and the whole name; any other expression raises a ValueError.
    """
    pattern = fields.object(name)
    for key in pattern.names():
        plain = key.removeprefix("^").removesuffix("$")
        if not all(char.isalnum() or char in "._" for char in plain):
            raise ValueError(f"{fields.source}: {name} has {shown(key)}, which is no layer's name")
        if module == plain or not key.startswith("^") and module.endswith(f".{plain}"):
            return pattern.integer(key) if name == "rank_pattern" else pattern.number(key)
    return None

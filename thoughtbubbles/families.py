"""Conversion between Hugging Face config.json and ModelConfig for supported model families."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from thoughtbubbles.config import ModelConfig
from thoughtbubbles.fields import Fields, shown
from thoughtbubbles.positions import RopeScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",  # SmolLM2 too
    "qwen2": "Qwen2ForCausalLM",  # Qwen2.5 too
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",  # LayerNorm, GELU, biases: our default
}

# Supported values in config.json, with which our decoder computes the same as the family.
PLAIN: dict[str, tuple[Any, ...]] = {
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}
_SWIGLU: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),  # two names of one function
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
}
_STARCODER: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh", None),
    "use_bias": (True, None),
    "mlp_type": ("default", None),
    "norm_type": ("layer_norm", None),
}
# These keys are read elsewhere, or are notes that do not change the scaling.
SCALING_NOTES = {"rope_type", "rope_theta", "partial_rotary_factor", "finetuned"}


def config_from_json(fields: Mapping[str, Any], source: str) -> ModelConfig:
    """Convert the fields of a `config.json` (transformers 4 or 5) to a ModelConfig.

    Args:
        fields: Fields of the config.json.
        source: Name of the file in error messages.

    Raises:
        ValueError: The family or one of its options is not supported, or a field is missing or has
            a wrong value.
    """
    given = Fields(fields, source, "it is no whole config of a model")
    family = given.text("model_type", "")
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{source}: model_type {shown(family or None)} is not one of {known}")
    starcoder = family == "starcoder2"
    # A Llama has biases on all linear layers or on none.
    biased = family == "llama" and fields.get("attention_bias") is fields.get("mlp_bias") is True
    plain = PLAIN | (_STARCODER if starcoder else _SWIGLU)
    if biased:
        plain |= {"attention_bias": (True,), "mlp_bias": (True,)}
    for name, allowed in plain.items():
        if given.raw(name) not in allowed:
            value = shown(given.raw(name))
            raise ValueError(f"{source}: {name}={value} is not supported for {family}")
    others = set(given.list("layer_types", str, [])) - {"full_attention"}
    if others:
        kind = shown(min(others))[1:-1]
        raise ValueError(f"{source}: layers of {kind} are not supported")
    rope = _rope(given)
    context = given.integer("max_position_embeddings", None)
    default_base = 2e6 if family == "smollm3" else 10_000.0
    heads, width = given.integer("num_attention_heads"), given.integer("hidden_size")
    # A head_dim of 0 means None, as in transformers.
    head_dim = given.integer("head_dim", 128 if family == "qwen3" else None, least=0) or None
    try:
        return ModelConfig(
            vocab_size=given.integer("vocab_size"),
            embed_dim=width,
            num_layers=given.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=given.integer("num_key_value_heads", 2 if starcoder else heads),
            head_dim=None if head_dim and head_dim * heads == width else head_dim,
            mlp_dim=given.integer("intermediate_size"),
            norm="layernorm" if starcoder else "rmsnorm",
            norm_eps=(
                given.number("norm_epsilon", 1e-5)
                if starcoder
                else given.number("rms_norm_eps", 1e-6)
            ),
            mlp="gelu" if starcoder else "swiglu",
            qk_norm=family == "qwen3",
            tied_head=given.flag("tie_word_embeddings", family in ("smollm3", "starcoder2")),
            rope_base=rope.number("rope_theta", given.number("rope_theta", default_base)),
            rope_scaling=_scaling(
                rope, context, given.integer("original_max_position_embeddings", None)
            ),
            nope_layers=_nope_layers(given, source) if family == "smollm3" else (),
            biases="all" if starcoder or biased else "qkv" if family == "qwen2" else "none",
            context_length=_within_window(given, context) if starcoder else context,
        )
    except ValueError as error:
        line = str(error)
        raise ValueError(line if line.startswith(source) else f"{source}: {line}") from error


def _within_window(given: Fields, context: int | None) -> int | None:
    """Return the context length, at most the sliding window, up to which attention is full."""
    window = given.integer("sliding_window", None)
    if window is None or (context is not None and context <= window):
        return context
    warnings.warn(
        f"{given.source}: sliding_window={window} is not applied: texts of up to {window} tokens "
        "are exact, tokens of longer ones attend to more than in training",
        stacklevel=4,
    )
    return window


def _nope_layers(given: Fields, source: str) -> tuple[int, ...]:
    """Return the layers of SmolLM3 without RoPE, which have a 0 in its `no_rope_layers`."""
    flags, count = given.list("no_rope_layers", int, None), given.integer("num_hidden_layers")
    if flags is not None and len(flags) < count:
        raise ValueError(f"{source}: no_rope_layers has {len(flags)} of {count} layers")
    if flags is not None:
        return tuple(layer for layer in range(count) if not flags[layer])
    interval = given.integer("no_rope_layer_interval", 4)
    return tuple(range(interval - 1, count, interval))


def _rope(given: Fields) -> Fields:
    """Join the RoPE fields of transformers 4 and 5; raise a ValueError if they contradict."""
    newer, older = (_of_all_layers(given, name) for name in ("rope_parameters", "rope_scaling"))
    for name in newer.keys() & older.keys():
        if newer[name] != older[name]:
            raise ValueError(
                f"{given.source}: rope_parameters has {name}={shown(newer[name])}, rope_scaling "
                f"{shown(older[name])}: leave out the one that the model was not trained with"
            )
    name = "rope_parameters" if newer or not older else "rope_scaling"
    rope = Fields(older | newer, f"{given.source}: {name}", "it is no whole config of a model")
    share = rope.number("partial_rotary_factor", 1.0)
    if share != 1:
        raise ValueError(f"{rope.source}: partial_rotary_factor={share} is not supported")
    return rope


def _of_all_layers(given: Fields, name: str) -> dict[str, Any]:
    """Read RoPE fields, flat or nested by layer type; raise a ValueError if layer types differ."""
    fields = given.object(name)
    content = {key: fields.raw(key) for key in fields.names()}
    nested = [value for value in content.values() if isinstance(value, dict)]
    if nested:
        if len(nested) < len(content) or any(value != nested[0] for value in nested):
            kinds = ", ".join(sorted(content))
            raise ValueError(
                f"{fields.source} differ by layer type ({shown(kinds)[1:-1]}): not supported"
            )
        fields = Fields(nested[0], fields.source)
        content = {key: fields.raw(key) for key in fields.names()}
    if "type" in content:  # its name before version 4.43
        kind = content.pop("type")
        if content.setdefault("rope_type", kind) != kind:
            both = f"rope_type={shown(content['rope_type'])} and type={shown(kind)}"
            raise ValueError(f"{fields.source} has {both}: leave one out")
    return content


def _scaling(rope: Fields, context: int | None, original: int | None) -> RopeScaling | None:
    kind = rope.text("rope_type", "default")
    if kind == "default":
        extra = [name for name in rope.names() if name not in SCALING_NOTES]
        if extra == ["factor"] and rope.number("factor") == 1:
            extra = []
        if extra:
            value = shown(rope.raw(extra[0]))
            raise ValueError(
                f"{rope.source}: {shown(extra[0])[1:-1]}={value} without a rope_type that has it: "
                "add the rope_type, or leave it out"
            )
        return None
    known = {field.name for field in dataclasses.fields(RopeScaling)}
    unknown = sorted(set(rope.names()) - known - SCALING_NOTES)
    wholes = {"original_max_position_embeddings"}
    fields: dict[str, Any] = {
        name: rope.integer(name) if name in wholes else rope.number(name)
        for name in rope.names()
        if name in known - SCALING_NOTES
    }
    if kind != "linear":
        own = fields.setdefault("original_max_position_embeddings", original or context)
        if original not in (None, own):
            raise ValueError(
                f"{rope.source}: original_max_position_embeddings={own}, beside it {original}: "
                "leave one out"
            )
    # The kind is checked first, because an unsupported kind may have fields unknown here.
    RopeScaling(kind, **{**fields, "factor": 1.0})
    fields["factor"] = rope.number("factor")
    if unknown:
        raise ValueError(f"rope scaling {kind} with {shown(unknown[0])[1:-1]} is not supported")
    return RopeScaling(kind, **fields)


def config_to_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Convert a ModelConfig to the `config.json` of an equivalent Hugging Face family.

    Args:
        config: Config of a decoder.
        dtype: Dtype of the stored parameters, such as "bfloat16".

    Returns:
        The fields of the config.json.

    Raises:
        ValueError: No supported family is equivalent, because of fork layers, copies or the kinds
            of layers.
    """
    family = family_of(config)
    fields = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "tie_word_embeddings": config.tied_head,
        "rope_theta": config.rope_base,
        "torch_dtype": dtype,
    }
    if family == "starcoder2":
        fields |= {"hidden_act": "gelu_pytorch_tanh", "norm_epsilon": config.norm_eps}
        fields |= {"use_bias": True, "sliding_window": None}
    else:
        fields |= {"hidden_act": "silu", "rms_norm_eps": config.norm_eps}
    if family == "llama" and config.biases == "all":
        fields |= {"attention_bias": True, "mlp_bias": True}
    if config.context_length is not None:
        fields["max_position_embeddings"] = config.context_length
    if config.rope_scaling is not None:
        fields["rope_scaling"] = _scaling_to_json(config.rope_scaling)
    if family == "smollm3":
        fields["no_rope_layers"] = [int(bool(rotary)) for rotary in config.rotary_layers]
    return fields


def _scaling_to_json(scaling: RopeScaling) -> dict[str, Any]:
    of_kind = {
        "linear": (),
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor"),
    }[scaling.rope_type]
    names = ("rope_type", "factor", "original_max_position_embeddings", *of_kind)
    found = {name: getattr(scaling, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def family_of(config: Any) -> str:
    """Return the name of the Hugging Face family that is equivalent to a model of this config.

    Raises:
        ValueError: No supported family is equivalent.
    """
    if not isinstance(config, ModelConfig):
        raise ValueError(_no_family(f"a {type(config).__name__.removesuffix('Config')}"))
    norm, mlp, biases = config.norm, config.mlp, config.biases
    kinds = {("layernorm", "gelu"), ("rmsnorm", "swiglu")}
    starcoder = (norm, mlp) == ("layernorm", "gelu")
    reasons: list[tuple[bool, str]] = [
        (bool(config.fork_layers), f"forks before layers {config.fork_layers}"),
        (config.copies > 1, f"copies={config.copies}"),
        ((norm, mlp) not in kinds, f"norm={norm!r} with mlp={mlp!r}"),
        (starcoder and biases != "all", f"norm={norm!r} and mlp={mlp!r} with biases={biases!r}"),
    ]
    features = {
        "starcoder2": starcoder,
        "llama": not starcoder and biases == "all",
        "qwen2": biases == "qkv",
        "qwen3": config.qk_norm,
        "smollm3": bool(config.nope_layers),
    }
    found = [family for family, has in features.items() if has]
    mixed = (
        f"mlp={mlp!r}, biases={biases!r}, qk_norm={config.qk_norm} and "
        f"nope_layers={config.nope_layers} together"
    )
    for wrong, reason in (*reasons, (len(found) > 1, mixed)):
        if wrong:
            raise ValueError(_no_family(reason))
    return found[0] if found else "llama"


def _no_family(reason: str) -> str:
    return (
        f"no supported Hugging Face family has {reason}: save it in the form of this library "
        '(format="thoughtbubbles")'
    )

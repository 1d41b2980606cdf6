"""Decoder families of pretrained weights: Hugging Face's config.json as ModelConfig, and back."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from thoughtbubbles.config import ModelConfig
from thoughtbubbles.positions import RopeScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",  # SmolLM2 too
    "qwen2": "Qwen2ForCausalLM",  # Qwen2.5 too
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}

# Values in config.json for which our decoder computes what the family computes.
PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}
# These keys describe how the scaling came about, or what the code does anyway.
SCALING_NOTES = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}


def config_from_json(fields: Mapping[str, Any], source: str) -> ModelConfig:
    """The ModelConfig of a `config.json` (versions 4 and 5 of transformers).

    Args:
        fields: Fields of the config.json.
        source: Name of the file in error messages.

    Raises:
        ValueError: The family or an option of it is not supported, or a size is missing.
    """
    family = fields.get("model_type")
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{source}: model_type {family!r} is not one of {known}")
    for name, allowed in PLAIN.items():
        if fields.get(name) not in allowed:
            raise ValueError(f"{source}: {name}={fields[name]!r} is not supported for {family}")
    if "sliding_attention" in (fields.get("layer_types") or ()):
        raise ValueError(f"{source}: layers of sliding_attention are not supported")

    def size(name: str, default: Any = None) -> Any:
        value = fields.get(name)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{source} has no {name}: it is no whole config of a {family} model")
        return value

    rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    context = fields.get("max_position_embeddings")
    base = rope.get("rope_theta") or fields.get("rope_theta")
    heads = size("num_attention_heads")
    width = size("hidden_size")
    head_dim = fields.get("head_dim") or (128 if family == "qwen3" else None)
    try:
        return ModelConfig(
            vocab_size=size("vocab_size"),
            embed_dim=width,
            num_layers=size("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=size("num_key_value_heads", heads),
            head_dim=None if head_dim and head_dim * heads == width else head_dim,
            mlp_dim=size("intermediate_size"),
            norm="rmsnorm",
            norm_eps=size("rms_norm_eps", 1e-6),
            mlp="swiglu",
            qk_norm=family == "qwen3",
            tied_head=size("tie_word_embeddings", family == "smollm3"),
            rope_base=float(base or (2e6 if family == "smollm3" else 10_000.0)),
            rope_scaling=_scaling(rope, context),
            nope_layers=_nope_layers(fields) if family == "smollm3" else (),
            biases="qkv" if family == "qwen2" else "none",
            context_length=context,
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _nope_layers(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """SmolLM3 writes a 1 for a layer *with* rotary positions, whatever the name says."""
    flags = fields.get("no_rope_layers")
    count = fields["num_hidden_layers"]
    if flags is None:
        interval = fields.get("no_rope_layer_interval", 4)
        flags = [(layer + 1) % interval for layer in range(count)]
    return tuple(layer for layer in range(count) if not flags[layer])


def _scaling(rope: Mapping[str, Any], context: int | None) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    fields = {name: value for name, value in rope.items() if name not in SCALING_NOTES}
    if kind != "linear":
        fields.setdefault("original_max_position_embeddings", context)
    known = {field.name for field in dataclasses.fields(RopeScaling)}
    unknown = sorted(set(fields) - known)
    # The kind is checked first: another kind may well have parameters that are unknown here.
    scaling = RopeScaling(kind, **{name: fields[name] for name in fields if name in known})
    if unknown:
        raise ValueError(f"rope scaling {kind} with {unknown[0]} is not supported")
    return scaling


def config_to_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of the family that computes what a decoder of this config computes.

    Args:
        config: Config of a decoder.
        dtype: Dtype of the stored weights, such as "bfloat16".

    Raises:
        ValueError: No family does, because of forks, copies, or the kinds of layers.
    """
    family = _family(config)
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
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "rope_theta": config.rope_base,
        "torch_dtype": dtype,
    }
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


def _family(config: ModelConfig) -> str:
    reasons: list[tuple[bool, str]] = [
        (bool(config.fork_layers), f"forks before layers {config.fork_layers}"),
        (config.copies > 1, f"copies={config.copies}"),
        (config.norm != "rmsnorm", f"norm={config.norm!r}"),
        (config.mlp != "swiglu", f"mlp={config.mlp!r}"),
        (config.biases == "all", f"biases={config.biases!r}"),
    ]
    features: dict[str, Callable[[ModelConfig], bool]] = {
        "qwen2": lambda config: config.biases == "qkv",
        "qwen3": lambda config: config.qk_norm,
        "smollm3": lambda config: bool(config.nope_layers),
    }
    found = [family for family, has in features.items() if has(config)]
    mixed = "biases, qk_norm and nope_layers together"
    for wrong, reason in (*reasons, (len(found) > 1, mixed)):
        if wrong:
            raise ValueError(
                f"no supported Hugging Face family has {reason}: keep such a model as a checkpoint"
            )
    return found[0] if found else "llama"

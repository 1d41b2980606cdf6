"""Configs as JSON and policies as text, and back."""

import ast
import dataclasses
from typing import Any, get_type_hints

from thoughtbubbles import ModelConfig, PrefixRank, Threshold, TopK
from thoughtbubbles.positions import RopeScaling

POLICIES = {policy.__name__: policy for policy in (TopK, PrefixRank, Threshold)}


def policy_from_text(text: str) -> TopK | PrefixRank | Threshold:
    """The policy that prints as `text`, e.g. `PrefixRank(ratio=1.5, window=64)`.

    Fields left out take their defaults, and so does a bare name.

    Raises:
        ValueError: no such policy or field, or a value of the wrong type.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        name, fields = call, []
        if isinstance(call, ast.Call) and not call.args:
            name, fields = call.func, call.keywords
        policy = POLICIES[getattr(name, "id", "")]
        types = get_type_hints(policy)
        values = {str(field.arg): _literal(field.value, types[str(field.arg)]) for field in fields}
        if len(values) < len(fields):
            raise TypeError("a field is given twice")
        return policy(**values)
    except (SyntaxError, TypeError, KeyError, RecursionError):
        choices = [
            f"{name}({', '.join(f'{f.name}={f.default}' for f in dataclasses.fields(policy))})"
            for name, policy in POLICIES.items()
        ]
        raise ValueError(f"policy {text!r}: choose one of {', '.join(choices)}") from None


def _literal(node: ast.expr, kind: Any) -> Any:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        raise TypeError("not a literal") from None
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise TypeError(f"{value!r} is not {kind}")
    return value


def as_json(config: Any) -> Any:
    """Nested dict of a config, tuples as lists and policies as text, as it comes from JSON."""
    if isinstance(config, tuple(POLICIES.values())):
        return repr(config)
    if dataclasses.is_dataclass(config):
        return {
            field.name: as_json(getattr(config, field.name)) for field in dataclasses.fields(config)
        }
    if isinstance(config, (list, tuple)):
        return [as_json(item) for item in config]
    return config


def model_from_json(fields: dict[str, Any]) -> ModelConfig:
    """The ModelConfig that `as_json` wrote."""
    fields = dict(fields)
    fields["policy"] = policy_from_text(fields["policy"])
    for name in ("fork_layers", "nope_layers"):
        fields[name] = tuple(fields[name])
    if fields["rope_scaling"] is not None:
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return ModelConfig(**fields)

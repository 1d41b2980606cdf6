"""Configs as JSON and policies as text, and back."""

import dataclasses
import typing
from typing import Any

import thoughtbubbles.hatchling  # noqa: F401 (fills ARCHITECTURES)
from thoughtbubbles import (
    ARCHITECTURES,
    ArchitectureConfig,
    Policy,
    PrefixRank,
    Threshold,
    TopK,
)
from thoughtbubbles.architecture import architecture_name
from train.cli.calls import from_text, text_of

POLICIES: dict[str, type[Any]] = {
    policy.__name__: policy for policy in (TopK, PrefixRank, Threshold)
}


def policy_from_text(text: str) -> Policy:
    """The policy that prints as `text`, e.g. `PrefixRank(ratio=1.5, window=64)`.

    Fields left out take their defaults, and so does a bare name.

    Raises:
        ValueError: There is no such policy or field, or a value has the wrong type.
    """
    return from_text(text, POLICIES, "policy")


def policy_text(policy: Policy) -> str:
    """The text that `policy_from_text` makes an equal policy of.

    Raises:
        ValueError: The policy's class is not in `POLICIES`, so that no run could be read again.
    """
    for name, known in POLICIES.items():
        if type(policy) is known:
            return text_of(name, policy)
    raise ValueError(
        f"the policy {policy} has no name: put its class into train.cli.config_json.POLICIES "
        "before the run, in a module that --plugin names, so that the run can be read again"
    )


def as_json(config: Any) -> Any:
    """Nested dict of a config, tuples as lists and policies as text, as it comes from JSON."""
    if isinstance(config, ArchitectureConfig):
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        if "policy" in fields:
            fields["policy"] = policy_text(fields["policy"])
        return {"architecture": architecture_name(config)} | as_json(fields)
    if isinstance(config, tuple(POLICIES.values())):
        return policy_text(config)
    if isinstance(config, dict):
        return {name: as_json(value) for name, value in config.items()}
    if hasattr(config, "word"):  # of a registry: `name(key=value)` as on the command line
        return text_of(config.word, config)
    if dataclasses.is_dataclass(config):
        return {
            field.name: as_json(getattr(config, field.name)) for field in dataclasses.fields(config)
        }
    if isinstance(config, (list, tuple)):
        return [as_json(item) for item in config]
    return config


def model_from_json(fields: dict[str, Any]) -> Any:
    """The config of a model that `as_json` wrote.

    Raises:
        ValueError: `ARCHITECTURES` has no architecture of its name, or that has other fields.
    """
    fields = dict(fields)
    name = fields.pop("architecture", None)
    if name is None:
        raise ValueError("the run names no architecture, an older version made it: train it again")
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {name!r}: choose one of {', '.join(ARCHITECTURES)}")
    config = ARCHITECTURES[name].config_class
    known = typing.get_type_hints(config)
    if unknown := sorted(fields.keys() - known.keys()):
        raise ValueError(f"the architecture {name} has no field {unknown[0]!r}")
    return config(**{field: _value(known[field], value) for field, value in fields.items()})


def _value(kind: Any, value: Any) -> Any:
    """A value that JSON holds, as the type of its field wants it."""
    if isinstance(value, list):
        return tuple(value)
    if kind is Policy:
        return policy_from_text(value)
    if isinstance(value, dict):
        [nested] = filter(dataclasses.is_dataclass, (kind, *typing.get_args(kind)))
        return nested(**value)  # pyright: ignore[reportCallIssue] (a class)
    return value

"""Convert configs to JSON and policies to text, and back."""

import dataclasses
import math
from typing import Any

import thoughtbubbles.hatchling  # noqa: F401 (fills ARCHITECTURES)
from thoughtbubbles import ARCHITECTURES, ArchitectureConfig, Policy, typed_json
from thoughtbubbles.architecture import architecture_name
from thoughtbubbles.fields import shown
from thoughtbubbles.policies import POLICIES
from train.cli.calls import from_text, text_of
from train.cli.numbers import infinite_options
from train.cli.plugins import OPTION


def policy_from_text(text: str) -> Policy:
    """Parse a policy from its text, such as `PrefixRank(ratio=1.5, window=64)`.

    Fields that are left out take their defaults; a bare name takes all defaults.

    Raises:
        ValueError: The policy or a field is unknown, or a value has the wrong type.
    """
    return from_text(text, POLICIES, "policy")


def policy_text(policy: Policy) -> str:
    """Format a policy as text that `policy_from_text` parses to an equal policy.

    Raises:
        ValueError: The policy's class is not in `thoughtbubbles.policies.POLICIES`, so that a saved
            run could not be loaded again.
    """
    for name, known in POLICIES.items():
        if type(policy) is known:
            return text_of(name, policy)
    raise ValueError(
        f"the policy {policy} has no name: put its class into thoughtbubbles.policies.POLICIES "
        "before the run, in a module that --plugin names, so that the run can be read again"
    )


def as_json(config: Any) -> Any:
    """Convert a config to JSON values: tuples become lists, policies and infinity become text."""
    if isinstance(config, ArchitectureConfig):
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        if "policy" in fields:
            fields["policy"] = policy_text(fields["policy"])
        return {"architecture": architecture_name(config)} | as_json(fields)
    if isinstance(config, tuple(POLICIES.values())):
        return policy_text(config)
    if isinstance(config, dict):
        return {name: as_json(value) for name, value in config.items()}
    if hasattr(config, "word"):  # an entry of a registry: `name(key=value)`, as an option
        return text_of(config.word, config)
    if dataclasses.is_dataclass(config):
        return {
            field.name: as_json(getattr(config, field.name)) for field in dataclasses.fields(config)
        }
    if isinstance(config, (list, tuple)):
        return [as_json(item) for item in config]
    return str(config) if isinstance(config, float) and not math.isfinite(config) else config


def model_from_json(fields: Any) -> Any:
    """Rebuild a model's config from the JSON object that `as_json` returned for the config.

    Raises:
        ValueError: `ARCHITECTURES` has no architecture of this name, the name is missing, or the
            architecture's config has other fields.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"model={shown(fields)} is no object with the fields of an architecture")
    name = fields.get("architecture")
    if name is None:
        raise ValueError("the run names no architecture, an older version made it: train it again")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"unknown architecture {shown(name)}: choose one of {', '.join(ARCHITECTURES)}, or "
            f"import the module that registers it ({OPTION})"
        )
    fields = {field: value for field, value in fields.items() if field != "architecture"}
    return from_json(ARCHITECTURES[name].config_class, fields, f"the architecture {name}")


def from_json(kind: type[Any], fields: Any, name: str) -> Any:
    """Rebuild a dataclass instance from the JSON object that `as_json` returned for it.

    Args:
        kind: Dataclass of the instance.
        fields: JSON object, a mapping from field names to JSON values.
        name: Name of the object in error messages.

    Raises:
        ValueError: A field is unknown, missing or of the wrong type.
    """
    if isinstance(fields, dict):
        infinite = [option for option in infinite_options(kind) if fields.get(option) == "inf"]
        fields = fields | dict.fromkeys(infinite, math.inf)
    return typed_json.from_json(kind, fields, name, _policy)


def _policy(value: Any) -> Policy:
    if not isinstance(value, str):
        raise TypeError
    return policy_from_text(value)

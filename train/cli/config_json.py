"""Configs as JSON and policies as text, and back."""

import dataclasses
from typing import Any

from thoughtbubbles import ModelConfig, Policy, PrefixRank, Threshold, TopK
from thoughtbubbles.positions import RopeScaling
from train.cli.calls import from_text, text_of

POLICIES: dict[str, type[Any]] = {
    policy.__name__: policy for policy in (TopK, PrefixRank, Threshold)
}


def policy_from_text(text: str) -> Policy:
    """The policy that prints as `text`, e.g. `PrefixRank(ratio=1.5, window=64)`.

    Fields left out take their defaults, and so does a bare name.

    Raises:
        ValueError: no such policy or field, or a value of the wrong type.
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
    if isinstance(config, ModelConfig):
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        return as_json(fields | {"policy": policy_text(config.policy)})
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


def model_from_json(fields: dict[str, Any]) -> ModelConfig:
    """The ModelConfig that `as_json` wrote."""
    fields = dict(fields)
    fields["policy"] = policy_from_text(fields["policy"])
    for name in ("fork_layers", "nope_layers"):
        fields[name] = tuple(fields[name])
    if fields["rope_scaling"] is not None:
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return ModelConfig(**fields)

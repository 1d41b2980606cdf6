"""Rules for resuming a run: which config fields must stay equal, and which may change.

A field must stay equal unless its metadata say otherwise, as in `field(default=3, metadata=FREE)`.
So no change of an option goes unnoticed because its rule was forgotten.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from thoughtbubbles.fields import shown
from train.cli.config_json import as_json, model_from_json

FREE: Mapping[str, Any] = MappingProxyType({"resume": "free"})
"""Metadata of a config field that may change freely, since it does not affect the computation."""

NOTED: Mapping[str, Any] = MappingProxyType({"resume": "noted"})
"""Metadata of a config field that may change with a notice: a change of `steps` changes the
schedule, a change of any other such field only changes the order of float additions."""


def free_inside(*names: str) -> Mapping[str, Any]:
    """Make the metadata of a field that holds a nested config, whose fields `names` may change.

    Args:
        names: Names of the nested config's fields that may change when a run is resumed.
    """
    return MappingProxyType({"resume": "fixed", "free": names})


def differences(saved: dict[str, Any], config: Any) -> list[str]:
    """List the changed config fields that prevent a run from being resumed.

    Args:
        saved: Config of a checkpoint, as `as_json` wrote it.
        config: Config dataclass of the run that would resume from the checkpoint.

    Returns:
        Lines `name: saved x, now y`; empty if the run may be resumed.
    """
    rules = {field.name: field.metadata for field in dataclasses.fields(config)}
    current = as_json(config)
    if "model" in saved and "model" in current:
        saved, current = (tree | {"model": _comparable(tree["model"])} for tree in (saved, current))
    found = []
    for name in {**saved, **current}:
        rule = rules.get(name, {})
        if rule.get("resume", "fixed") == "fixed":
            found += _differences(name, saved.get(name), current.get(name), rule.get("free", ()))
    return found


def noted_changes(saved: dict[str, Any], current: dict[str, Any], config: Any) -> list[str]:
    """List the changes of `NOTED` fields, which are allowed but affect the resumed run.

    Args:
        saved, current: Metadata of a checkpoint and of the run that resumes from the checkpoint,
            each with `config`, and with the actual mesh sizes and attention under `resolved`.
        config: Config dataclass of the run that resumes.

    Returns:
        Lines `name: saved x, now y`.
    """
    before, now = (meta["config"] | meta["resolved"] for meta in (saved, current))
    names = [f.name for f in dataclasses.fields(config) if f.metadata.get("resume") == "noted"]
    found = [_differences(name, before.get(name), now.get(name), ()) for name in names]
    return [line for lines in found for line in lines]


def _comparable(model: dict[str, Any]) -> dict[str, Any]:
    """Normalise a model's config for comparison, without the fields that may change.

    The config is parsed and written again, so that 2 and 2.0 do not count as different.
    """
    config = model_from_json(model)
    fields = as_json(config)
    for name in {*config.unused_fields(), *config.execution_fields}:
        fields.pop(name, None)
    return fields


def _differences(name: str, saved: Any, current: Any, free: tuple[str, ...]) -> list[str]:
    if isinstance(saved, dict) and isinstance(current, dict):
        names = [key for key in {**saved, **current} if key not in free]
        found = [_differences(f"{name}.{k}", saved.get(k), current.get(k), ()) for k in names]
        return [line for lines in found for line in lines]
    if saved == current:
        return []
    before, now = (shown(value, 200) for value in (saved, current))
    return [f"{name}: saved {before}, now {now}"]

"""What must be equal for a run to be continued, and what may change.

Every field of a config must be equal unless its metadata say otherwise, so that a new option can't
resume unnoticed: `field(default=3, metadata=FREE)`.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from thoughtbubbles.fields import shown
from train.cli.config_json import as_json, model_from_json

FREE: Mapping[str, Any] = MappingProxyType({"resume": "free"})
"""Metadata of a field that changes nothing that is computed."""

NOTED: Mapping[str, Any] = MappingProxyType({"resume": "noted"})
"""Metadata of a field whose change is printed: `steps` moves the schedule, the others the order of
float additions."""


def free_inside(*names: str) -> Mapping[str, Any]:
    """Metadata of a field that holds a config of which these fields may change."""
    return MappingProxyType({"resume": "fixed", "free": names})


def differences(saved: dict[str, Any], config: Any) -> list[str]:
    """Fields that keep a run from being continued, as `name: saved x, now y`.

    Args:
        saved: Config of a checkpoint, as `as_json` wrote it.
        config: Config of the run that would go on from it.
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
    """Allowed changes after which the run is no longer the one that was begun.

    Args:
        saved, current: Metadata of a checkpoint, and of the run that goes on from it: `config`, and
            under `resolved` what some of its options came to.
        config: Config of the run that goes on.
    """
    before, now = (meta["config"] | meta["resolved"] for meta in (saved, current))
    names = [f.name for f in dataclasses.fields(config) if f.metadata.get("resume") == "noted"]
    found = [_differences(name, before.get(name), now.get(name), ()) for name in names]
    return [line for lines in found for line in lines]


def _comparable(model: dict[str, Any]) -> dict[str, Any]:
    """Read and written again, so that 2 for 2.0 is no difference; without what may change."""
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

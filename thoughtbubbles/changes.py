"""Copy frozen dataclasses, and named presets, with some fields changed."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any


def replaced(value: Any, changes: Mapping[str, Any]) -> Any:
    """Copy a dataclass instance with some fields changed.

    Args:
        value: Instance of a dataclass.
        changes: Mapping from the name of a field to its new value.

    Raises:
        TypeError: A name in `changes` is not a field; the message suggests the most similar field.
    """
    fields = [field.name for field in dataclasses.fields(value)]
    for name in changes:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)[0]
            raise TypeError(f"{type(value).__name__} has no field {name!r}: did you mean {near!r}?")
    return dataclasses.replace(value, **changes)


def preset_of(presets: Mapping[str, Any], name: str, changes: Mapping[str, Any]) -> Any:
    """Return the preset of a given name with some fields changed.

    Args:
        presets: Mapping from the name of a preset to a dataclass instance.
        name: Name of the preset.
        changes: Mapping from the name of a field to its new value.

    Raises:
        ValueError: There is no preset of that name.
        TypeError: A name in `changes` is not a field of the preset.
    """
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(presets)}")
    return replaced(presets[name], changes)

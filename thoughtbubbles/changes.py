"""Frozen dataclasses with some fields changed, and by name; a misspelt field is one line."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any


def replaced(value: Any, changes: Mapping[str, Any]) -> Any:
    """`dataclasses.replace`, which names the nearest field where there is none of a name.

    Raises:
        TypeError: A change is of no field.
    """
    fields = [field.name for field in dataclasses.fields(value)]
    for name in changes:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)[0]
            raise TypeError(f"{type(value).__name__} has no field {name!r}: did you mean {near!r}?")
    return dataclasses.replace(value, **changes)


def preset_of(presets: Mapping[str, Any], name: str, changes: Mapping[str, Any]) -> Any:
    """A preset by its name, with changes.

    Raises:
        ValueError: There is no preset of that name.
        TypeError: A change is of no field.
    """
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(presets)}")
    return replaced(presets[name], changes)

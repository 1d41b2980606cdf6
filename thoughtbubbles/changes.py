"""Copies of frozen dataclasses with some fields changed; a misspelt field is one line."""

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

"""Short reprs of dataclasses and NamedTuples that show dtype and shape of arrays, not values."""

import dataclasses
from typing import Any

LONGEST = 16  # maximum number of shown values of a tuple


def short_repr(self: Any) -> str:
    """Format the fields of a dataclass or NamedTuple, with arrays shown as dtype and shape."""
    fields = getattr(self, "_fields", None) or [f.name for f in dataclasses.fields(self)]
    shown = (f"{name}={_short(getattr(self, name))}" for name in fields)
    return f"{type(self).__name__}({', '.join(shown)})"


class ShortRepr:
    """Base of a dataclass (made with `repr=False`) whose repr shows arrays as dtype and shape."""

    __repr__ = short_repr


def _short(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if isinstance(value, tuple) and type(value) is tuple:
        shown = [_short(item) for item in value[:LONGEST]] + ["..."] * (len(value) > LONGEST)
        return f"({', '.join(shown)}{',' * (len(value) == 1)})"
    return repr(value)

"""Short reprs of values that hold arrays: a notebook shows shapes, not ten thousand numbers."""

import dataclasses
from typing import Any

LONGEST = 16  # values of a tuple


class ShortRepr:
    """A dataclass with `repr=False`, whose repr gives arrays by type and shape."""

    def __repr__(self) -> str:
        assert dataclasses.is_dataclass(self)
        shown = (f"{f.name}={_short(getattr(self, f.name))}" for f in dataclasses.fields(self))
        return f"{type(self).__name__}({', '.join(shown)})"


def _short(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if isinstance(value, tuple) and type(value) is tuple:
        shown = [_short(item) for item in value[:LONGEST]] + ["..."] * (len(value) > LONGEST)
        return f"({', '.join(shown)}{',' * (len(value) == 1)})"
    return repr(value)

"""Short reprs of values that hold arrays: a notebook shows shapes, not ten thousand numbers.

The two libraries do not import each other; unlike those of `thoughtbubbles.short_repr`, fields may
be caches of any decoder here.
"""

import dataclasses
from typing import Any

import jax


class ShortRepr:
    """A dataclass with `repr=False`, whose repr gives arrays by type and shape."""

    def __repr__(self) -> str:
        assert dataclasses.is_dataclass(self)
        values = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        shown = (f"{name}={jax.tree.map(_Short, value)}" for name, value in values)
        return f"{type(self).__name__}({', '.join(shown)})"


class _Short:
    def __init__(self, leaf: Any):
        self.leaf = leaf

    def __repr__(self) -> str:
        if hasattr(self.leaf, "shape") and hasattr(self.leaf, "dtype"):
            return f"{self.leaf.dtype}[{','.join(map(str, self.leaf.shape))}]"
        return repr(self.leaf)

"""Short reprs of values that hold arrays: a notebook shows shapes, not ten thousand numbers.

The two libraries do not import each other; unlike those of `thoughtbubbles.short_repr`, fields may
be caches of any decoder here.
"""

import dataclasses
from typing import Any

import jax


def short_repr(self: Any) -> str:
    """The fields of a dataclass or a NamedTuple, with arrays by type and shape."""
    fields = getattr(self, "_fields", None) or [f.name for f in dataclasses.fields(self)]
    shown = (f"{name}={jax.tree.map(_Short, getattr(self, name))}" for name in fields)
    return f"{type(self).__name__}({', '.join(shown)})"


class ShortRepr:
    """A dataclass with `repr=False`, whose repr gives arrays by type and shape."""

    __repr__ = short_repr


class _Short:
    def __init__(self, leaf: Any):
        self.leaf = leaf

    def __repr__(self) -> str:
        if hasattr(self.leaf, "shape") and hasattr(self.leaf, "dtype"):
            return f"{self.leaf.dtype}[{','.join(map(str, self.leaf.shape))}]"
        return repr(self.leaf)

"""Short reprs of values that hold arrays: a notebook shows shapes, not ten thousand numbers.

The two libraries do not import each other. Unlike in `thoughtbubbles.short_repr`, a field here may
be any pytree of arrays, such as a decoder's cache.
"""

import dataclasses
from typing import Any

import jax


def short_repr(self: Any) -> str:
    """Format the fields of a dataclass or NamedTuple, with arrays shown as dtype and shape."""
    fields = getattr(self, "_fields", None) or [f.name for f in dataclasses.fields(self)]
    shown = (f"{name}={jax.tree.map(_Short, getattr(self, name))}" for name in fields)
    return f"{type(self).__name__}({', '.join(shown)})"


class ShortRepr:
    """Base of a dataclass (made with `repr=False`) whose repr shows arrays as dtype and shape."""

    __repr__ = short_repr


class _Short:
    def __init__(self, leaf: Any):
        self.leaf = leaf

    def __repr__(self) -> str:
        if hasattr(self.leaf, "shape") and hasattr(self.leaf, "dtype"):
            return f"{self.leaf.dtype}[{','.join(map(str, self.leaf.shape))}]"
        return repr(self.leaf)

"""NNX modules whose classes say the arguments of their constructors, in `help()` and editors."""

import inspect
from typing import Any

from flax import nnx


class _Constructor:
    """Descriptor of a class's signature, which Flax's metaclass would hide."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature | None:
        if instance is not None:  # whose call is another one
            return None
        if owner.__init__ is object.__init__:
            return inspect.Signature()
        signature = inspect.signature(owner.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class Module(nnx.Module):
    """An `nnx.Module` whose class has the signature of its constructor."""

    __signature__ = _Constructor()

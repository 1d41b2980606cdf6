"""NNX modules whose classes say the arguments of their constructors, in `help()` and editors."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

Built = TypeVar("Built")


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


def abstract_module(build: Callable[[], Built]) -> Built:
    """The module that a function makes, of shapes and types alone.

    `nnx.eval_shape` would bind the names of its axes to a surrounding mesh, which has other ones.

    Args:
        build: Function that makes the module; it is only traced.
    """
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return nnx.eval_shape(build)

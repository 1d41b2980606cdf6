"""Base class of NNX modules whose `help()` shows constructor arguments, and abstract modules."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

Built = TypeVar("Built")


class _Constructor:
    """Descriptor that returns a class's constructor signature, which Flax's metaclass hides."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature | None:
        if instance is not None:  # an instance's call has the signature of __call__
            return None
        if owner.__init__ is object.__init__:
            return inspect.Signature()
        signature = inspect.signature(owner.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class Module(nnx.Module):
    """An `nnx.Module` whose constructor's arguments are shown by `help()` and editors."""

    __signature__ = _Constructor()


def abstract_module(build: Callable[[], Built]) -> Built:
    """Build a module abstractly: its variables hold shapes and dtypes instead of arrays.

    `nnx.eval_shape` is called under an empty mesh; under another mesh it would look up the logical
    axis names of the parameters among the mesh axes, which have other names.

    Args:
        build: Function that makes the module; it is only traced.
    """
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return nnx.eval_shape(build)

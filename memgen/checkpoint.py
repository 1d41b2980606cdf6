"""What was trained, taken out of a MemGen and put into another, strictly."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import filterlib

from memgen.model import MemGen
from memgen.trigger import TriggerParam
from memgen.weaver import WeaverParam

TRAINED: filterlib.Filter = nnx.Any(WeaverParam, TriggerParam)
Module = TypeVar("Module", bound=nnx.Module)


def trained_params(memgen: MemGen) -> dict[Any, Any]:
    """Parameters of weaver and trigger as a nested dict of arrays; none of a decoder's."""
    return nnx.to_pure_dict(nnx.state(memgen, TRAINED))


def load_params(
    module: Module, params: Mapping[Any, Any], kind: filterlib.Filter = TRAINED
) -> Module:
    """The module with `trained_params` of another one of the same sizes.

    Args:
        module: a MemGen, or another module.
        params: nested dict of arrays.
        kind: which variables they are, if not a MemGen's.

    Raises:
        ValueError: a leaf is missing, too many, or of another shape or dtype.
    """
    graphdef, mine, rest = nnx.split(module, kind, ...)
    wanted, given = (
        {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _by_name(tree).items()}
        for tree in (nnx.to_pure_dict(mine), params)
    )
    for name in sorted(wanted | given):
        here, there = wanted.get(name, "none"), given.get(name, "none")
        if here != there:
            raise ValueError(
                f"{name}: the checkpoint has {there}, the model {here}: build the model with the "
                "config that was trained"
            )
    nnx.replace_by_pure_dict(mine, jax.tree.map(jnp.asarray, dict(params)))
    return nnx.merge(graphdef, mine, rest)


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        "/".join(str(getattr(part, "key", part)) for part in path): leaf for path, leaf in leaves
    }

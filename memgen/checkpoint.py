"""Extract the trained parameters of a MemGen, and load them into another MemGen with checks."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import filterlib

from memgen.checks import check_module
from memgen.model import MemGen
from memgen.trigger import TriggerParam
from memgen.weaver import WeaverParam

TRAINED: filterlib.Filter = nnx.Any(WeaverParam, TriggerParam)
Module = TypeVar("Module", bound=nnx.Module)


def trained_params(memgen: MemGen) -> dict[Any, Any]:
    """Return the parameters of weaver and trigger, without the decoders, as a nested dict."""
    check_module(memgen)
    return nnx.to_pure_dict(nnx.state(memgen, TRAINED))


def load_params(
    module: Module, params: Mapping[Any, Any], kind: filterlib.Filter = TRAINED
) -> Module:
    """Return a copy of a module in which the trained parameters are replaced by `params`.

    Args:
        module: Module to load into, such as a MemGen.
        params: Nested dict of arrays, such as `trained_params` returns.
        kind: Flax filter that selects the variables to replace; by default the parameters of weaver
            and trigger. `params` must hold exactly the selected variables.

    Raises:
        ValueError: `module` holds no `nnx.Module`, `params` is not a mapping, or a parameter is
            missing, unknown, or of another shape or dtype.
    """
    check_module(module)
    if not isinstance(params, Mapping):
        raise ValueError(
            f"params are a {type(params).__name__}: give a nested dict of arrays, such as that of "
            "trained_params"
        )
    graphdef, mine, rest = nnx.split(module, kind, ...)
    expected, given = (
        {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _by_name(tree).items()}
        for tree in (nnx.to_pure_dict(mine), params)
    )
    for name in sorted(expected | given):
        here, there = expected.get(name, "none"), given.get(name, "none")
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

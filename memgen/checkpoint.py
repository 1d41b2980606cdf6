"""What was trained, taken out of a MemGen and put into another, strictly."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memgen.model import MemGen
from memgen.trigger import TriggerParam
from memgen.weaver import WeaverParam

TRAINED = nnx.Any(WeaverParam, TriggerParam)


def trained_params(memgen: MemGen) -> dict[Any, Any]:
    """Parameters of weaver and trigger as a nested dict of arrays; none of a decoder's."""
    return nnx.to_pure_dict(nnx.state(memgen, TRAINED))


def load_params(memgen: MemGen, params: Mapping[Any, Any]) -> MemGen:
    """The MemGen with `trained_params` of another one of the same sizes.

    Raises:
        ValueError: a leaf is missing, too many, or of another shape; nothing is left as it was
            without a word.
    """
    graphdef, mine, rest = nnx.split(memgen, TRAINED, ...)
    wanted, given = _by_name(nnx.to_pure_dict(mine)), _by_name(params)
    for name in sorted(wanted.keys() | given.keys()):
        if name not in given:
            raise ValueError(
                f"the checkpoint has no {name}, this MemGen has: build it with the config that "
                "was trained, or save the checkpoint again"
            )
        if name not in wanted:
            raise ValueError(
                f"the checkpoint has {name}, this MemGen has none: build it with the config that "
                "was trained"
            )
        if wanted[name].shape != given[name].shape:
            raise ValueError(
                f"{name}: the checkpoint's shape is {given[name].shape}, this MemGen's "
                f"{wanted[name].shape}: build it with the config that was trained"
            )
    as_mine = lambda old, new: jnp.asarray(new, old.dtype)  # noqa: E731
    nnx.replace_by_pure_dict(mine, jax.tree.map(as_mine, nnx.to_pure_dict(mine), dict(params)))
    return nnx.merge(graphdef, mine, rest)


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        "/".join(str(getattr(part, "key", part)) for part in path): leaf for path, leaf in leaves
    }

"""Build a module from given parameters, after a check of their names and shapes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from thoughtbubbles.module import abstract_module


def with_params(
    build: Callable[[], nnx.Module],
    params: Mapping[Any, Any],
    shardings: Callable[[Any], Any] | None = None,
) -> Any:
    """Return a module with given parameters, without running its initialisers.

    Args:
        build: Function that makes the module; it is only traced.
        params: Nested dict of arrays, as `nnx.to_pure_dict` returns it.
        shardings: Function from the module's abstract `nnx.State` to the sharding of each leaf.
            None leaves JAX arrays where they are and puts other arrays on the default device.

    Raises:
        ValueError: Names or shapes differ from those of the module.
    """
    graphdef, state = nnx.split(abstract_module(build))
    expected, given = _by_name(nnx.to_pure_dict(state)), _by_name(params)
    for name in {**expected, **given}:
        there = given[name].shape if name in given else "missing"
        here = expected[name].shape if name in expected else "none"
        if there != here:
            raise ValueError(
                f"parameter {name}: given {there}, config asks for {here}: "
                "use the config that the parameters were made with"
            )
    if shardings is None:
        placed = jax.tree.map(jnp.asarray, dict(params))
    else:
        placed = jax.device_put(dict(params), nnx.to_pure_dict(shardings(state)))
    nnx.replace_by_pure_dict(state, placed)
    return nnx.merge(graphdef, state)


def _by_name(params: Mapping[Any, Any]) -> dict[str, Any]:
    flat = jax.tree_util.tree_leaves_with_path(dict(params))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}

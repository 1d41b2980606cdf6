"""Low-rank adapters as pytrees, added to frozen linear layers (arXiv 2106.09685)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memgen.backbone import DecoderBackbone
from memgen.config import LoRAConfig


class LowRank(nnx.Module):
    """`x A B * alpha / rank`, for one linear layer or a stack of them.

    Args:
        stack: Leading axes of the arrays, over which the blocks are scanned; `()` for one layer.
        inputs: Number of inputs of the layer.
        outputs: Number of outputs of the layer.
        config: Rank, scale and dropout.
        rngs: Random keys of the initial A; B starts at 0.
        kind: Type of the two parameters, by which a training stage selects them.
    """

    def __init__(
        self,
        stack: tuple[int, ...],
        inputs: int,
        outputs: int,
        config: LoRAConfig,
        *,
        rngs: nnx.Rngs,
        kind: type[nnx.Variable] = nnx.Param,
    ):
        bound = inputs**-0.5
        shape = (*stack, inputs, config.rank)
        first = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        self.a = kind(first, inputs=1)
        self.b = kind(jnp.zeros((*stack, config.rank, outputs)), inputs=1)
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout
        self.key: jax.Array | None = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., outputs]` of `x [..., inputs]`; the arrays must be those of a single layer."""
        if self.key is not None and self.dropout:
            keep = jax.random.bernoulli(
                jax.random.wrap_key_data(self.key), 1 - self.dropout, x.shape
            )
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        low = x @ self.a[...].astype(x.dtype)
        return (low @ self.b[...].astype(x.dtype)) * self.scale

    @property
    def delta(self) -> jax.Array:
        """Sum to add to the layer's weight to merge the adapter: `[*stack, inputs, outputs]`."""
        return (self.a[...] @ self.b[...]) * self.scale


def make_adapter(
    backbone: DecoderBackbone,
    config: LoRAConfig,
    *,
    rngs: nnx.Rngs,
    kind: type[nnx.Variable] = nnx.Param,
) -> nnx.Dict:
    """An adapter for a backbone: a `LowRank` for each of the config's targets.

    Args:
        backbone: Decoder to adapt.
        config: Targets, rank, scale and dropout.
        rngs: Random keys of the initial values.
        kind: Type of the parameters, by which a training stage selects them.

    Raises:
        ValueError: A target is no linear layer of the backbone.
    """
    lora_targets = backbone.lora_targets
    unknown = [name for name in config.targets if name not in lora_targets]
    if not lora_targets:
        raise ValueError(
            f"{type(backbone).__name__} names no linear layers for adapters (lora_targets): "
            "train all of its parameters"
        )
    if unknown:
        raise ValueError(
            f"no linear layer {unknown[0]!r}: choose targets from {', '.join(lora_targets)}"
        )
    return nnx.Dict(
        {
            name: LowRank(*lora_targets[name], config, rngs=rngs, kind=kind)
            for name in config.targets
        }
    )


def with_dropout(adapter: Mapping[str, LowRank], key: jax.Array | None) -> Mapping[str, LowRank]:
    """The adapter with dropout of its inputs by a random key; without dropout if it is None."""
    if key is None:
        return adapter
    noisy = {}
    for index, (name, low_rank) in enumerate(adapter.items()):
        leaves, structure = jax.tree.flatten(low_rank)
        copy: LowRank = jax.tree.unflatten(structure, leaves)
        stack = low_rank.a.shape[:-2]
        copy.key = nnx.data(
            jax.random.key_data(jax.random.split(jax.random.fold_in(key, index), stack))
        )
        noisy[name] = copy
    return noisy


def linear_layers(module: nnx.Module) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """`DecoderBackbone.lora_targets` of a module: each of its `nnx.Linear`s by its path."""
    return {
        _path(path): ((), part.in_features, part.out_features)
        for path, part in nnx.iter_graph(module)
        if isinstance(part, nnx.Linear)
    }


def apply_lora(module: nnx.Module, adapter: Mapping[str, Any]) -> Any:
    """`DecoderBackbone.apply_lora` of a module: a copy with adapters, over the same arrays.

    Args:
        module: Module with `nnx.Linear`s.
        adapter: Adapters by the path of a linear layer (`linear_layers`).

    Raises:
        ValueError: A path is that of no `nnx.Linear`.
    """
    leaves, structure = jax.tree.flatten(module)
    copy = jax.tree.unflatten(structure, leaves)
    paths = {
        _path(path): path
        for path in (p for p, part in nnx.iter_graph(copy) if isinstance(part, nnx.Linear))
    }
    for name, low_rank in adapter.items():
        if name not in paths:
            raise ValueError(f"no linear layer {name!r}: choose from {', '.join(paths)}")
        *above, last = paths[name]
        parent: Any = copy
        for part in above:
            parent = _child(parent, part)
        wrapped = _Sum(_child(parent, last), low_rank)
        if isinstance(last, int):
            parent[last] = wrapped
        else:
            setattr(parent, str(last), wrapped)
    return copy


class _Sum(nnx.Module):
    def __init__(self, linear: nnx.Linear, low_rank: Any):
        self.linear, self.low_rank = linear, nnx.data(low_rank)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x) + self.low_rank(x)


def _child(parent: Any, part: Any) -> Any:
    return parent[part] if isinstance(part, int) else getattr(parent, part)


def _path(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))

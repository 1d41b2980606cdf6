"""Low-rank adapters as pytrees, added to frozen linear layers (arXiv 2106.09685)."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memgen.backbone import DecoderBackbone
from memgen.checks import check_config, check_rngs
from memgen.config import LoRAConfig
from memgen.module import named
from memgen.nnx_layers import LayerAxes, choices, linear_axes
from memgen.placement import placed_as, product_beside


class LowRank(nnx.Module):
    """`x A B * alpha / rank`, for one linear layer or a stack of them.

    Args:
        stack: Leading axes of the arrays, over which the blocks are scanned; `()` for one layer.
        inputs: Number of inputs of the layer.
        outputs: Number of outputs of the layer.
        config: Rank, scale and dropout.
        rngs: Random keys of the initial A; B starts at 0.
        kind: Type of the two parameters, by which a training stage selects them.
        axes: Names of the axes of the layer: of its stack, its inputs and its outputs; by default
            none has a name.
    """

    def __init__(
        self,
        stack: tuple[int, ...],
        inputs: int,
        outputs: int,
        config: LoRAConfig,
        *,
        rngs: nnx.Rngs,
        kind: type[nnx.Variable[Any]] = nnx.Param,
        axes: LayerAxes | None = None,
    ):
        above, into, out_of = axes or ((None,) * len(stack), None, None)
        bound = inputs**-0.5
        shape = (*stack, inputs, config.rank)
        first = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        self.a = named(kind, first, (*above, into, None), inputs=1)
        last = jnp.zeros((*stack, config.rank, outputs))
        self.b = named(kind, last, (*above, None, out_of), inputs=1)
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout
        self.key: jax.Array | None = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., outputs]` of `x [..., inputs]`; the arrays must be those of a single layer."""
        if self.key is not None and self.dropout:
            keep = jax.random.bernoulli(
                jax.random.wrap_key_data(self.key), 1 - self.dropout, x.shape
            )
            x = jnp.where(placed_as(keep, x), x / (1 - self.dropout), 0)
        low = product_beside(x, self.a[...].astype(x.dtype))
        return product_beside(low, self.b[...].astype(x.dtype)) * self.scale

    @property
    def delta(self) -> jax.Array:
        """Sum to add to the layer's weight to merge the adapter: `[*stack, inputs, outputs]`."""
        return product_beside(self.a[...], self.b[...]) * self.scale


def make_adapter(
    backbone: DecoderBackbone,
    config: LoRAConfig,
    *,
    rngs: nnx.Rngs,
    kind: type[nnx.Variable[Any]] = nnx.Param,
) -> nnx.Dict[Any]:
    """An adapter for a backbone: a `LowRank` for each layer that one of the config's targets names.

    Args:
        backbone: Decoder to adapt.
        config: Targets, rank, scale and dropout.
        rngs: Random keys of the initial values.
        kind: Type of the parameters, by which a training stage selects them.

    Raises:
        ValueError: A target names no linear layer of the backbone, or the config is of another
            class.
    """
    check_config(config, LoRAConfig)
    check_rngs(rngs)
    if not hasattr(backbone, "lora_targets"):
        raise ValueError(
            f"{type(backbone).__name__} has no lora_targets, which name its linear layers: give a "
            "decoder, or add a property that returns memgen.linear_layers(self)"
        )
    lora_targets = backbone.lora_targets
    if not lora_targets:
        raise ValueError(
            f"{type(backbone).__name__} names no linear layers for adapters (lora_targets): "
            "train all of its parameters"
        )
    found: dict[str, LowRank] = {}
    axes = _axes(backbone)
    for target in config.targets:
        names = [name for name in lora_targets if _matches(name, target)]
        if not names:
            raise ValueError(
                f"no linear layer {target!r}: choose targets from {choices(lora_targets)}"
            )
        for name in names:
            if name not in found:
                found[name] = LowRank(
                    *lora_targets[name], config, rngs=rngs, kind=kind, axes=axes.get(name)
                )
    return nnx.Dict(found)


def _axes(backbone: Any) -> Mapping[str, LayerAxes]:
    """The names of the axes of linear layers, as far as the backbone says them."""
    if hasattr(backbone, "lora_axes"):
        return backbone.lora_axes
    targets = backbone.lora_targets
    return linear_axes(backbone, targets) if isinstance(backbone, nnx.Module) else {}


def _matches(name: str, target: str) -> bool:
    """Whether a target of a `LoRAConfig` names a linear layer."""
    last = name.rpartition("/")[2]
    return name == target or last in (target, f"{target}_proj") or fnmatchcase(name, target)


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

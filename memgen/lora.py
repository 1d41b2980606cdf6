"""Low-rank adapters (LoRA, arXiv 2106.09685) as pytrees, for frozen linear layers."""

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
    """A low-rank adapter `x A B * alpha / rank` of one linear layer, or of a stack of layers.

    Args:
        stack: Sizes of the leading axes over which blocks are stacked; `()` for a single layer.
        inputs: Number of inputs of the layer.
        outputs: Number of outputs of the layer.
        config: Rank, scale and dropout.
        rngs: PRNG keys that initialise A; B is initialised to 0.
        kind: Variable type of A and B, by which a training stage selects its parameters.
        axes: Names of the layer's axes as `(names of the stack's axes, name of the inputs, name of
            the outputs)`; None for axes without names.
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
        """Map `x [..., inputs]` to `[..., outputs]`; A and B must have no stack axes."""
        if self.key is not None and self.dropout:
            keep = jax.random.bernoulli(
                jax.random.wrap_key_data(self.key), 1 - self.dropout, x.shape
            )
            x = jnp.where(placed_as(keep, x), x / (1 - self.dropout), 0)
        low = product_beside(x, self.a[...].astype(x.dtype))
        return product_beside(low, self.b[...].astype(x.dtype)) * self.scale

    @property
    def delta(self) -> jax.Array:
        """Matrix to add to the layer's kernel to merge the adapter, `[*stack, inputs, outputs]`."""
        return product_beside(self.a[...], self.b[...]) * self.scale


def make_adapter(
    backbone: DecoderBackbone,
    config: LoRAConfig,
    *,
    rngs: nnx.Rngs,
    kind: type[nnx.Variable[Any]] = nnx.Param,
) -> nnx.Dict[Any]:
    """Make an adapter for a backbone: a `LowRank` for each layer that a target selects.

    Args:
        backbone: Decoder to adapt.
        config: Targets, rank, scale and dropout.
        rngs: PRNG keys that initialise the adapter.
        kind: Variable type of the adapter's parameters, by which a training stage selects them.

    Returns:
        Dict from a linear layer's name to its `LowRank`.

    Raises:
        ValueError: A target selects no linear layer of the backbone, the backbone names no linear
            layers, or the config is not a `LoRAConfig`.
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
    """Return the axis names of those linear layers of the backbone that have axis names."""
    if hasattr(backbone, "lora_axes"):
        return backbone.lora_axes
    targets = backbone.lora_targets
    return linear_axes(backbone, targets) if isinstance(backbone, nnx.Module) else {}


def _matches(name: str, target: str) -> bool:
    """Whether a target of a `LoRAConfig` selects the linear layer `name`."""
    last = name.rpartition("/")[2]
    return name == target or last in (target, f"{target}_proj") or fnmatchcase(name, target)


def with_dropout(adapter: Mapping[str, LowRank], key: jax.Array | None) -> Mapping[str, LowRank]:
    """Return a copy of the adapter with dropout on its inputs.

    Args:
        adapter: Mapping from a linear layer's name to its `LowRank`.
        key: PRNG key of the dropout masks; None returns the adapter itself, without dropout.
    """
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

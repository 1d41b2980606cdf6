"""The interface of a decoder for MemGen: vectors in, hidden states out, a cache, adapters."""

import math
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import jax

Self = TypeVar("Self", bound="DecoderBackbone")


class DecoderBackbone(Protocol):
    """A causal decoder over rows of vectors.

    The vectors of a row occupy positions 0, 1, ... without holes, and appended vectors occupy the
    next positions, so positions are normally not passed. Any split of a row into calls of `extend`
    gives the hidden states that one call of `hidden_states` gives. Implementations are pytrees
    (such as an `nnx.Module`), and all methods are traced.

    Optionally, a decoder has a static attribute `can_forget = True` and a method
    `extend_keeping(cache, x, length, kept)`. The method returns the same hidden states as `extend`,
    but a cache that keeps only the first `kept [B]` of the new vectors. With it, a weaver's queries
    are computed together with the text before them, and long training texts are read once, over a
    cache, instead of once for each event.

    A cache may be any pytree. Axis 0 of each of its arrays indexes the rows, and a scalar belongs
    to all rows, unless the decoder has a method `cache_batch_axes(cache)`, which returns the same
    pytree with the axis of each array, or None for an array that all rows share.

    Adapters name their axes to Flax (`nnx.get_partition_spec`) if the decoder is an `nnx.Module`
    whose targets are its linear layers (`memgen.linear_layers`), or has an attribute `lora_axes`:
    the names of the axes of each target, `(stack, inputs, outputs)`, such as
    `(("layers",), "embed", "heads")`.

    Attributes:
        embed_dim: Width `D` of the vectors.
        vocab_size: Size `V` of the vocabulary.
        lora_targets: Linear layers that an adapter can be added to: a mapping from a layer's name
            to `(stack, inputs, outputs)`. `stack` is the shape of the kernel's stacked leading axes
            (`()` for a single layer, `(layers,)` for layers that are stacked over blocks), `inputs`
            and `outputs` are the layer's numbers of inputs and outputs.
    """

    @property
    def embed_dim(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def lora_targets(self) -> Mapping[str, tuple[tuple[int, ...], int, int]]: ...

    def apply_lora(self: Self, adapter: Mapping[str, Any]) -> Self:
        """Return a copy of the decoder with adapters, which shares the decoder's arrays.

        Args:
            adapter: Adapters by the name of a linear layer. For an input `x`, the adapted layer
                returns its unadapted output plus `adapter[name](x)`.
        """
        ...

    def for_decoding(self: Self) -> Self:
        """Return this decoder in the form that decodes fastest; called once before the loop."""
        ...

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Embed token ids `[..., T]` int32 as vectors `[..., T, D]`."""
        ...

    def hidden_states(
        self,
        x: jax.Array,
        length: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        visible: jax.Array | None = None,
    ) -> jax.Array:
        """Compute hidden states `[B, T, D]`, after the final norm.

        Args:
            x: `[B, T, D]` vectors, padded on the right.
            length: `[B]` int32, number of real vectors of each row; all `T` by default.
            positions: `[B, T]` int32, position of each vector; 0 to `T - 1` by default. It is
                passed together with `visible` and without `length`, and only where all events are
                woven in one pass (`latents_see_latents=False`).
            visible: `[B, T, T]` bool, whether a vector (axis 1) attends to another (axis 2); causal
                by default.
        """
        ...

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Compute logits `[..., V]` float32 from hidden states `[..., D]`."""
        ...

    def init_cache(self, batch: int, max_len: int) -> Any:
        """Make an empty cache for `batch` rows of up to `max_len` vectors."""
        ...

    def extend(
        self, cache: Any, x: jax.Array, length: jax.Array, *, fresh: bool = False
    ) -> tuple[jax.Array, Any]:
        """Append vectors to each row.

        Args:
            cache: Cache of the vectors so far; it stays usable after the call.
            x: `[B, C, D]` vectors, padded on the right.
            length: `[B]` int32, number of real new vectors of each row; 0 leaves a row unchanged.
            fresh: Static promise of the caller that the cache is empty.

        Returns:
            Hidden states `[B, C, D]` of the new vectors, and the cache after them.
        """
        ...


METHODS = (
    "embed_dim",
    "vocab_size",
    "lora_targets",
    "apply_lora",
    "for_decoding",
    "embed_tokens",
    "hidden_states",
    "unembed",
    "init_cache",
    "extend",
)


def check_backbone(backbone: Any, role: str) -> None:
    """Raise a ValueError, which names the `role`, unless an object is a `DecoderBackbone`."""
    gives_one = callable(getattr(type(backbone), "backbone", None))  # not an attribute of its own
    if gives_one and backbone.backbone() is not backbone:
        raise ValueError(
            f"{type(backbone).__name__} can't be a {role}, it reads tokens: pass its backbone()"
        )
    missing = [name for name in METHODS if not hasattr(type(backbone), name)]
    missing = [name for name in missing if not hasattr(backbone, name)]
    if missing:
        raise ValueError(
            f"{type(backbone).__name__} can't be a {role}: it has no {', '.join(missing)} "
            "(see memgen.DecoderBackbone)"
        )
    if getattr(backbone, "can_forget", False) and not hasattr(backbone, "extend_keeping"):
        raise ValueError(
            f"{type(backbone).__name__} can't be a {role}: it has can_forget={backbone.can_forget} "
            "and no extend_keeping: add it (see memgen.DecoderBackbone), or leave can_forget out"
        )


def cache_batch_axes(decoder: Any, cache: Any) -> Any:
    """Pytree like `cache` with each array's axis of rows; None for an array that all rows share."""
    if hasattr(decoder, "cache_batch_axes"):
        return decoder.cache_batch_axes(cache)
    return jax.tree.map(lambda leaf: 0 if leaf.ndim else None, cache)


def check_cache(decoder: Any) -> None:
    """Raise a ValueError if a cache's axes that grow with the batch are not `cache_batch_axes`."""
    mesh = jax.sharding.get_abstract_mesh()  # a cache may name an explicit axis for its rows
    parts = math.prod(mesh.shape[name] for name in mesh.explicit_axes)
    rows = 2 * parts, 3 * parts
    few, more = (jax.eval_shape(lambda count=count: decoder.init_cache(count, 8)) for count in rows)

    def check(path, two, three, axis):
        sizes = list(zip(two.shape, three.shape, strict=True))
        expected = [] if axis is None else [(axis, rows)]
        if [(at, pair) for at, pair in enumerate(sizes) if len(set(pair)) > 1] != expected:
            raise ValueError(
                f"init_cache of {type(decoder).__name__} gives {jax.tree_util.keystr(path)} the "
                f"shape {two.shape} for {rows[0]} rows and {three.shape} for {rows[1]}, which is "
                f"not axis {axis}: name the axis of the rows (cache_batch_axes of "
                "memgen.DecoderBackbone)"
            )

    jax.tree_util.tree_map_with_path(check, few, more, cache_batch_axes(decoder, few))

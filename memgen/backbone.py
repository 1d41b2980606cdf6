"""Interface of decoders for MemGen: hidden states of input vectors, a cache, LoRA adapters."""

import math
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import jax

Self = TypeVar("Self", bound="DecoderBackbone")


class DecoderBackbone(Protocol):
    """Interface of a causal decoder whose input is a batch of vector sequences.

    The vectors of a row have the positions 0, 1, ... without gaps, and appended vectors have the
    next positions, so callers normally pass no positions. Calls of `extend`, with any split of a
    row into parts, must give the hidden states that one call of `hidden_states` gives.
    Implementations are pytrees (such as an `nnx.Module`), and JAX can trace all methods.

    Optionally, a decoder has a static attribute `can_forget = True` and a method
    `extend_keeping(cache, x, length, kept)`. The method returns the same hidden states as `extend`,
    but a cache that keeps only the first `kept [B]` of the new vectors. With this method, one
    forward pass computes a weaver's queries together with the vectors before them, and a long
    training text is processed once, over a cache, instead of once for each event.

    A cache may be any pytree. By default, axis 0 of each array in the cache indexes the rows, and
    all rows share a scalar. A decoder with another layout has a method `cache_batch_axes(cache)`,
    which returns a pytree like the cache that holds the row axis of each array, or None for an
    array that all rows share.

    The parameters of adapters have axis names (for `nnx.get_partition_spec`) if the decoder is an
    `nnx.Module` whose targets are its linear layers (`memgen.linear_layers`), or if the decoder has
    an attribute `lora_axes`: a mapping from a target's name to the names of its axes,
    `(stack, inputs, outputs)`, such as `(("layers",), "embed", "heads")`.

    Attributes:
        embed_dim: Width `D` of the vectors.
        vocab_size: Size `V` of the vocabulary.
        lora_targets: Linear layers that accept an adapter: a mapping from a layer's name to
            `(stack, inputs, outputs)`. `stack` is the shape of the kernel's stacked leading axes
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
        """Return a copy of the decoder with adapters; the copy shares the decoder's arrays.

        Args:
            adapter: Mapping from the name of a linear layer to the layer's adapter, a callable. The
                adapted layer maps `x` to its unadapted output plus `adapter[name](x)`.
        """
        ...

    def for_decoding(self: Self) -> Self:
        """Return this decoder in its fastest form for decoding; called once before a loop."""
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
            length: `[B]` int32, number of real vectors in each row; all `T` by default.
            positions: `[B, T]` int32, position of each vector; 0 to `T - 1` by default. Callers
                pass `positions` only together with `visible` and without `length`, to weave all
                events in one forward pass (`latents_see_latents=False`).
            visible: `[B, T, T]` bool attention mask, True where the vector on axis 1 attends to the
                vector on axis 2; a causal mask by default.
        """
        ...

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Compute logits `[..., V]` float32 from hidden states `[..., D]`, position by position."""
        ...

    def init_cache(self, batch: int, max_len: int) -> Any:
        """Make an empty cache for `batch` rows of up to `max_len` vectors."""
        ...

    def extend(
        self, cache: Any, x: jax.Array, length: jax.Array, *, fresh: bool = False
    ) -> tuple[jax.Array, Any]:
        """Append vectors to each row of a cache, and compute the hidden states of these vectors.

        Args:
            cache: Cache of the earlier vectors, from `init_cache` or `extend`; it is not modified.
            x: `[B, C, D]` up to `C` new vectors of each row, padded on the right.
            length: `[B]` int32, number of real new vectors in each row; 0 leaves a row unchanged.
            fresh: Whether the caller guarantees that the cache is empty (static).

        Returns:
            Hidden states `[B, C, D]` of the new vectors, and the extended cache.
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
    """Raise a ValueError unless `backbone` is a `DecoderBackbone`; the message names its `role`."""
    # A method of the class: an attribute `backbone` of the instance does not count.
    gives_one = callable(getattr(type(backbone), "backbone", None))
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
    """Return the row axis of each array in the cache of a `DecoderBackbone`.

    The result is a pytree like `cache`, with None for an array that all rows share.
    """
    if hasattr(decoder, "cache_batch_axes"):
        return decoder.cache_batch_axes(cache)
    return jax.tree.map(lambda leaf: 0 if leaf.ndim else None, cache)


def check_cache(decoder: Any) -> None:
    """Raise a ValueError unless `cache_batch_axes` are the axes that grow with the batch size.

    Args:
        decoder: A `DecoderBackbone`, whose `init_cache` is evaluated for two batch sizes.
    """
    mesh = jax.sharding.get_abstract_mesh()  # explicit mesh axes may shard the rows of a cache
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

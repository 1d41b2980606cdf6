"""The interface of a decoder for MemGen: vectors in, hidden states out, a cache, adapters."""

import math
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import jax

Self = TypeVar("Self", bound="DecoderBackbone")


class DecoderBackbone(Protocol):
    """A causal decoder over rows of vectors.

    The vectors of a row stand at its first positions, without holes, and what is appended takes the
    next ones; so no position is passed. Any split of a row into calls of `extend` gives the hidden
    states that one call of `hidden_states` gives. Implementations are pytrees (an `nnx.Module` is
    one), and all methods are traced.

    A decoder may have a method `extend_keeping(cache, x, length, kept)` and a true static attribute
    `can_forget`: `extend`, after which the cache holds the first `kept [B]` of the vectors alone.
    Then a weaver's queries are computed together with the text before them, and long training
    texts are read once, over a cache, and not once for each event.

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
        lora_targets: Linear layers that an adapter can be added to, by name: the shape of the stack
            that holds the layer (`()` for a layer of its own, `(layers,)` for one that blocks hold
            in a stack), its number of inputs, and its number of outputs.
    """

    @property
    def embed_dim(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def lora_targets(self) -> Mapping[str, tuple[tuple[int, ...], int, int]]: ...

    def apply_lora(self: Self, adapter: Mapping[str, Any]) -> Self:
        """The decoder with adapters, over the same arrays.

        Args:
            adapter: Adapters by the name of a linear layer; the layer's output of `x` becomes its
                own output plus `adapter[name](x)`.
        """
        ...

    def for_decoding(self: Self) -> Self:
        """The decoder in the form that decodes fastest; called once, before the loop."""
        ...

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Embeddings `[..., T, D]` of token ids `[..., T]` int32."""
        ...

    def hidden_states(
        self,
        x: jax.Array,
        length: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        visible: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states `[B, T, D]` after the final norm.

        Args:
            x: `[B, T, D]` vectors, padded on the right.
            length: `[B]` int32, number of real vectors of each row; all `T` by default.
            positions: `[B, T]` int32, position of each vector, together with `visible` in place of
                `length`. Only weaving in one pass (`latents_see_latents=False`) passes the two.
            visible: `[B, T, T]` bool, whether a vector (axis 1) attends to another (axis 2).
        """
        ...

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits `[..., V]` float32 of hidden states `[..., D]`."""
        ...

    def init_cache(self, batch: int, max_len: int) -> Any:
        """An empty cache for `batch` rows of up to `max_len` vectors."""
        ...

    def extend(
        self, cache: Any, x: jax.Array, length: jax.Array, *, fresh: bool = False
    ) -> tuple[jax.Array, Any]:
        """Append vectors to each row.

        Args:
            cache: Cache of the vectors so far; it stays usable.
            x: `[B, C, D]` vectors, padded on the right.
            length: `[B]` int32, number of real vectors of each row; a row of 0 stays as it is.
            fresh: Static promise that the cache is empty.

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
    """Raise a ValueError if the object lacks a method of `DecoderBackbone`."""
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
    """The axis of the rows in each array of a cache, None for an array that all rows share."""
    if hasattr(decoder, "cache_batch_axes"):
        return decoder.cache_batch_axes(cache)
    return jax.tree.map(lambda leaf: 0 if leaf.ndim else None, cache)


def check_cache(decoder: Any) -> None:
    """Raise a ValueError unless exactly the axis of the rows grows with the number of rows."""
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

"""What MemGen asks of a decoder: vectors in, hidden states out, a cache, adapters."""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import jax

Self = TypeVar("Self", bound="DecoderBackbone")


class DecoderBackbone(Protocol):
    """A causal decoder over rows of vectors.

    A row has no holes: what is appended takes the row's next positions, so no position is ever
    passed. Any split of a row into calls of `extend` gives what one `read` gives. Implementations
    are pytrees (an `nnx.Module` is one); all methods are traced.

    Attributes:
        embed_dim: width `D` of the vectors.
        vocab_size: `V`.
        adaptable: the maps that an adapter can stand beside, by name: stacked axes (`()` for a
            map of its own, `(layers,)` for one that blocks hold in a stack), inputs, outputs.
    """

    @property
    def embed_dim(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def lora_targets(self) -> Mapping[str, tuple[tuple[int, ...], int, int]]: ...

    def apply_lora(self: Self, adapter: Mapping[str, Any]) -> Self:
        """The same arrays with `adapter[name](x)` added to what map `name` makes of `x`."""
        ...

    def for_decoding(self: Self) -> Self:
        """The form that decodes fastest; asked for once, outside of the loop."""
        ...

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Ids `[..., T]` int32 to vectors `[..., T, D]`."""
        ...

    def hidden_states(
        self,
        x: jax.Array,
        length: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        visible: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states `[B, T, D]` after the final norm, of vectors `x [B, T, D]`.

        Args:
            length: `[B]` int32, real vectors of each row, which stand first.
            positions, visible: `[B, T]` int32 and `[B, T, T]` bool in place of `length`: where
                each vector stands and what it sees. Only one-pass weaving asks for this.
        """
        ...

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Hidden states `[..., D]` to logits `[..., V]` float32."""
        ...

    def init_cache(self, batch: int, max_len: int) -> Any:
        """An empty cache with room for `max_len` vectors in each row.

        Each of its arrays has one axis of size `batch`, a place for each row, or counts no rows.
        """
        ...

    def extend(
        self, cache: Any, x: jax.Array, length: jax.Array, *, fresh: bool = False
    ) -> tuple[jax.Array, Any]:
        """Append the first `length [B]` vectors of `x [B, C, D]` to each row; 0 leaves it alone.

        Args:
            fresh: static promise that the cache is empty.

        Returns:
            hidden states `[B, C, D]`, and the new cache; the old one stays usable.
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
    """Raise a ValueError for what a `DecoderBackbone` has and this does not."""
    missing = [name for name in METHODS if not hasattr(type(backbone), name)]
    missing = [name for name in missing if not hasattr(backbone, name)]
    if missing:
        raise ValueError(
            f"{type(backbone).__name__} can't be a {role}: it has no {', '.join(missing)} "
            "(see memgen.DecoderBackbone)"
        )

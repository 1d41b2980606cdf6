"""Base class for decoders without a cache, which recompute the whole prefix: slow but exact."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from memgen.module import Module
from memgen.placement import embed
from memgen.session import put, take
from memgen.short_repr import ShortRepr


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Rows(ShortRepr):
    """Cache of `Uncached`: all input vectors so far.

    Attributes:
        vectors: `[B, N, D]` vectors with capacity `N`, padded on the right.
        length: `[B]` int32, number of real vectors in each row.
    """

    vectors: jax.Array
    length: jax.Array


class Uncached(Module):
    """Base class for a `DecoderBackbone` without a key-value cache.

    Each call of `extend` recomputes `hidden_states` of all vectors so far. A subclass must define
    `embed_dim`, `vocab_size`, `lora_targets`, `apply_lora`, `embed_tokens`, `hidden_states` and
    `unembed`, and may override `init_cache` and `extend` with faster methods.
    """

    def for_decoding(self):
        """Return the decoder itself."""
        return self

    def init_cache(self, batch: int, max_len: int) -> Rows:
        """Make an empty cache for `batch` rows of up to `max_len` vectors."""
        decoder: Any = self
        vector = jax.eval_shape(embed, decoder, jnp.zeros((1,), jnp.int32))
        return Rows(
            jnp.zeros((batch, max_len, vector.shape[-1]), vector.dtype),
            jnp.zeros((batch,), jnp.int32),
        )

    def extend(
        self, cache: Rows, x: jax.Array, length: jax.Array, *, fresh: bool = False
    ) -> tuple[jax.Array, Rows]:
        """Append vectors as `DecoderBackbone.extend` does, by a forward pass over all vectors.

        Rows that would exceed the cache's `max_len` vectors get hidden states of NaN.
        """
        decoder: Any = self
        vectors = put(cache.vectors, x, cache.length, length)
        after = cache.length + length
        hidden = decoder.hidden_states(vectors, after)
        hidden = take(hidden, cache.length[:, None] + jnp.arange(x.shape[1]))
        full = (after > vectors.shape[1])[:, None, None]
        return jnp.where(full, jnp.nan, hidden), Rows(vectors, after)

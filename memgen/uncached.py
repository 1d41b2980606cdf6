"""A cache for decoders that have none: read everything again. Slow, and right."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memgen.session import put, take


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Vectors `[B, N, D]` so far, and how many of each row are real, `[B]`."""

    vectors: jax.Array
    length: jax.Array


class Uncached(nnx.Module):
    """What is left of a `DecoderBackbone` once `read` is there.

    Derive from it, and add `embed_dim`, `vocab_size`, `lora_targets`, `apply_lora`, `embed_tokens`,
    `read` and `unembed`; replace `init_cache` and `extend` by real ones for speed.
    """

    def for_decoding(self):
        return self

    def init_cache(self, batch: int, max_len: int) -> Rows:
        """Room for `max_len` vectors in each row."""
        me: Any = self
        vector = jax.eval_shape(me.embed_tokens, jnp.zeros((1,), jnp.int32))
        return Rows(
            jnp.zeros((batch, max_len, vector.shape[-1]), vector.dtype),
            jnp.zeros((batch,), jnp.int32),
        )

    def extend(
        self, cache: Rows, x: jax.Array, length: jax.Array, *, fresh: bool = False
    ) -> tuple[jax.Array, Rows]:
        """Hidden states `[B, C, D]` of the appended vectors, from all rows read again."""
        me: Any = self
        vectors = put(cache.vectors, x, cache.length, length)
        after = cache.length + length
        hidden = me.hidden_states(vectors, after)
        hidden = take(hidden, cache.length[:, None] + jnp.arange(x.shape[1]))
        full = (after > vectors.shape[1])[:, None, None]
        return jnp.where(full, jnp.nan, hidden), Rows(vectors, after)

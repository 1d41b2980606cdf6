"""A small ordinary decoder in plain Flax NNX, which knows nothing of this project."""

import jax
import jax.numpy as jnp
from flax import nnx


class ForeignBlock(nnx.Module):
    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.norm1, self.norm2 = nnx.LayerNorm(dim, rngs=rngs), nnx.LayerNorm(dim, rngs=rngs)
        self.q, self.k, self.v, self.o = (nnx.Linear(dim, dim, rngs=rngs) for _ in range(4))
        self.up = nnx.Linear(dim, 2 * dim, rngs=rngs)
        self.down = nnx.Linear(2 * dim, dim, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        y = self.norm1(x)
        query, key, value = (
            part(y).reshape(*y.shape[:2], self.heads, -1) for part in (self.q, self.k, self.v)
        )
        weights = jnp.einsum("bthk,bshk->bhts", query, key) / query.shape[-1] ** 0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None], weights, -1e9), axis=-1)
        mixed = jnp.einsum("bhts,bshk->bthk", weights, value).reshape(y.shape)
        x = x + self.o(mixed)
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class ForeignDecoder(nnx.Module):
    """Learned positions, a head of its own."""

    def __init__(
        self, vocab: int, dim: int, depth: int, heads: int, max_len: int, *, rngs: nnx.Rngs
    ):
        self.embed = nnx.Embed(vocab, dim, rngs=rngs)
        self.place = nnx.Embed(max_len, dim, rngs=rngs)
        self.blocks = nnx.List([ForeignBlock(dim, heads, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.head = nnx.Linear(dim, vocab, use_bias=False, rngs=rngs)

    def hidden(self, x: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        """Vectors `[B, T, D]` at `positions [B, T]`, seeing `mask [B, T, T]`, to `[B, T, D]`."""
        x = x + self.place(positions)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

import jax
import jax.numpy as jnp
from flax import nnx


class Block(nnx.Module):
    def __init__(self, width, heads, *, rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.qkv = nnx.LinearGeneral(width, (3, heads, width // heads), rngs=rngs)
        self.o = nnx.Linear(width, width, rngs=rngs)
        self.up, self.down = (
            nnx.Linear(*sizes, rngs=rngs) for sizes in ((width, 4 * width), (4 * width, width))
        )

    def __call__(self, x, visible):
        query, key, value = jnp.moveaxis(self.qkv(self.norm1(x)), 2, 0)
        mixed = jax.nn.dot_product_attention(query, key, value, mask=visible[:, None])
        x = x + self.o(mixed.reshape(x.shape))
        x = x + self.down(jax.nn.gelu(self.up(self.norm2(x))))
        return x


class GPT2(nnx.Module):
    def __init__(self, vocab, context, width, depth, heads, *, rngs):
        self.wte, self.wpe = (nnx.Embed(n, width, rngs=rngs) for n in (vocab, context))
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, tokens, mask):
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        x = self.wte(tokens) + self.wpe(positions)
        visible = jnp.tril(mask[:, None, :] & mask[:, :, None])
        for block in self.blocks:
            x = block(x, visible)
        return self.wte.attend(self.norm(x))

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P


def rotate(x, positions):
    angle = positions[..., None, None] * 1e6 ** (-jnp.arange(0, x.shape[-1], 2) / x.shape[-1])
    (low, high), cos, sin = jnp.split(x, 2, axis=-1), jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


class Block(nnx.Module):
    def __init__(self, width, heads, kv_heads, head_dim, *, rngs):
        self.attention_norm, self.mlp_norm = (nnx.RMSNorm(width, rngs=rngs) for _ in range(2))
        self.q_norm, self.k_norm = (nnx.RMSNorm(head_dim, rngs=rngs) for _ in range(2))
        self.q, self.k, self.v, self.o = (
            nnx.Einsum(equation, shape, rngs=rngs)
            for equation, shape in (
                ("BTD,DNH->BTNH", (width, heads, head_dim)),
                ("BTD,DNH->BTNH", (width, kv_heads, head_dim)),
                ("BTD,DNH->BTNH", (width, kv_heads, head_dim)),
                ("BTNH,NHD->BTD", (heads, head_dim, width)),
            )
        )
        self.up, self.gate, self.down = (
            nnx.Linear(*sizes, use_bias=False, rngs=rngs)
            for sizes in ((width, 2 * width), (width, 2 * width), (2 * width, width))
        )

    def __call__(self, x, first=0, cache=None):
        y, positions = self.attention_norm(x), first + jnp.arange(x.shape[1])[None]
        query, key, value = self.q_norm(self.q(y)), self.k_norm(self.k(y)), self.v(y)
        query, key = rotate(query, positions), rotate(key, positions)
        if cache is not None:
            put = lambda stored, new: jax.lax.dynamic_update_slice(stored, new, (0, first, 0, 0))  # noqa: E731
            key, value = cache = jax.tree.map(put, cache, (key, value))
        visible = positions[..., None] >= jnp.arange(key.shape[1])
        mixed = jax.nn.dot_product_attention(query, key, value, mask=visible[:, None])
        x = x + self.o(mixed)
        y = self.mlp_norm(x)
        x = x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))
        return x, cache

    def init_cache(self, batch, slots):
        shape = (batch, slots, *self.k.kernel.shape[1:])
        return tuple(jnp.zeros(shape, out_sharding=P("data")) for _ in range(2))


class Decoder(nnx.Module):
    def __init__(self, vocab, width, depth, heads, kv_heads, head_dim, *, rngs):
        self.table = nnx.Embed(vocab, width, rngs=rngs)
        sizes = (width, heads, kv_heads, head_dim)
        self.blocks = nnx.List([Block(*sizes, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)

    def embed(self, tokens):
        return self.table(tokens, out_sharding=P("data"))

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x, _ = block(x)
        return self.table.attend(self.norm(x))

    def init_cache(self, batch, max_tokens):
        return 0, [block.init_cache(batch, max_tokens) for block in self.blocks]

    def extend(self, cache, tokens):
        first, layers = cache
        x, after = self.embed(tokens), []
        for block, layer in zip(self.blocks, layers, strict=True):
            x, layer = block(x, first, layer)
            after.append(layer)
        return self.table.attend(self.norm(x)), (first + tokens.shape[1], after)

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        heads = (self.heads, x.shape[-1] // self.heads)
        y = nn.LayerNorm()(x)
        query, key, value = (nn.DenseGeneral(heads, name=name)(y) for name in "qkv")
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="o")(mixed)
        y = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y)


class Decoder(nn.Module):
    vocab: int
    context: int
    width: int
    heads: int

    def setup(self):
        self.embed = nn.Embed(self.vocab, self.width)
        self.position = nn.Embed(self.context, self.width)
        self.lower, self.upper = Block(self.heads), Block(self.heads)
        self.norm = nn.LayerNorm()

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))
        x = self.upper(self.lower(x))
        return self.embed.attend(self.norm(x))

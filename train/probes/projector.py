"""A trained projector from image features to soft tokens, which a frozen decoder reads.

A row consists of the tokens that begin every text, the soft tokens of an image, and the text. The
decoder gets a row as vectors (`Architecture.backbone`), like the latents of MemGen, so that the
probe works with any architecture.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memgen import token_log_probs
from thoughtbubbles import Architecture

SAMPLED_IDS = 1024


class ProjectorParam(nnx.Param):
    """Parameter of a projector of image features."""


class Projector(nnx.Module):
    """Two-layer MLP from the features of each image patch to soft tokens.

    With features f_p and a learned vector e_p of patch p, z_p = W₂ gelu(W₁ f_p + e_p) + b₂. The
    vector z_p is divided into M soft tokens z of width D, and each soft token is scaled to
    g z / rms(z) with a learned gain g.

    Args:
        shape: Number of patches P of an image, and number of features F of a patch.
        tokens: Number of soft tokens M of each patch.
        hidden: Width of the hidden layer.
        embed_dim: Width D of the decoder's vectors.
        gain: Initial value of g, a scalar: the root mean square of the decoder's embeddings.
        rngs: PRNG keys of the initial values.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        tokens: int,
        hidden: int,
        embed_dim: int,
        gain: jax.Array,
        *,
        rngs: nnx.Rngs,
    ):
        count, features = shape
        normal = lambda *size: jax.random.normal(rngs.params(), size) * size[0] ** -0.5  # noqa: E731
        self.shape, self.tokens = shape, tokens
        self.inputs = ProjectorParam(normal(features, hidden))
        self.patch = ProjectorParam(jax.random.normal(rngs.params(), (count, hidden)) * 0.5)
        self.outputs = ProjectorParam(normal(hidden, tokens * embed_dim))
        self.bias = ProjectorParam(jnp.zeros(tokens * embed_dim))
        self.gain = ProjectorParam(gain.astype(jnp.float32))

    def __call__(self, features: jax.Array) -> jax.Array:
        """Compute the soft tokens `[B, P * M, D]` float32 of features `[B, P, F]`.

        Raises:
            ValueError: The number of patches or of features differs from `shape`.
        """
        if features.ndim != 3 or features.shape[1:] != self.shape:
            raise ValueError(
                f"features of shape {features.shape}: this projector reads rows of {self.shape[0]} "
                f"patches of {self.shape[1]} numbers; cut images as it was made for"
            )
        hidden = jax.nn.gelu(features @ self.inputs[...] + self.patch[...])
        z = hidden @ self.outputs[...] + self.bias[...]
        z = z.reshape(len(z), self.shape[0] * self.tokens, -1)
        size = jnp.sqrt(jnp.square(z).mean(axis=-1, keepdims=True))
        return self.gain[...] * z / jnp.maximum(size, 1e-12)


class SeeingModel(nnx.Module):
    """Frozen decoder with an image projector, which computes log-probabilities of answers.

    Args:
        model: Decoder. It stays frozen if only `ProjectorParam`s are trained.
        shape: Number of patches of an image, and number of features of a patch.
        tokens: Number of soft tokens of each patch.
        hidden: Width of the projector's hidden layer.
        before: Number of tokens at the start per row that precede the soft tokens.
        rngs: PRNG keys of the projector's initial values.

    Raises:
        ValueError: The decoder's policy is not causal, so that forks depend on the answer; or a
            token has several hidden states (`merge="probability"`).
    """

    def __init__(
        self,
        model: Architecture,
        shape: tuple[int, int],
        tokens: int,
        hidden: int,
        before: int,
        *,
        rngs: nnx.Rngs,
    ):
        if not model.config.causal:
            raise ValueError(
                f"{model.fork_policy} lets the answer decide what forks before it: probe a model "
                "of a causal policy"
            )
        decoder = model.backbone()
        self.model, self.before = model, before
        gain = embedding_rms(decoder)
        self.projector = Projector(shape, tokens, hidden, decoder.embed_dim, gain, rngs=rngs)

    def log_probs(
        self, tokens: jax.Array, scored: jax.Array, features: jax.Array | None
    ) -> jax.Array:
        """Compute the log-probabilities of the scored tokens.

        Args:
            tokens: Token ids `[B, L]` int32 of rows of L tokens, padded with -1 on the right.
            scored: Mask `[B, L]` bool of the tokens that are scored. The first `before + 1` tokens
                of a row are never scored.
            features: F features of each of P patches of each row's image, `[B, P, F]`; None for
                rows without soft tokens.

        Returns:
            Log-probabilities `[B, L - before - 1]` float32 of the tokens from index `before + 1`
            on; 0 for tokens that are not scored.
        """
        decoder = self.model.backbone()
        inputs = tokens[:, :-1]
        x = decoder.embed_tokens(jnp.maximum(inputs, 0))
        length = (inputs >= 0).sum(axis=1, dtype=jnp.int32)
        count = 0
        if features is not None:
            soft = self.projector(features).astype(x.dtype)
            x = jnp.concatenate([x[:, : self.before], soft, x[:, self.before :]], axis=1)
            count = soft.shape[1]
        hidden = decoder.hidden_states(x, length + count)[:, count + self.before :]
        targets, mask = tokens[:, self.before + 1 :], scored[:, self.before + 1 :]
        return token_log_probs(decoder, hidden, jnp.maximum(targets, 0), mask)


def answer_loss(
    model: SeeingModel, batch: dict[str, jax.Array], key: jax.Array
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Compute the `train.engine.step.Loss` of rows: summed nats and number of answer tokens.

    Args:
        model: Frozen decoder with the projector that is trained.
        batch: Dict of `tokens`, `scored` and `features`, the arguments of `SeeingModel.log_probs`.
        key: PRNG key, which is not used.
    """
    found = model.log_probs(batch["tokens"], batch["scored"], batch["features"])
    return -found.sum(), batch["scored"].sum(dtype=jnp.float32), {}


def embedding_rms(decoder: Any) -> jax.Array:
    """Compute the root mean square of token embeddings, over at most 1,024 evenly spaced ids.

    Args:
        decoder: Decoder, a `memgen.DecoderBackbone`.
    """
    count = min(decoder.vocab_size, SAMPLED_IDS)
    ids = jnp.asarray(np.linspace(0, decoder.vocab_size - 1, count).astype(np.int32))
    return jnp.sqrt(jnp.square(decoder.embed_tokens(ids).astype(jnp.float32)).mean())

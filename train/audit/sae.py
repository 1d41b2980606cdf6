"""TopK sparse autoencoders (arXiv 2406.04093): features of activations, as pure functions."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from thoughtbubbles.short_repr import ShortRepr, short_repr

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int

ADAM_EPS = 6.25e-10
MEDIAN_STEPS = 100


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class SparseAutoencoder(ShortRepr):
    """TopK sparse autoencoder: an activation is a sum of at most `k` of F learned directions.

    Attributes:
        encoder: `[D, F]` float32, the direction that each feature reads.
        encoder_bias: `[F]` float32, bias of the preactivations.
        decoder: `[F, D]` float32, the direction of unit norm that each feature writes.
        bias: `[D]` float32, subtracted before encoding and added after decoding (b_pre).
        norm: float32 scalar, root mean square of the norms of activations. Activations are divided
            by this norm before encoding. The norm is not trained.
        k: Maximum number of active features of an activation (static).
    """

    encoder: jax.Array
    encoder_bias: jax.Array
    decoder: jax.Array
    bias: jax.Array
    norm: jax.Array
    k: int = dataclasses.field(metadata={"static": True})

    def check_width(self, width: int) -> None:
        """Raise a ValueError if activations of this width do not fit the autoencoder."""
        if width != self.bias.shape[0]:
            raise ValueError(
                f"a sparse autoencoder of width {self.bias.shape[0]} for activations of width "
                f"{width}: train one for this site (thoughtbubbles audit sae)"
            )

    def features(self, x: Float[Array, "... D"]) -> Features:
        """Return the active features of activations, which are not yet divided by `norm`."""
        self.check_width(x.shape[-1])
        return top_features(self, preactivations(self, x.astype(jnp.float32) / self.norm))

    def reconstruct(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Reconstruct activations from their features, in the activations' own scale and dtype."""
        features = self.features(x)
        return ((decode(self, features) + self.bias) * self.norm).astype(x.dtype)


class Features(NamedTuple):
    """The `K` largest features of each activation, where `K` is the autoencoder's `k`.

    Attributes:
        value: `[..., K]` float32, value of each feature, 0 if the feature is not active.
        index: `[..., K]` int32, index of each feature.
    """

    value: jax.Array
    index: jax.Array

    __repr__ = short_repr


def geometric_median(x: Float[np.ndarray, "N D"]) -> np.ndarray:
    """Compute the point `[D]` with the least sum of distances to all rows (Weiszfeld's method)."""
    x = np.asarray(x, np.float64)
    point = x.mean(axis=0)
    for _ in range(MEDIAN_STEPS):
        weight = 1 / np.maximum(np.linalg.norm(x - point, axis=1), 1e-12)
        moved = (weight[:, None] * x).sum(axis=0) / weight.sum()
        close = np.linalg.norm(moved - point) <= 1e-7 * (1 + np.linalg.norm(point))
        point = moved
        if close:
            break
    return point.astype(np.float32)


def init_sae(sample: np.ndarray, features: int, k: int, seed: int) -> SparseAutoencoder:
    """Initialise an autoencoder for activations like a sample of them.

    Decoder rows are random unit vectors, the encoder is the decoder's transpose, and the bias is
    the geometric median of the sample.

    Args:
        sample: Activations `[N, D]`.
        features: Number of features (F).
        k: Maximum number of active features of an activation.
        seed: Seed of the directions.

    Raises:
        ValueError: `k` is not from 1 to `F`, or all activations are 0.
    """
    if not 1 <= k <= features:
        raise ValueError(f"k={k} of {features} features: choose 1 to {features}")
    norm = np.sqrt(np.square(sample.astype(np.float64)).sum(axis=1).mean())
    if not norm > 0:
        raise ValueError("all activations of this site are 0: choose another site")
    rows = np.random.default_rng(seed).normal(size=(features, sample.shape[1]))
    decoder = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    bias = geometric_median(sample / norm)
    return SparseAutoencoder(
        encoder=jnp.asarray(decoder.T.copy()),
        encoder_bias=jnp.zeros(features),
        decoder=jnp.asarray(decoder),
        bias=jnp.asarray(bias),
        norm=jnp.float32(norm),
        k=k,
    )


def preactivations(sae: SparseAutoencoder, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    """Compute the preactivations of all features for activations `x` divided by `sae.norm`."""
    return (x - sae.bias) @ sae.encoder + sae.encoder_bias


def top_features(sae: SparseAutoencoder, before: Float[Array, "... F"]) -> Features:
    """Keep the `k` largest preactivations, and apply a ReLU to them."""
    value, index = jax.lax.top_k(before, sae.k)
    return Features(jax.nn.relu(value), index)


def decode(sae: SparseAutoencoder, features: Features) -> Float[Array, "... D"]:
    """Sum the decoder rows of active features, weighted by their values, without the bias."""
    rows = jnp.take(sae.decoder, features.index, axis=0)
    return jnp.einsum("...k,...kd->...d", features.value, rows)


class Losses(NamedTuple):
    """Losses of a batch, and which features were active.

    Attributes:
        fvu: Fraction of variance unexplained, `sum ||x - x'||^2 / sum ||x - mean||^2`.
        auxk: Squared error with which dead features reconstruct the residual `x - x'`, divided by
            the same variance, and multiplied by `min(number of dead features / k_aux, 1)`; 0 if no
            feature is dead.
        l0: Mean number of active features of an activation.
        fired: Whether each feature was active in the batch, `[F]` bool.
    """

    fvu: jax.Array
    auxk: jax.Array
    l0: jax.Array
    fired: jax.Array


def losses(
    sae: SparseAutoencoder, x: Float[Array, "N D"], dead: Bool[Array, " F"], k_aux: int
) -> Losses:
    """Compute the losses of activations that are divided by `sae.norm`.

    Args:
        sae: Autoencoder.
        x: Activations `[N, D]`.
        dead: Whether each feature counts as dead, `[F]` bool.
        k_aux: Number of dead features that reconstruct each residual.
    """
    before = preactivations(sae, x)
    features = top_features(sae, before)
    rest = x - decode(sae, features) - sae.bias
    variance = jnp.square(x - x.mean(axis=0)).sum()
    fvu = jnp.square(rest).sum() / variance
    value, index = jax.lax.top_k(jnp.where(dead, before, -jnp.inf), k_aux)
    guess = decode(sae, Features(jax.nn.relu(value), index))
    share = jnp.minimum(dead.sum() / k_aux, 1)
    auxk = share * jnp.square(jax.lax.stop_gradient(rest) - guess).sum() / variance
    auxk = jnp.where(dead.any(), auxk, 0)
    active = features.value > 0
    # Values that are 0 go to a slot behind the last feature.
    index = jnp.where(active, features.index, dead.size)
    fired = jnp.zeros(dead.size + 1, bool).at[index.reshape(-1)].set(True)[:-1]
    return Losses(fvu, auxk, active.sum(axis=-1).mean(), fired)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class SAEState(ShortRepr):
    """State of an autoencoder's training.

    Attributes:
        sae: Autoencoder.
        optimizer: State of Adam.
        idle: `[F]` int32, number of activations since each feature was last active.
    """

    sae: SparseAutoencoder
    optimizer: Any
    idle: jax.Array


@dataclasses.dataclass(frozen=True)
class SAETraining:
    """Training of an autoencoder: Adam, the AuxK loss, and decoder rows of unit norm.

    Attributes:
        learning_rate: Learning rate of Adam.
        aux_weight: Weight of the AuxK loss.
        dead_after: Number of activations after which an inactive feature counts as dead.
    """

    learning_rate: float
    aux_weight: float = 1 / 32
    dead_after: int = 1_000_000

    def start(self, sae: SparseAutoencoder) -> SAEState:
        """Return the state before the first step."""
        idle = jnp.zeros(sae.encoder_bias.shape, jnp.int32)
        return SAEState(sae, self._adam().init(_trained(sae)), idle)

    def step(
        self, state: SAEState, x: Float[Array, "N D"]
    ) -> tuple[SAEState, dict[str, jax.Array]]:
        """Take one step on a batch of activations, which are not yet divided by `norm`.

        Returns:
            State after the step, and the scalar metrics "fvu", "auxk", "l0" and "dead", which is
            the fraction of dead features.
        """
        sae = state.sae
        x = x.astype(jnp.float32) / sae.norm
        dead = state.idle >= self.dead_after
        k_aux = min(max(x.shape[1] // 2, 1), sae.encoder_bias.shape[0])

        def loss(trained: Any) -> tuple[jax.Array, Losses]:
            found = losses(dataclasses.replace(sae, **trained), x, dead, k_aux)
            return found.fvu + self.aux_weight * found.auxk, found

        gradient, found = jax.grad(loss, has_aux=True)(_trained(sae))
        gradient["decoder"] = perpendicular(gradient["decoder"], sae.decoder)
        updates, optimizer = self._adam().update(gradient, state.optimizer)
        trained: Any = optax.apply_updates(_trained(sae), updates)
        trained["decoder"] = unit_rows(trained["decoder"])
        idle = jnp.where(found.fired, 0, jnp.minimum(state.idle, 2**30) + x.shape[0])
        metrics = {
            "fvu": found.fvu,
            "auxk": found.auxk,
            "l0": found.l0,
            "dead": (idle >= self.dead_after).mean(),
        }
        return SAEState(dataclasses.replace(sae, **trained), optimizer, idle), metrics

    def _adam(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate, eps=ADAM_EPS)


def _trained(sae: SparseAutoencoder) -> dict[str, jax.Array]:
    names = ("encoder", "encoder_bias", "decoder", "bias")
    return {name: getattr(sae, name) for name in names}


def unit_rows(decoder: Float[Array, "F D"]) -> Float[Array, "F D"]:
    """Scale each row to norm 1."""
    return decoder / jnp.linalg.norm(decoder, axis=1, keepdims=True)


def perpendicular(gradient: Float[Array, "F D"], rows: Float[Array, "F D"]) -> jax.Array:
    """Remove a gradient's component along unit rows, which would only change their norm."""
    return gradient - (gradient * rows).sum(axis=1, keepdims=True) * rows


def nearest_tokens(
    sae: SparseAutoencoder, table: Float[Array, "V D"], features: Int[Array, " N"], top: int
) -> Int[Array, "N K"]:
    """Find the tokens whose embeddings have the largest dot product with features' decoder rows.

    Args:
        sae: Autoencoder.
        table: Embeddings of all tokens, `[V, D]`.
        features: Indices of the features, `[N]` int32.
        top: Number of tokens of each feature (K).

    Returns:
        Token ids `[N, K]`, in order of decreasing dot product.

    Raises:
        ValueError: The width of the embeddings is not the width of the autoencoder.
    """
    sae.check_width(table.shape[-1])
    products = jnp.take(sae.decoder, features, axis=0) @ table.astype(jnp.float32).T
    return jax.lax.top_k(products, top)[1]


def feature_scores(mean: Float[Array, " F"], density: Float[Array, " F"]) -> Float[Array, " F"]:
    """Score features by mean activation times log(1 / density) (arXiv 2510.01070).

    Rare features that are strong in a text indicate what the text is about.

    Args:
        mean: Mean value of each feature at the positions of the text, `[F]`.
        density: Fraction of a corpus's activations in which each feature is active, `[F]`; smaller
            values than 1e-6 count as 1e-6.
    """
    return mean * -jnp.log(jnp.clip(density, 1e-6, 1.0))

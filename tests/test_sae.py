"""TopK sparse autoencoders: recovery of planted features, and each part against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.audit.sae import (
    SAETraining,
    SparseAutoencoder,
    decode,
    feature_scores,
    geometric_median,
    init_sae,
    losses,
    perpendicular,
    preactivations,
    top_features,
)

WIDTH, PLANTED, K = 32, 48, 3


def planted(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations that are sums of 3 of 48 unit directions, with an offset, and the directions."""
    directions = np.random.default_rng(0).normal(size=(PLANTED, WIDTH))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    chosen = np.argsort(rng.random((count, PLANTED)), axis=1)[:, :K]
    weight = rng.uniform(1, 2, (count, K, 1))
    x = (weight * directions[chosen]).sum(axis=1) + 0.5
    return (5 * x).astype(np.float32), directions


def test_planted_features_are_recovered():
    """The toy oracle: more than 90 % at cosine above .95, less than 5 % of variance unexplained."""
    x, directions = planted(1 << 15, seed=1)
    training = SAETraining(3e-3, dead_after=4096)
    state = training.start(init_sae(x[:2048], 2 * PLANTED, K, seed=0))

    @jax.jit
    def epoch(state, rows):
        return jax.lax.scan(training.step, state, rows)

    rng = np.random.default_rng(2)
    for _ in range(12):
        rows = x[rng.permutation(len(x))].reshape(-1, 512, WIDTH)
        state, metrics = epoch(state, rows)
    sae = state.sae
    best = (directions @ np.asarray(sae.decoder).T).max(axis=1)
    assert (best > 0.95).mean() > 0.9
    assert metrics["fvu"][-1] < 0.05 and 2.5 < metrics["l0"][-1] <= K
    np.testing.assert_allclose(np.linalg.norm(sae.decoder, axis=1), 1, atol=1e-5)
    held_out, _ = planted(512, seed=3)
    rest = held_out - np.asarray(jax.jit(SparseAutoencoder.reconstruct)(sae, held_out))
    assert np.square(rest).sum() < 0.05 * np.square(held_out - held_out.mean(axis=0)).sum()


def test_parts_are_those_of_numpy():
    """Sparse decoding is the dense masked form; both losses; what dead features explain."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(64, 8)).astype(np.float32)
    sae = init_sae(x, features=24, k=3, seed=0)
    np.testing.assert_allclose(sae.encoder, sae.decoder.T)
    np.testing.assert_allclose(np.linalg.norm(sae.decoder, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(sae.norm, np.sqrt((x**2).sum(axis=1).mean()), rtol=1e-6)
    scaled = x / np.asarray(sae.norm)
    dead = np.arange(24) < 3

    @jax.jit
    def parts(sae, x, dead):
        before = preactivations(sae, x)
        return before, decode(sae, top_features(sae, before)), losses(sae, x, dead, 4)

    before, sparse, found = jax.device_get(parts(sae, scaled, dead))
    encoder, decoder, bias = (
        np.asarray(v, np.float64) for v in (sae.encoder, sae.decoder, sae.bias)
    )
    pre = (scaled - bias) @ encoder
    np.testing.assert_allclose(before, pre, atol=1e-5)
    kept = np.argsort(np.argsort(-pre, axis=1), axis=1) < 3
    dense = np.where(kept & (pre > 0), pre, 0)
    np.testing.assert_allclose(sparse, dense @ decoder, atol=1e-5)
    rest = scaled - dense @ decoder - bias
    variance = np.square(scaled - scaled.mean(axis=0)).sum()
    np.testing.assert_allclose(found.fvu, np.square(rest).sum() / variance, rtol=1e-5)
    guess = np.maximum(pre[:, dead], 0) @ decoder[dead]
    expected = 3 / 4 * np.square(rest - guess).sum() / variance
    np.testing.assert_allclose(found.auxk, expected, rtol=1e-5)
    np.testing.assert_allclose(found.l0, (dense > 0).sum(axis=1).mean())
    np.testing.assert_array_equal(found.fired, (dense > 0).any(axis=0))
    none = parts(sae, scaled, np.zeros(24, bool))[2]
    assert none.auxk == 0 and np.isfinite(none.fvu)


def test_a_dead_feature_learns_and_a_gradient_along_a_row_is_removed():
    x, _ = planted(256, seed=4)
    sae = init_sae(x, 2 * PLANTED, K, seed=0)
    # The first feature is just below the greatest where it was most above them.
    before = (x / sae.norm - sae.bias) @ sae.encoder
    above = before[:, 0] - np.sort(before[:, 1:], axis=1)[:, -K]
    sae = dataclasses.replace(sae, encoder_bias=sae.encoder_bias.at[0].set(-above.max() - 0.01))
    dead = np.arange(2 * PLANTED) == 0

    @jax.jit
    def learns(sae):
        both = lambda sae: losses(sae, x / sae.norm, dead, 4)  # noqa: E731
        return both(sae).fired, *(
            jax.grad(lambda sae, name=name: getattr(both(sae), name))(sae).decoder
            for name in ("fvu", "auxk")
        )

    fired, by_fvu, by_auxk = jax.device_get(learns(sae))
    assert not fired[0] and fired[1:].mean() > 0.9
    assert not by_fvu[0].any() and np.abs(by_auxk[0]).max() > 1e-5
    assert not by_auxk[1:].any(), "the residual is given"
    rows = np.asarray(sae.decoder)
    gradient = np.random.default_rng(0).normal(size=rows.shape).astype(np.float32)
    left = np.asarray(perpendicular(jnp.asarray(gradient), sae.decoder))
    along = (gradient * rows).sum(axis=1, keepdims=True) * rows
    np.testing.assert_allclose((left * rows).sum(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(left + along, gradient, atol=1e-5)


def test_an_orthonormal_autoencoder_of_all_features_gives_activations_back():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0].astype(np.float32)
    both = jnp.asarray(np.concatenate([basis, -basis]))  # a ReLU has one sign
    sae = SparseAutoencoder(both.T, jnp.zeros(16), both, jnp.ones(8), jnp.float32(2), 16)
    x = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(SparseAutoencoder.reconstruct)(sae, x), x, atol=1e-5)
    with pytest.raises(ValueError, match="of width 8 for activations of width 6: train one"):
        sae.reconstruct(x[:, :6])
    with pytest.raises(ValueError, match="k=17 of 16 features: choose 1 to 16"):
        init_sae(x, 16, 17, 0)
    with pytest.raises(ValueError, match="all activations of this site are 0"):
        init_sae(0 * x, 16, 2, 0)


def test_the_median_is_robust_and_rare_features_score():
    points = np.array([[0, 0], [2, 0], [0, 2], [2, 2], [1, 1]], np.float32)
    np.testing.assert_allclose(geometric_median(points), [1, 1], atol=1e-5)
    line = np.array([[0.0], [1.0], [1000.0]], np.float32)
    np.testing.assert_allclose(geometric_median(line), [1], atol=0.05)
    scores = feature_scores(np.array([1.0, 1.0, 2.0]), np.array([1.0, 0.1, 0.0]))
    np.testing.assert_allclose(scores, [0, np.log(10), 2 * np.log(1e6)], rtol=1e-5, atol=1e-6)

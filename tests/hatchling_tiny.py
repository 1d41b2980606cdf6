"""Small Dragon Hatchlings, and one in float64 NumPy, one token after the other."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from thoughtbubbles.hatchling import Hatchling, HatchlingConfig

GOLDEN = HatchlingConfig(vocab_size=11, embed_dim=8, num_neurons=32, num_layers=2, num_heads=2)
FORMS = [
    dataclasses.replace(GOLDEN, form=form, damping=damping)
    for form in ("released", "paper")
    for damping in (False, True)
]


def drawn(config: HatchlingConfig) -> Hatchling:
    """A model of random parameters, better conditioned than waves."""
    model, rng = Hatchling(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    noise = lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32)  # noqa: E731
    nnx.update(model, jax.tree.map(noise, nnx.state(model, nnx.Param)))
    return model


@jax.jit
def logits_of(model, tokens, length=None):
    return model.logits(model.run(tokens, length))


def wide(model: Hatchling) -> dict[str, np.ndarray]:
    """Parameters and frequencies of a model in float64, by name."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model)))


def reference(
    config: HatchlingConfig, params: Mapping[str, np.ndarray], tokens: np.ndarray
) -> np.ndarray:
    """Logits in float64, one token after the other, straight from the equations."""
    names = ("dx", "dy", "e", "embed", "head", "frequency")
    dx, dy, e, embed, head, frequency = (params[name] for name in names)
    slope = 2.0 ** (-8 * np.arange(1, config.num_heads + 1) / config.num_heads)
    gamma = np.exp(-slope) if config.damping else np.ones(config.num_heads)
    released = config.form == "released"
    shape = (config.num_layers, config.num_heads, config.head_neurons, config.embed_dim)
    rho, rows = np.zeros(shape), []

    def norm(x):
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)

    for t, token in enumerate(tokens):
        v = norm(embed[token]) if released else embed[token]
        residual = 0.0
        for layer in range(config.num_layers):
            x = np.maximum(np.einsum("d,dhn->hn", v, dx), 0)
            x = x if released else residual + x
            phase = 2 * np.pi * ((t * frequency) % 1)
            turned = np.stack([-x[:, 1::2], x[:, ::2]], axis=-1).reshape(x.shape)
            q = x * np.cos(phase) + turned * np.sin(phase)
            a = np.einsum("hn,hnd->hd", q, rho[layer])
            rho[layer] = gamma[:, None, None] * (rho[layer] + q[:, :, None] * v)
            y = np.maximum(np.einsum("hd,dhn->hn", norm(a), dy), 0) * x
            o = norm(np.einsum("hn,hnd->d", y, e))
            v, residual = (norm(v + o), 0.0) if released else (o, x)
        rows.append(v @ head)
    return np.array(rows)

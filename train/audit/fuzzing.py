"""Fuzzing: Gaussian noise behind one layer, the same in cached decoding as in parallel."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from memgen import MemGen
from thoughtbubbles import Thoughtbubbles
from thoughtbubbles.layers import Block, Geometry, Mix
from thoughtbubbles.module import Module
from thoughtbubbles.streams import Streams
from train.models.load import LanguageModel

Unit = Literal["rms", "absolute"]


@dataclasses.dataclass(frozen=True)
class Fuzz:
    """Noise at the output of one layer: x + σ·u·n with n ~ N(0, I).

    Attributes:
        layer: Index of the layer, from 0.
        sigma: Standard deviation σ of the noise; 0 is the identity, bit for bit.
        unit: What σ is measured in: "rms", the root mean square of the very vector that the noise
            is added to, so that u = sqrt(mean(x²)); or "absolute", u = 1, as in arXiv 2510.01070.
    """

    layer: int
    sigma: float
    unit: Unit = "rms"

    def __post_init__(self):
        if self.unit not in ("rms", "absolute"):
            raise ValueError(f"unit={self.unit!r}: choose from rms, absolute")
        if not 0 <= self.sigma < float("inf"):
            raise ValueError(f"sigma={self.sigma}: choose 0 or more")


def fuzzed(model: Any, fuzz: Fuzz, keys: jax.Array) -> Any:
    """A model `for_decoding` with noise at one layer, over the same arrays.

    The noise of a stream depends on the row's key, the position of its token and its place in the
    bubble. So any split of a row into calls gets the same noise, and the noise of a token stays
    while others are added.

    Args:
        model: Model with blocks: a `Thoughtbubbles`, forking or plain.
        fuzz: Layer and size of the noise.
        keys: Random key of each row `[B]`, or of all rows `[1]`.

    Raises:
        ValueError: The model has no blocks, or no such layer.
    """
    check_fuzz(model, fuzz)
    if fuzz.sigma == 0:  # adding zeros would change how a program is fused, and so its last bits
        return model.for_decoding()
    leaves, structure = jax.tree.flatten(model.for_decoding())
    copy: Any = jax.tree.unflatten(structure, leaves)
    blocks = list(copy.unstacked)
    blocks[fuzz.layer] = NoisyBlock(blocks[fuzz.layer], fuzz, keys)
    copy.unstacked = nnx.data(blocks)
    return copy


def check_fuzz(model: Any, fuzz: Fuzz) -> None:
    """Raise a ValueError for a model without blocks, or without that layer."""
    if not isinstance(model, Thoughtbubbles):
        raise ValueError(
            f"{type(model).__name__} has no blocks to add noise behind: fuzz a Thoughtbubbles"
        )
    layers = model.config.num_layers
    if not 0 <= fuzz.layer < layers:
        raise ValueError(f"layer={fuzz.layer}: the model has layers 0 to {layers - 1}")


def fuzzed_memory(memgen: MemGen, fuzz: Fuzz, keys: jax.Array) -> MemGen:
    """Latent memory around a reasoner with noise; weaver and trigger stay as they are.

    Args:
        memgen: Latent memory around a `Thoughtbubbles`.
        fuzz: Layer and size of the noise.
        keys: Random key `[1]`; rows that weave are taken out of their batch, so all rows share it.

    Raises:
        ValueError: A reason of `fuzzed`.
    """
    clean: Any = memgen.reasoner
    noisy = fuzzed(reasoner_model(memgen), fuzz, keys).backbone()
    copy = memgen.with_reasoner(noisy)
    for name in ("weaver_backbone", "trigger_backbone"):
        if getattr(copy, name) is None:
            setattr(copy, name, nnx.data(clean))
    return copy


def reasoner_model(memgen: MemGen) -> Any:
    """The model behind a reasoner."""
    return getattr(memgen.reasoner, "model", memgen.reasoner)


class NoisyBlock(Module):
    """A block with noise on its output.

    Args:
        block: The block.
        fuzz: Size of the noise.
        keys: Random key of each row `[B]`, or of all rows `[1]`.
    """

    def __init__(self, block: Block, fuzz: Fuzz, keys: jax.Array):
        self.block = block
        self.unit = fuzz.unit
        self.sigma = nnx.data(jnp.float32(fuzz.sigma))
        self.keys = nnx.data(keys)

    @property
    def attend(self) -> Any:
        return self.block.attend

    @property
    def attention(self) -> Any:
        return self.block.attention

    @property
    def mlp(self) -> Any:
        return self.block.mlp

    def __call__(self, streams: Streams, geometry: Geometry | None = None) -> Streams:
        return self.noisy(self.block(streams, geometry))

    def mixing(self, streams: Streams, geometry: Geometry, mix: Mix) -> tuple[Streams, Any]:
        streams, aux = self.block.mixing(streams, geometry, mix)
        return self.noisy(streams), aux

    def noisy(self, streams: Streams) -> Streams:
        """The streams with noise."""
        x = streams.x.astype(jnp.float32)
        rows = x.shape[0]
        keys = jnp.broadcast_to(self.keys, (rows,)) if self.keys.shape == (1,) else self.keys
        distance, _ = streams.bubbles()
        draw = jax.vmap(jax.vmap(_normal, (None, 0, 0, None)), (0, 0, 0, None))
        noise = draw(keys, streams.token + streams.first[:, None], distance, x.shape[-1])
        if self.unit == "rms":
            noise = noise * jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True))
        return streams.replace(x=(x + self.sigma * noise).astype(streams.x.dtype))


def _normal(key: jax.Array, token: jax.Array, distance: jax.Array, width: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(key, token), distance)
    return jax.random.normal(key, (width,))


def noise_keys(lm: LanguageModel, keys: jax.Array) -> jax.Array:
    """Keys of the noise of rows, apart from those of their samples.

    Args:
        lm: Model that is fuzzed; one with latent memory takes a single key.
        keys: Random key of each row `[B]`.
    """
    found = jax.vmap(lambda key: jax.random.fold_in(key, 0x66757A7A))(keys)
    return found[:1] if lm.memgen is not None else found

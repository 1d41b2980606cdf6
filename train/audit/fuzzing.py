"""Fuzzing: Gaussian noise on one layer's output, equal in decoding and teacher-forced passes."""

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
    """Gaussian noise added to the output of one layer: x + σ·u·n with n ~ N(0, I).

    Attributes:
        layer: Index of the layer, from 0.
        sigma: Standard deviation σ of the noise; 0 is the identity, bit for bit.
        unit: Unit of σ: "rms" is the root mean square of the vector that the noise is added to,
            u = sqrt(mean(x²)); "absolute" is u = 1, as in arXiv 2510.01070.
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
    """Return a copy of a model for decoding that adds noise to one layer's output.

    The copy shares the model's arrays (see `Thoughtbubbles.for_decoding`). The noise of a stream
    depends only on the row's PRNG key, the position of the stream's token, and the stream's
    distance from the original of its bubble. The noise is therefore the same however a row is split
    into calls, and appended tokens do not change it.

    Args:
        model: `Thoughtbubbles` model, forking or plain.
        fuzz: Layer and size of the noise; with `sigma` 0 no noise is added.
        keys: PRNG keys, one for each row `[B]`, or one for all rows `[1]`.

    Raises:
        ValueError: The model is not a `Thoughtbubbles`, or lacks the layer of `fuzz`.
    """
    check_fuzz(model, fuzz)
    if fuzz.sigma == 0:  # adding zeros would change how XLA fuses the program, and so the last bits
        return model.for_decoding()
    leaves, structure = jax.tree.flatten(model.for_decoding())
    copy: Any = jax.tree.unflatten(structure, leaves)
    blocks = list(copy.unstacked)
    blocks[fuzz.layer] = NoisyBlock(blocks[fuzz.layer], fuzz, keys)
    copy.unstacked = nnx.data(blocks)
    return copy


def check_fuzz(model: Any, fuzz: Fuzz) -> None:
    """Raise a ValueError if a model is not a `Thoughtbubbles`, or lacks the layer of `fuzz`."""
    if not isinstance(model, Thoughtbubbles):
        raise ValueError(
            f"{type(model).__name__} has no blocks to add noise behind: fuzz a Thoughtbubbles"
        )
    layers = model.config.num_layers
    if not 0 <= fuzz.layer < layers:
        raise ValueError(f"layer={fuzz.layer}: the model has layers 0 to {layers - 1}")


def fuzzed_memory(memgen: MemGen, fuzz: Fuzz, keys: jax.Array) -> MemGen:
    """Return a copy of a `MemGen` with noise in its reasoner, but not in its weaver and trigger.

    Args:
        memgen: Latent memory whose reasoner is a `Thoughtbubbles`.
        fuzz: Layer of the reasoner, and size of the noise.
        keys: PRNG keys from `noise_keys`.

    Raises:
        ValueError: The reasoner is not a `Thoughtbubbles`, or lacks the layer of `fuzz`.
    """
    clean: Any = memgen.reasoner
    noisy = fuzzed(reasoner_model(memgen), fuzz, keys).backbone()
    copy = memgen.with_reasoner(noisy)
    for name in ("weaver_backbone", "trigger_backbone"):
        if getattr(copy, name) is None:
            setattr(copy, name, nnx.data(clean))
    return copy


def reasoner_model(memgen: MemGen) -> Any:
    """Return the model that the reasoner wraps, or the reasoner itself if it wraps none."""
    return getattr(memgen.reasoner, "model", memgen.reasoner)


class NoisyBlock(Module):
    """A transformer block that adds noise to its output.

    Args:
        block: Block whose output gets the noise.
        fuzz: Size of the noise.
        keys: PRNG keys, one for each row `[B]`, or one for all rows `[1]`.
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
        """Return the streams with noise added to their vectors."""
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
    """Derive the PRNG keys of the noise from the keys of sampling, so that the two differ.

    Args:
        lm: Model that is fuzzed.
        keys: PRNG keys of sampling, one for each row `[B]`.

    Returns:
        PRNG keys `[B]`, or only the first key, `[1]`, if rows are fuzzed `fuzzes_single_rows`.
    """
    found = jax.vmap(lambda key: jax.random.fold_in(key, 0x66757A7A))(keys)
    return found[:1] if fuzzes_single_rows(lm) else found


def fuzzes_single_rows(lm: LanguageModel) -> bool:
    """Return whether fuzzed rows must be generated in batches of one row.

    The result is True if latent memory may be woven within a response. The rows that weave are then
    taken out of the batch as a smaller group, which noise keys `[B]` do not fit.

    Args:
        lm: Model that is fuzzed.
    """
    return lm.memgen is not None and lm.memgen.config.max_inference_events > 0

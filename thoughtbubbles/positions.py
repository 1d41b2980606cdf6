"""Rotary positions that may be fractions of a token, with frequencies scaled to longer contexts."""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from thoughtbubbles.fields import shown


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies to contexts longer than that of pretraining.

    The fields are those of `rope_scaling` in Hugging Face configs. "linear" divides every frequency
    by `factor` (position interpolation). "llama3" and "yarn" divide slow frequencies, keep fast
    ones and interpolate in between.

    Attributes:
        rope_type: Kind of the scaling.
        factor: Divisor of the scaled frequencies.
        original_max_position_embeddings: Context length of pretraining in tokens, for "llama3" and
            "yarn".
        low_freq_factor: Divisor of the context length that gives the wavelength from which on
            frequencies are scaled in full ("llama3").
        high_freq_factor: Divisor of the context length that gives the wavelength up to which
            frequencies are kept ("llama3").
        beta_fast: Turns in the original context from which on a frequency is kept ("yarn", arXiv
            2309.00071).
        beta_slow: Turns in the original context up to which a frequency is scaled in full ("yarn").
        attention_factor: Factor of cosines and sines ("yarn"); by default 0.1 ln(factor) + 1.
    """

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self):
        known = get_args(type(self).__annotations__["rope_type"])
        if self.rope_type not in known:
            kind = shown(self.rope_type)
            raise ValueError(f"rope scaling {kind}: choose one of {', '.join(known)}")
        if not self.factor > 0:
            raise ValueError(f"rope scaling factor={self.factor}: choose a number above 0")
        if self.rope_type != "linear" and not self.original_max_position_embeddings:
            raise ValueError(
                f"rope scaling {self.rope_type} needs original_max_position_embeddings, the "
                "context of the first training"
            )
        if self.rope_type == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope scaling low_freq_factor={self.low_freq_factor} is not below "
                f"high_freq_factor={self.high_freq_factor}: exchange them"
            )

    def frequencies(self, head_dim: int, base: float) -> np.ndarray:
        """`[K/2]` float64, angle by which each channel pair turns per token, in radians."""
        plain = base ** (-np.arange(0, head_dim, 2) / head_dim)
        kept = self._kept(plain, head_dim, base)
        return plain * (kept + (1 - kept) / self.factor)

    def _kept(self, plain: np.ndarray, head_dim: int, base: float) -> np.ndarray:
        """Share of each frequency that is kept, from 0 to 1."""
        if self.rope_type == "linear":
            return np.zeros_like(plain)
        original = self.original_max_position_embeddings or 0
        if self.rope_type == "llama3":
            turns = original * plain / (2 * math.pi)
            width = self.high_freq_factor - self.low_freq_factor
            return np.clip((turns - self.low_freq_factor) / width, 0, 1)

        def channel(turns: float) -> float:
            """Fractional index of the channel pair that turns so often in the original context."""
            return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        first = max(math.floor(channel(self.beta_fast)), 0)
        last = min(math.ceil(channel(self.beta_slow)), head_dim - 1)
        ramp = (np.arange(len(plain)) - first) / max(last - first, 0.001)
        return 1 - np.clip(ramp, 0, 1)

    @property
    def amplitude(self) -> float:
        """Factor of cosines and sines."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


def rotary_angles(
    positions: jax.Array, head_dim: int, base: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, each `[B, S, K/2]` float32, of RoPE at `positions [B, S]`.

    Channel pair `c` turns by `position * base ** (-2c / K)`, unless scaled.
    """
    if scaling is None:
        frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
        angle = positions[..., None] * frequency[None, None]
        return jnp.cos(angle), jnp.sin(angle)
    frequency = scaling.frequencies(head_dim, base).astype(np.float32)
    angle = positions[..., None] * frequency[None, None]
    return scaling.amplitude * jnp.cos(angle), scaling.amplitude * jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate heads `x [B, S, H, K]`; channel `c` pairs with `c + K/2`. Computed in float32."""
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return turned.astype(x.dtype)

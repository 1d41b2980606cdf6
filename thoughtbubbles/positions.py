"""RoPE: rotary angles at integer or fractional positions, and scaling to longer contexts."""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from thoughtbubbles.fields import shown


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of RoPE frequencies to contexts longer than the pretraining context.

    The fields are those of `rope_scaling` in Hugging Face configs. "linear" divides every frequency
    by `factor` (position interpolation). "llama3" and "yarn" divide slow frequencies, keep fast
    frequencies and interpolate in between.

    Attributes:
        rope_type: Kind of the scaling.
        factor: Divisor of the scaled frequencies.
        original_max_position_embeddings: Context length of pretraining in tokens, for "llama3" and
            "yarn".
        low_freq_factor: Frequencies whose wavelength is at least
            `original_max_position_embeddings / low_freq_factor` tokens are divided by `factor`
            ("llama3").
        high_freq_factor: Frequencies whose wavelength is at most
            `original_max_position_embeddings / high_freq_factor` tokens stay unchanged ("llama3").
        beta_fast: Channel pairs with at least this many turns in the original context keep their
            frequency ("yarn", arXiv 2309.00071).
        beta_slow: Frequencies of channel pairs with at most this many turns in the original context
            are divided by `factor` ("yarn").
        attention_factor: Factor of cosines and sines ("yarn"); None means 0.1 ln(factor) + 1, or 1
            for a factor of at most 1.
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
        """Return the scaled frequency of each channel pair in radians per token, `[K/2]`."""
        plain = base ** (-np.arange(0, head_dim, 2) / head_dim)
        kept = self._kept(plain, head_dim, base)
        return plain * (kept + (1 - kept) / self.factor)

    def _kept(self, plain: np.ndarray, head_dim: int, base: float) -> np.ndarray:
        """Weight of each unscaled frequency, from 0 (divided by `factor`) to 1 (unchanged)."""
        if self.rope_type == "linear":
            return np.zeros_like(plain)
        original = self.original_max_position_embeddings or 0
        if self.rope_type == "llama3":
            turns = original * plain / (2 * math.pi)
            width = self.high_freq_factor - self.low_freq_factor
            return np.clip((turns - self.low_freq_factor) / width, 0, 1)

        def channel(turns: float) -> float:
            """Return the fractional index of the channel pair with `turns` in `original` tokens."""
            return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        first = max(math.floor(channel(self.beta_fast)), 0)
        last = min(math.ceil(channel(self.beta_slow)), head_dim - 1)
        ramp = (np.arange(len(plain)) - first) / max(last - first, 0.001)
        return 1 - np.clip(ramp, 0, 1)

    @property
    def amplitude(self) -> float:
        """Factor that multiplies cosines and sines."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


NEAR = 4096
"""Minimum position whose angles are reduced to one turn before they become float32. The error of
the float32 product of a position and a frequency is up to the position times 2^-24 radians, which
is 2.5e-4 at this position."""


def rotary_angles(
    positions: jax.Array,
    head_dim: int,
    base: float,
    scaling: RopeScaling | None = None,
    *,
    offset: jax.Array | None = None,
    bound: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Compute the cosines and sines of rotary angles (RoPE) at positions.

    Without scaling, the angle of channel pair `c` is `position * base ** (-2c / K)` radians. Angles
    at positions below `NEAR` (4096) are float32 products with an error of up to 2.5e-4 radians.
    Angles at larger positions are reduced to one turn first and are exact to float32 rounding.

    Args:
        positions: Positions of the slots, `[B, S]` integers or float32.
        head_dim: Width `K` of a head.
        base: Base of the frequencies.
        scaling: Scaling of the frequencies; None for no scaling.
        offset: Fraction of a token to add to each position, `[B, S]` float32. The fraction is a
            separate argument because its sum with a large position would be rounded in float32.
            None adds nothing.
        bound: Static upper bound on the positions. With a bound up to `NEAR`, the reduction to one
            turn is skipped for all positions. None means that no bound is known.

    Returns:
        Cosines and sines, each `[B, S, K/2]` float32, times `scaling.amplitude`.
    """
    if scaling is None:
        exact = base ** (-np.arange(0, head_dim, 2) / head_dim)
        frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
        amplitude = 1.0
    else:
        exact, amplitude = scaling.frequencies(head_dim, base), scaling.amplitude
        frequency = exact.astype(np.float32)
    position = positions.astype(jnp.float32)
    if offset is not None:
        position = position + offset
    angle = position[..., None] * frequency[None, None]
    if bound is None or bound > NEAR:
        whole, part = split_position(positions)
        part = part if offset is None else part + offset
        turns = turns_at(whole[..., None], *fixed_point(exact / (2 * np.pi)))
        far = 2 * np.pi * turns + part[..., None] * frequency[None, None]
        angle = jnp.where(whole[..., None] < NEAR, angle, far)
    if scaling is None:
        return jnp.cos(angle), jnp.sin(angle)
    return amplitude * jnp.cos(angle), amplitude * jnp.sin(angle)


def split_position(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Split positions, integers or float32, into int32 ceilings and float32 rests in (-1, 0]."""
    if jnp.issubdtype(positions.dtype, jnp.integer):
        return positions.astype(jnp.int32), jnp.zeros_like(positions, jnp.float32)
    whole = jnp.ceil(positions)
    return whole.astype(jnp.int32), positions - whole


def fixed_point(turns: Any) -> tuple[Any, Any]:
    """Convert frequencies modulo 1 turn per token to fixed point, in units of 2^-32 turns.

    Args:
        turns: Frequencies in turns per token, a NumPy or JAX array.

    Returns:
        Whole units as uint32, and remainders from 0 to 1 unit as float32.
    """
    units = (turns % 1.0) * 2.0**32
    whole = units // 1.0
    return whole.astype(np.uint32), (units - whole).astype(np.float32)


def turns_at(position: jax.Array, units: Any, rest: Any) -> jax.Array:
    """Compute rotary angles (position times frequency) as float32 turns, modulo 1, in [-1/2, 1/2].

    Args:
        position: Positions, int32, not negative.
        units: Frequencies in whole units of 2^-32 turns (`fixed_point`), uint32. The product of a
            frequency and a position overflows, and so wraps around, after each whole turn.
        rest: Remainders of the frequencies in the same units (`fixed_point`), float32.
    """
    more = (position.astype(jnp.float32) * rest).astype(jnp.uint32)
    units = position.astype(jnp.uint32) * units + more
    return jax.lax.bitcast_convert_type(units, jnp.int32).astype(jnp.float32) * 2.0**-32


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Apply RoPE to heads `x [B, S, H, K]` in float32; channel `c` pairs with `c + K/2`."""
    wide, half = x.astype(jnp.float32), x.shape[-1] // 2
    # Channels change places before they are multiplied: halves that are multiplied and then
    # joined take XLA on a CPU as long as a layer's projections.
    cos = jnp.concatenate([cos, cos], axis=-1)[:, :, None, :]
    sin = jnp.concatenate([-sin, sin], axis=-1)[:, :, None, :]
    return (wide * cos + jnp.roll(wide, half, axis=-1) * sin).astype(x.dtype)

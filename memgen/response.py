"""What a generation gives back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memgen.model import MemGen

NOT_ASKED = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Response:
    """New tokens of each row and what was remembered on the way.

    Attributes:
        tokens: `[B, T]` int32, the id that stopped a row among them.
        count: `[B]` int32 of them real.
        log_probs: `[B, T]` float32 of each, at the temperature of sampling (1 if greedy).
        decisions: `[B, T]` int8 before each token: -1 not asked, 0 skipped, 1 invoked.
        latents: `[B, E, K, D]`; event 0 stands before the first token.
        points: `[B, E]` int32, the token that each event stands before, -1 if it did not happen.
    """

    tokens: jax.Array
    count: jax.Array
    log_probs: jax.Array
    decisions: jax.Array
    latents: jax.Array
    points: jax.Array

    @classmethod
    def empty(cls, memgen: MemGen, batch: int, room: int, vector: Any) -> "Response":
        config = memgen.config
        latents = (batch, config.events, config.weaver.latents, vector.shape[-1])
        return cls(
            jnp.zeros((batch, room), jnp.int32),
            jnp.zeros((batch,), jnp.int32),
            jnp.zeros((batch, room), jnp.float32),
            jnp.full((batch, room), NOT_ASKED, jnp.int8),
            jnp.zeros(latents, vector.dtype),
            jnp.full((batch, config.events), -1, jnp.int32),
        )

    @property
    def texts(self) -> list[list[int]]:
        """The new ids of each row."""
        rows = zip(np.asarray(self.tokens), np.asarray(self.count), strict=True)
        return [row[:count].tolist() for row, count in rows]

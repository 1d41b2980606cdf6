"""The result of a generation."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from memgen.model import MemGen
from memgen.pages import Page, response_page
from memgen.short_repr import ShortRepr

NO_DECISION = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Response(ShortRepr):
    """New tokens, trigger decisions and latents of each row of a batch.

    Jupyter displays a response as its `page`.

    Attributes:
        tokens: `[B, T]` int32 new token ids, padded on the right with 0. The stop id that ended a
            row is included.
        count: `[B]` int32, number of new tokens in each row.
        log_probs: `[B, T]` float32, log-probability of each new token at the sampling temperature
            (1 if greedy).
        decisions: `[B, T]` int8, decision before each new token: -1 none, 0 skipped, 1 invoked.
        latents: `[B, E, K, D]` latents of `E` events with `K` latent slots each; event 0 precedes
            the first new token.
        points: `[B, E]` int32, index of the new token after each event; -1 for an unused event.
    """

    tokens: jax.Array
    count: jax.Array
    log_probs: jax.Array
    decisions: jax.Array
    latents: jax.Array
    points: jax.Array

    @classmethod
    def empty(cls, memgen: MemGen, batch: int, capacity: int, vector: Any) -> "Response":
        """Make a response without tokens.

        Args:
            memgen: Model that will respond.
            batch: Number of rows.
            capacity: Maximum number of new tokens per row.
            vector: Array or `jax.ShapeDtypeStruct` with the width and dtype of latents.
        """
        config = memgen.config
        latents = (batch, config.events, config.weaver.latents, vector.shape[-1])
        return cls(
            jnp.zeros((batch, capacity), jnp.int32),
            jnp.zeros((batch,), jnp.int32),
            jnp.zeros((batch, capacity), jnp.float32),
            jnp.full((batch, capacity), NO_DECISION, jnp.int8),
            jnp.zeros(latents, vector.dtype),
            jnp.full((batch, config.events), -1, jnp.int32),
        )

    @property
    def texts(self) -> list[list[int]]:
        """New token ids of each row, without padding."""
        rows = zip(np.asarray(self.tokens), np.asarray(self.count), strict=True)
        return [row[:count].tolist() for row, count in rows]

    def page(
        self,
        text_of: Callable[[int], str] = str,
        prompts: Sequence[Sequence[int]] | None = None,
    ) -> Page:
        """Render the response as HTML: each row's tokens, and a bar for each latent between tokens.

        `page().save("response.html")` writes a self-contained file.

        Args:
            text_of: Function from a token id to its text; by default ids are shown.
            prompts: Token ids of each row's prompt, shown before the row's new tokens; by default
                no prompts are shown.

        Raises:
            ValueError: The number of prompts is not the number of rows, or the response's arrays
                have no batch axis or no readable values (traced, donated, or on other hosts).
        """
        if not self._is_batch():
            raise ValueError(
                f"a response of tokens {jnp.shape(self.tokens)}: give [B, T], such as a[None] of "
                "each array of one row"
            )
        if not self._is_here():
            raise ValueError(f"{self!r} has no values here: show it outside of jit, on one host")
        log_probs, decisions = np.asarray(self.log_probs), np.asarray(self.decisions)
        latents, points = np.asarray(self.latents), np.asarray(self.points)
        return response_page(self.texts, log_probs, decisions, latents, points, text_of, prompts)

    def _is_batch(self) -> bool:
        return jnp.ndim(self.tokens) == 2

    def _is_here(self) -> bool:
        return all(_is_here(getattr(self, field.name)) for field in dataclasses.fields(self))

    def _repr_html_(self) -> str | None:
        here = self._is_here() and self._is_batch()
        return self.page()._repr_html_() if here else None


def _is_here(value: object) -> bool:
    """Return whether a value is an array that is fully addressable, and not traced or donated."""
    if isinstance(value, Tracer) or not isinstance(value, (jax.Array, np.ndarray)):
        return False
    return isinstance(value, np.ndarray) or (value.is_fully_addressable and not value.is_deleted())

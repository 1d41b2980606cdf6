"""Sites of a MemGen's reasoner, whose rows hold latents between tokens: what memory says."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memgen import MemGen, Plan
from thoughtbubbles import Backbone
from thoughtbubbles.sites import SitedModel, check_sited


class WovenRows(NamedTuple):
    """Rows of a reasoner with latents in them, which `capture` and the lenses take as vectors.

    Attributes:
        model: Reasoner as a model with sites.
        stream: `[B, S, D]` vectors of tokens and latents.
        mask: `[B, S]` bool, vectors that are real.
        latent: `[B, S]` bool, vectors that are latents.
    """

    model: SitedModel
    stream: jax.Array
    mask: jax.Array
    latent: jax.Array


def sited_reasoner(memgen: MemGen) -> SitedModel:
    """The reasoner as a model with sites; a ValueError if it has none."""
    reasoner: Any = memgen.reasoner
    model = reasoner.model if isinstance(reasoner, Backbone) else reasoner
    check_sited(model)
    return model


def woven_rows(memgen: MemGen, tokens: jax.Array, plan: Plan) -> WovenRows:
    """Weave the memory of texts and say which vectors are latents.

    Args:
        memgen: Latent memory with its reasoner.
        tokens: Token ids `[B, L]` int32, padded on the right.
        plan: Events of each row, each before a token.

    Raises:
        ValueError: The reasoner has no sites, or a reason of `MemGen.weave`.
    """
    model = sited_reasoner(memgen)
    woven = memgen.weave(tokens, plan)
    index = jnp.arange(woven.stream.shape[1])
    offset = index - plan.start[:, :, None]
    within = (offset >= 0) & (offset < plan.width[:, :, None]) & (plan.point[:, :, None] >= 0)
    mask = index < woven.length[:, None]
    return WovenRows(model, woven.stream, mask, within.any(axis=1) & mask)

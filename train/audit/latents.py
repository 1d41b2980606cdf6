"""Rows of tokens and woven latents, at which lenses read the reasoner of a `MemGen`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from memgen import MemGen, Plan
from memgen.checks import checked_ids
from memgen.insertion import check_plan
from memgen.model import Woven
from thoughtbubbles import Backbone
from thoughtbubbles.sites import SitedModel, check_sited

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Int


class WovenRows(NamedTuple):
    """Input vectors of a reasoner, for `capture` and the lenses; `S` is the length of a row.

    Attributes:
        model: Reasoner as a model with sites.
        inputs_embeds: `[B, S, D]` embeddings of tokens with latents between them.
        mask: `[B, S]` bool, whether each vector is real and not padding.
        latent: `[B, S]` bool, whether each vector is a latent.
    """

    model: SitedModel
    inputs_embeds: jax.Array
    mask: jax.Array
    latent: jax.Array


def sited_reasoner(memgen: MemGen) -> SitedModel:
    """Return the reasoner as a model with sites; raise a ValueError if the reasoner has none."""
    reasoner: Any = memgen.reasoner
    model = reasoner.model if isinstance(reasoner, Backbone) else reasoner
    check_sited(model)
    return model


def woven_rows(
    memgen: MemGen,
    tokens: Int[Array, "B L"],
    plan: Plan,
    length: Int[Array, " B"] | None = None,
) -> WovenRows:
    """Weave memory into rows of `L` tokens, and mark which vectors are latents.

    Args:
        memgen: Latent memory with its reasoner.
        tokens: Token ids `[B, L]` int32, padded on the right.
        plan: Weaving events of each row. Each event stands before a token, which may be padding.
        length: Number of real tokens in each row, `[B]` int32; None for all `L`.

    Raises:
        ValueError: The reasoner has no sites, or the plan does not fit the tokens or the config.
    """
    model = sited_reasoner(memgen)
    tokens = checked_ids(tokens)
    check_plan(plan, tokens, memgen.config.weaver.latents)
    woven = _weave(memgen, tokens, plan)
    index = jnp.arange(woven.inputs_embeds.shape[1])
    offset = index - plan.start[:, :, None]
    within = (offset >= 0) & (offset < plan.width[:, :, None]) & (plan.point[:, :, None] >= 0)
    real = woven.length if length is None else length + plan.width.sum(axis=1)
    mask = index < real[:, None]
    return WovenRows(model, woven.inputs_embeds, mask, within.any(axis=1) & mask)


@jax.jit
def _weave(memgen: MemGen, tokens: jax.Array, plan: Plan) -> Woven:
    return memgen.weave(tokens, plan)


def prompts_with_latents(
    memgen: MemGen, tokens: Int[Array, "B L"], length: Int[Array, " B"]
) -> WovenRows:
    """Weave the memory that generation weaves between a prompt and its answer.

    Args:
        memgen: Latent memory with its reasoner.
        tokens: Token ids `[B, L]` int32 of prompts, padded on the right.
        length: Number of real tokens in each prompt, `[B]` int32.

    Returns:
        Rows with the vectors of each prompt's tokens, followed by the latents.

    Raises:
        ValueError: The reasoner has no sites.
    """
    plan = Plan.of(length[:, None], jnp.zeros_like(length)[:, None], memgen.config)
    # An event stands before a token, so each row gets a further token of padding.
    return woven_rows(memgen, jnp.pad(tokens, ((0, 0), (0, 1))), plan, length)

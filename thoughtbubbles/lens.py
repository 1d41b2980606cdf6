"""Lenses: what each stream, and each token, would predict if the model ended at a site.

`logit_lens` decodes activations with the model's own final norm and LM head;
`embedding_similarity` compares activations with token embeddings by cosine. Sites are decoded one
at a time, so that only the logits of one site are in memory. In a model with forks, each stream is
decoded by itself, and the streams of each token also together, after the model's own merge.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from thoughtbubbles.forking import merge
from thoughtbubbles.placement import product
from thoughtbubbles.rows import left_align, restore_alignment
from thoughtbubbles.short_repr import ShortRepr, short_repr
from thoughtbubbles.sites import (
    Activation,
    Edit,
    Lineage,
    Rows,
    SitedModel,
    Visit,
    capture,
    check_sited,
    check_sites,
    one_per_token,
    record,
    rows_of,
)
from thoughtbubbles.streams import Streams

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int, Shaped

__all__ = [
    "Activation",
    "Edit",
    "Rows",
    "SitedModel",
    "TopTokens",
    "Reading",
    "TunedLens",
    "Visit",
    "capture",
    "embedding_similarity",
    "logit_lens",
    "mean_lens",
]


class TopTokens(NamedTuple):
    """The token ids that a lens ranks highest, and the values of ids chosen by the caller.

    The value of a token id is its log-probability (`logit_lens`) or its cosine
    (`embedding_similarity`). The axes `...` are `[B, S]` for slots, `[B, T]` for tokens and `[B]`
    for means over positions. `top` and `watch` are arguments of the lens.

    Attributes:
        ids: `[..., top]` int32, token ids with the largest values, in descending order.
        value: `[..., top]` float32, values of `ids`.
        watched: `[..., W]` float32, values of the `W` ids in `watch`; `W` is 0 without `watch`.
        rank: `[..., W]` int32, number of token ids whose value is larger than that of each id in
            `watch`: 0 for the top id.
    """

    ids: jax.Array
    value: jax.Array
    watched: jax.Array
    rank: jax.Array

    __repr__ = short_repr


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Reading(ShortRepr):
    """Result of a lens at one site.

    Attributes:
        rows: Token, score and parent of each slot of the site.
        streams: Top tokens of each slot, `[B, S, ...]`.
        tokens: Top tokens of each token's merged streams (by the model's merge), `[B, T, ...]`.
        divergence: `[B, S]` float32, Jensen-Shannon divergence in nats (at most ln 2) between the
            predictions of a stream and of its parent, a measure of what the fork changed. It is 0
            for a stream without a living parent, and always in `embedding_similarity`.
    """

    rows: Rows
    streams: TopTokens
    tokens: TopTokens
    divergence: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class TunedLens(ShortRepr):
    """Affine map of each site from its residuals to residuals before the final norm (2303.08112).

    The map of site `n` replaces a residual `x` by `x + x @ weight[n] + bias[n]`.

    Attributes:
        weight: `[N, D, D]` float32 matrices of the maps of `N` sites.
        bias: `[N, D]` float32 biases of the maps.
        sites: Names of the `N` sites (static).
    """

    weight: jax.Array
    bias: jax.Array
    sites: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def identity(cls, sites: Sequence[str], embed_dim: int) -> TunedLens:
        """Return identity maps for the given sites; with them, a tuned lens is the logit lens."""
        shape = len(sites), embed_dim
        return cls(jnp.zeros((*shape, embed_dim)), jnp.zeros(shape), tuple(sites))

    def of_sites(self, sites: Sequence[str]) -> tuple[jax.Array, jax.Array]:
        """Return weights `[M, D, D]` and biases `[M, D]` of `M` sites, 0 for one without a map."""
        found = [self.sites.index(site) if site in self.sites else -1 for site in sites]
        chosen = [
            (self.weight[i], self.bias[i]) if i >= 0 else
            (jnp.zeros_like(self.weight[0]), jnp.zeros_like(self.bias[0]))
            for i in found
        ]  # fmt: skip
        weights, biases = zip(*chosen, strict=True)
        return jnp.stack(weights), jnp.stack(biases)


def translated(x: Float[Array, "... D"], affine: Any) -> Float[Array, "... D"]:
    """Apply one site's `(weight, bias)` of a tuned lens to residuals `x`; None changes nothing."""
    if affine is None:
        return x
    weight, bias = affine
    wide = x.astype(jnp.float32)
    return (wide + product(wide, weight) + bias).astype(x.dtype)


def logit_lens(
    model: SitedModel,
    tokens: Shaped[Array, "B T *D"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    sites: Sequence[str] | None = None,
    top: int = 10,
    watch: Int[Array, " W"] | Sequence[int] | None = None,
    tuned: TunedLens | None = None,
) -> OrderedDict[str, Reading]:
    """Decode each site with the final norm and LM head (the logit lens of nostalgebraist, 2020).

    At the last site, `Reading.tokens` describes the model's own output distribution.

    Args:
        model: Model with sites.
        tokens: Token ids `[B, T]` int32, or vectors `[B, T, D]` in their place.
        mask: Whether each token is real, `[B, T]` bool; padding may stand on either side.
        sites: Names of the sites to decode; all sites of the model by default.
        top: Number of most probable token ids to return.
        watch: Token ids `[W]` int32 whose log-probability and rank to return; none by default.
        tuned: Affine maps of a tuned lens; None for the plain logit lens.

    Returns:
        Mapping from site name to its `Reading`, in the order of the forward pass.

    Raises:
        ValueError: The model has no sites or lacks one of `sites`, `top` is not from 1 to `V`, the
            mask is not `[B, T]`, or the tuned lens has another width than the model.
    """
    return _logit_lens(
        model, tokens, mask, sites=_names(sites), top=top, watch=_ids(watch), tuned=tuned
    )


@functools.partial(jax.jit, static_argnames=("sites", "top"))
def _logit_lens(model, tokens, mask, *, sites, top, watch, tuned) -> OrderedDict[str, Reading]:
    reader = functools.partial(_log_probs, model)
    return _readings(model, reader, tokens, mask, sites, top, watch, tuned, diverges=True)


def _names(sites: Sequence[str] | None) -> tuple[str, ...] | None:
    if isinstance(sites, str):
        raise ValueError(f"sites={sites!r} is one name: give a sequence of names")
    return None if sites is None else tuple(sites)


def _ids(watch: Any) -> jax.Array | None:
    return None if watch is None else jnp.asarray(watch, jnp.int32)


def embedding_similarity(
    model: SitedModel,
    tokens: Shaped[Array, "B T *D"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    sites: Sequence[str] | None = None,
    top: int = 10,
    watch: Int[Array, " W"] | Sequence[int] | None = None,
) -> OrderedDict[str, Reading]:
    """Compute cosines between activations and the embeddings of all tokens, at each site.

    Because no LM head is used, this lens suits vectors that predict no token, such as latents.
    `Reading.tokens` uses the score-weighted sum of a token's streams, or the token's original alone
    if the model's merge is "rightmost". Arguments, result and errors are those of `logit_lens`, but
    the values in `TopTokens` are cosines.
    """
    return _embedding_similarity(
        model, tokens, mask, sites=_names(sites), top=top, watch=_ids(watch)
    )


@functools.partial(jax.jit, static_argnames=("sites", "top"))
def _embedding_similarity(model, tokens, mask, *, sites, top, watch) -> OrderedDict[str, Reading]:
    table = model.embed_tokens(jnp.arange(model.vocab_size))
    reader = functools.partial(_cosines, model, _normed(table))
    return _readings(model, reader, tokens, mask, sites, top, watch, None, diverges=False)


def mean_lens(
    model: SitedModel,
    tokens: Shaped[Array, "B T *D"],
    positions: Bool[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    sites: Sequence[str] | None = None,
    top: int = 10,
    watch: Int[Array, " W"] | Sequence[int] | None = None,
    tuned: TunedLens | None = None,
    cosine: bool = False,
) -> OrderedDict[str, TopTokens]:
    """Average a lens's probabilities or cosines over chosen tokens of each row (arXiv 2510.01070).

    Args:
        model: Model with sites.
        tokens: Token ids `[B, T]` int32, or vectors `[B, T, D]` in their place.
        positions: Whether each token belongs to the average, `[B, T]` bool, such as the control
            tokens of a turn. Padding never belongs to it.
        mask: Whether each token is real, `[B, T]` bool; padding may stand on either side.
        sites: Names of the sites to decode; all sites of the model by default.
        top: Number of token ids with the largest values to return.
        watch: Token ids `[W]` int32 whose value and rank to return; none by default.
        tuned: Affine maps of a tuned lens; None for the plain logit lens.
        cosine: Whether to average cosines to token embeddings instead of probabilities.

    Returns:
        Mapping from site name to a `TopTokens` with leading axis `[B]`. Values are logarithms of
        mean probabilities, or mean cosines, and NaN for a row without a chosen token.

    Raises:
        ValueError: `positions` is not `[B, T]`, or an argument is refused as in `logit_lens`.
    """
    return _mean_lens(
        model, tokens, positions, mask, sites=_names(sites), top=top, watch=_ids(watch),
        tuned=tuned, cosine=cosine,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("sites", "top", "cosine"))
def _mean_lens(
    model, tokens, positions, mask, *, sites, top, watch, tuned, cosine
) -> OrderedDict[str, TopTokens]:
    if positions.shape != tokens.shape[:2]:
        raise ValueError(
            f"positions of shape {positions.shape} for tokens of shape {tokens.shape[:2]}: give "
            "one bool for each token"
        )
    _check(model, sites, top)
    if cosine:
        table = _normed(model.embed_tokens(jnp.arange(model.vocab_size)))
        reader = functools.partial(_cosines, model, table)
    else:
        reader = functools.partial(_log_probs, model)
    inputs, length, _ = (tokens, None, None) if mask is None else left_align(tokens, mask)
    chosen = positions if mask is None else left_align(positions & mask, mask)[0]
    _, found = record(model, inputs, length, sites, None)

    def read(streams: Streams, lineage: Lineage, affine: Any) -> TopTokens:
        values = reader(streams, affine)[1]
        values = values if cosine else jnp.exp(values)
        total = jnp.where(chosen[..., None], values, 0).sum(axis=1)
        mean = total / chosen.sum(axis=1)[:, None]
        return _top(mean if cosine else jnp.log(mean), top, watch)

    return by_site(found, tuned, read)


def _readings(
    model, reader, tokens, mask, sites, top, watch, tuned, *, diverges: bool
) -> OrderedDict[str, Reading]:
    _check(model, sites, top)
    inputs, length, rank = (tokens, None, None) if mask is None else left_align(tokens, mask)
    _, found = record(model, inputs, length, sites, None)

    def read(streams: Streams, lineage: Lineage, affine: Any) -> Any:
        own, merged = reader(streams, affine)
        if one_per_token(streams):
            divergence = jnp.zeros(streams.token.shape)
            own_top = merged_top = _top(own, top, watch)
        else:
            divergence = _divergence(own, lineage) if diverges else jnp.zeros(streams.token.shape)
            own_top, merged_top = _top(own, top, watch), _top(merged, top, watch)
        return own_top, merged_top, divergence

    readings: OrderedDict[str, Reading] = OrderedDict()
    for site, (own, merged, divergence) in by_site(found, tuned, read).items():
        streams, lineage = found[site]
        if mask is not None and rank is not None:
            restore = lambda leaf: restore_alignment(leaf, mask, rank)  # noqa: E731
            merged = jax.tree.map(restore, merged)
            own = merged if one_per_token(streams) else own
        readings[site] = Reading(rows_of(streams, lineage, mask), own, merged, divergence)
    return readings


def by_site(
    found: OrderedDict[str, tuple[Streams, Lineage]],
    tuned: TunedLens | None,
    read: Callable[[Streams, Lineage, Any], Any],
) -> OrderedDict[str, Any]:
    """Apply a function to each site, in one compiled loop over consecutive sites of equal shapes.

    Args:
        found: Mapping from site to its streams and lineage, as `record` returns it.
        tuned: Affine maps of a tuned lens, or None.
        read: Function of the streams, the lineage and the affine map `(weight, bias)` of a site;
            the map is None without a tuned lens.

    Returns:
        Mapping from site to the result of `read`.

    Raises:
        ValueError: The tuned lens has another width than the residuals.
    """
    results: OrderedDict[str, Any] = OrderedDict()
    alike = lambda site: (jax.tree.structure(found[site][0]), found[site][0].x.shape)  # noqa: E731
    for _, group in itertools.groupby(found, key=alike):
        names = list(group)
        width = found[names[0]][0].x.shape[-1]
        if tuned is not None and tuned.bias.shape[-1] != width:
            raise ValueError(
                f"a tuned lens of width {tuned.bias.shape[-1]} for residuals of width {width}: "
                "train one for this model (thoughtbubbles audit tuned-lens)"
            )
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(found[name] for name in names))
        affine = None if tuned is None else tuned.of_sites(names)
        one = lambda inputs: read(inputs[0][0], inputs[0][1], inputs[1])  # noqa: E731
        rows = jax.lax.map(one, (stacked, affine))
        for index, name in enumerate(names):
            results[name] = jax.tree.map(lambda leaf, index=index: leaf[index], rows)
    return results


def _log_probs(
    model: SitedModel, streams: Streams, affine: Any
) -> tuple[Float[Array, "B S V"], Float[Array, "B T V"]]:
    """Log-probabilities predicted by each stream, and by the merged streams of each token."""
    streams = streams.replace(x=translated(streams.x, affine))
    own = jax.nn.log_softmax(model.decode(streams.x).astype(jnp.float32))
    if one_per_token(streams):
        return own, own
    return own, jax.nn.log_softmax(model.logits(streams).astype(jnp.float32))


def _cosines(
    model: SitedModel, table: jax.Array, streams: Streams, affine: Any
) -> tuple[Float[Array, "B S V"], Float[Array, "B T V"]]:
    """Cosines of each stream, and of each token's merged streams, to unit rows of a table."""
    cosine = lambda x: jnp.einsum("bsd,vd->bsv", _normed(x), table)  # noqa: E731
    own = cosine(streams.x)
    if one_per_token(streams):
        return own, own
    kind = getattr(getattr(model, "config", None), "merge", "residual")
    return own, cosine(merge(streams, "rightmost" if kind == "rightmost" else "residual"))


def _normed(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    norm = jnp.linalg.norm(wide, axis=-1, keepdims=True)
    return wide / jnp.where(norm > 0, norm, 1)


def _top(values: jax.Array, top: int, watch: jax.Array | None) -> TopTokens:
    best, ids = jax.lax.top_k(values, top)
    if watch is None:
        nothing = (*values.shape[:-1], 0)
        return TopTokens(ids, best, jnp.zeros(nothing), jnp.zeros(nothing, jnp.int32))
    watched = jnp.take(values, watch, axis=-1)
    rank = jax.lax.map(
        lambda index: (values > jnp.take(values, index, axis=-1)[..., None]).sum(axis=-1), watch
    )
    # NaN, of an id outside the vocabulary or of a row without positions, ranks last.
    rank = jnp.where(jnp.isnan(watched), values.shape[-1], jnp.moveaxis(rank, 0, -1))
    return TopTokens(ids, best, watched, rank)


def _divergence(log_probs: Float[Array, "B S V"], lineage: Lineage) -> Float[Array, "B S"]:
    """Jensen-Shannon divergence between the predictions of each stream and of its parent."""
    parent = jnp.maximum(lineage.parent, 0)[..., None]
    theirs = jnp.take_along_axis(log_probs, parent, axis=1)
    middle = jnp.logaddexp(log_probs, theirs) - jnp.log(2.0)
    part = lambda p: jnp.where(p > -jnp.inf, jnp.exp(p) * (p - middle), 0).sum(axis=-1)  # noqa: E731
    return jnp.where(lineage.parent >= 0, (part(log_probs) + part(theirs)) / 2, 0)


def _check(model: Any, sites: tuple[str, ...] | None, top: int) -> None:
    check_sited(model)
    check_sites(sites or (), model.sites)
    if not 1 <= top <= model.vocab_size:
        raise ValueError(f"top={top} of {model.vocab_size} token ids: choose 1 to that many")

"""Sites: named points of a forward pass at which activations are captured or edited.

A model with sites implements the protocol `SitedModel`.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import jax
import jax.numpy as jnp

from thoughtbubbles.forking import ForkPlan, compact
from thoughtbubbles.rows import left_align, restore_alignment
from thoughtbubbles.short_repr import ShortRepr
from thoughtbubbles.streams import Streams

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int, Shaped

Edit = Callable[[jax.Array], jax.Array]
"""Function from the activation at a site to its replacement, of the same shape."""

Value = TypeVar("Value", jax.Array, Streams)


class Visit(Protocol):
    """Interface of a hook that a forward pass calls at its sites to capture or edit activations."""

    def wants(self, site: str) -> bool:
        """Whether the hook captures or edits the site; a scan over blocks may skip other sites."""
        ...

    def __call__(self, site: str, value: Value, plan: ForkPlan | None = None) -> Value:
        """Return the value that the forward pass continues with.

        Args:
            site: Name of the site.
            value: Vectors `[B, T, D]`, or streams, several of which may belong to one token.
            plan: Plan that a fork layer just carried out to make `value`, at a site `fork_i`; None
                at other sites.
        """
        ...


class SitedModel(Protocol):
    """Interface of a decoder with sites.

    Attributes:
        sites: Names of the sites in the order of the forward pass.
        vocab_size: Size `V` of the vocabulary.
    """

    @property
    def sites(self) -> tuple[str, ...]: ...

    @property
    def vocab_size(self) -> int: ...

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Return the embeddings `[..., D]` of token ids `[...]` int32."""
        ...

    def run_sites(self, inputs: jax.Array, length: jax.Array | None, visit: Visit) -> Any:
        """Run a forward pass that replaces the activation at each site by the result of `visit`.

        Args:
            inputs: Token ids `[B, T]` int32 or vectors `[B, T, D]`, padded on the right.
            length: Number of real tokens in each row, `[B]` int32; None means all `T`.
            visit: Hook to call at each site.

        Returns:
            Output of the model, to pass to `logits`.
        """
        ...

    def logits(self, output: Any) -> jax.Array:
        """Return logits `[B, T, V]` from an output of `run_sites`."""
        ...

    def decode(self, x: jax.Array) -> jax.Array:
        """Apply final norm and LM head: vectors `[..., D]` of a site to logits `[..., V]`."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Lineage(ShortRepr):
    """Depth and parent of each stream; a root is a stream that exists since the input.

    Attributes:
        depth: `[B, S]` int32, number of forks from a stream back to its root; 0 for a root.
        parent: `[B, S]` int32, current slot of the stream from which this stream was forked; -1 for
            a root, and if the parent has died.
    """

    depth: jax.Array
    parent: jax.Array

    @classmethod
    def start(cls, token: Int[Array, "B S"]) -> Lineage:
        """Return the lineage of streams before any fork layer, which are all roots."""
        return cls(jnp.zeros_like(token), jnp.full_like(token, -1))

    def after(self, plan: ForkPlan) -> Lineage:
        """Return the lineage after a fork layer that carries out `plan`."""
        of_slot = lambda values, slot: jnp.take_along_axis(values, slot, axis=1)  # noqa: E731
        before, is_fork = plan.source // 2, plan.source % 2 == 0
        # The new slot of each stream, which is that of its keep candidate.
        goes_on = jnp.where(plan.kept, plan.slot, -1)[:, 1::2]
        parent = of_slot(self.parent, before)
        inherited = jnp.where(parent >= 0, of_slot(goes_on, jnp.maximum(parent, 0)), -1)
        parent = jnp.where(is_fork, of_slot(goes_on, before), inherited)
        depth = of_slot(self.depth, before) + is_fork
        return Lineage(jnp.where(plan.alive, depth, 0), jnp.where(plan.alive, parent, -1))


def plan_of(fork: Any, streams: Streams) -> ForkPlan:
    """Return the plan that a `Fork` layer carries out on streams at inference."""
    keep = fork.policy.keep(fork.candidates(streams))
    return compact(keep, min(keep.shape[1], fork.policy.capacity(streams.num_tokens)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Rows(ShortRepr):
    """Token, score and parent of each slot of an activation.

    Before any fork, there is one slot for each token, in the caller's order. After a fork layer,
    the slots are those of `Streams`: in the order of the text, with dead slots last.

    Attributes:
        token: `[B, S]` int32, index of each slot's token in the caller's row.
        alive: `[B, S]` bool, whether the slot holds a vector of a real token.
        log_score: `[B, S]` float32 cumulative log-score of each stream, 0 without forks.
        depth: `[B, S]` int32, number of forks from a stream back to its root (`Lineage`).
        parent: `[B, S]` int32, slot of the stream from which this stream was forked, or -1
            (`Lineage`).
    """

    token: jax.Array
    alive: jax.Array
    log_score: jax.Array
    depth: jax.Array
    parent: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Activation(Rows):
    """The vectors captured at a site, with the token, score and parent of each slot (`Rows`).

    Attributes:
        x: `[B, S, D]`, vector of each slot.
    """

    x: jax.Array


class Recorder:
    """A `Visit` for one forward pass, which applies edits, then records the streams at sites.

    Args:
        sites: Names of the sites to record.
        edit: Mapping from site to the edit of its activation.
        length: Number of real tokens in each row, `[B]` int32, if values may be vectors.
    """

    def __init__(
        self, sites: Collection[str], edit: Mapping[str, Edit], length: jax.Array | None = None
    ):
        self.sites, self.edit, self.length = sites, edit, length
        # Ordered, since jax sorts the keys of other dicts.
        self.found: OrderedDict[str, tuple[Streams, Lineage]] = OrderedDict()
        self._lineage: Lineage | None = None

    def wants(self, site: str) -> bool:
        """Whether the site is recorded or edited."""
        return site in self.sites or site in self.edit

    def __call__(self, site: str, value: Any, plan: ForkPlan | None = None) -> Any:
        """Apply the edit of the site, if any; record the result if requested; return the result."""
        streams = value if isinstance(value, Streams) else Streams.start(value, self.length)
        if self._lineage is None:
            self._lineage = Lineage.start(streams.token)
        if plan is not None:
            self._lineage = self._lineage.after(plan)
        if site in self.edit:
            streams = streams.replace(x=_edited(site, streams.x, self.edit[site]))
        if site in self.sites:
            self.found[site] = streams, self._lineage
        return streams if isinstance(value, Streams) else streams.x


def _edited(site: str, x: jax.Array, edit: Edit) -> jax.Array:
    changed = edit(x)
    if jnp.shape(changed) != x.shape:
        raise ValueError(
            f"the edit of {site} makes {jnp.shape(changed)} of {x.shape}: keep the shape"
        )
    return changed.astype(x.dtype)


def record(
    model: SitedModel,
    inputs: Shaped[Array, "B T *D"],
    length: Int[Array, " B"] | None,
    sites: Collection[str] | None,
    edit: Mapping[str, Edit] | None,
) -> tuple[Float[Array, "B T V"], OrderedDict[str, tuple[Streams, Lineage]]]:
    """Run right-padded rows; return logits, and a mapping from site to its streams and lineage.

    Arguments are as in `capture`; the streams are those after the edit of their site.
    """
    check_sited(model)
    sites, edit = model.sites if sites is None else tuple(sites), dict(edit or {})
    check_sites(sites, (*model.sites, *getattr(model, "neuron_sites", ())))
    check_sites(edit, model.sites)
    recorder = Recorder(sites, edit, length)
    logits = model.logits(model.run_sites(inputs, length, recorder))
    return logits, recorder.found


def capture(
    model: SitedModel,
    tokens: Shaped[Array, "B T *D"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    sites: Collection[str] | None = None,
    edit: Mapping[str, Edit] | None = None,
) -> tuple[Float[Array, "B T V"], OrderedDict[str, Activation]]:
    """Run one forward pass and return its logits and the activations at sites.

    Without edits, the logits are those of `model(tokens, mask)`: bit for bit if operations run one
    by one, and up to float noise in a compiled program. Under `jit`, `sites` must be static; define
    an edit that depends on arrays, such as a PRNG key for noise, inside the traced function.

    Args:
        model: Model with sites.
        tokens: Token ids `[B, T]` int32, or vectors `[B, T, D]` in their place.
        mask: Whether each token is real, `[B, T]` bool; padding may stand on either side.
        sites: Names of the sites to capture; all sites of the model by default. A scan over blocks
            is split at every captured site, so fewer sites compile faster.
        edit: Mapping from site to a function from the activation `[B, S, D]` to its replacement.
            The function gets rows that are padded on the right, whatever the mask.

    Returns:
        Logits `[B, T, V]` float32, zeros in padding; and a mapping from site to its `Activation`
        after the edit, in the order of the forward pass.

    Raises:
        ValueError: The model has no sites or lacks one of the given sites, the mask is not
            `[B, T]`, or an edit changes a shape.
    """
    if mask is None:
        logits, found = record(model, tokens, None, sites, edit)
        return logits, OrderedDict(
            (site, _activation(*of, None, None)) for site, of in found.items()
        )
    aligned, length, rank = left_align(tokens, mask)
    logits, found = record(model, aligned, length, sites, edit)
    captured = OrderedDict((site, _activation(*of, mask, rank)) for site, of in found.items())
    return restore_alignment(logits, mask, rank), captured


def _activation(
    streams: Streams, lineage: Lineage, mask: jax.Array | None, rank: jax.Array | None
) -> Activation:
    rows = rows_of(streams, lineage, mask)
    x = streams.x
    if mask is not None and rank is not None and one_per_token(streams):
        x = restore_alignment(x, mask, rank)
    fields = rows.token, rows.alive, rows.log_score, rows.depth, rows.parent
    return Activation(*fields, x)


def one_per_token(streams: Streams) -> bool:
    """Whether the slots are the tokens: no fork layer came before, and no copies (static)."""
    return not streams.forked and streams.x.shape[1] == streams.num_tokens


def rows_of(streams: Streams, lineage: Lineage, mask: jax.Array | None) -> Rows:
    """Describe the slots of left-aligned rows, with token indices in the caller's masked rows."""
    token, alive = streams.token, streams.alive
    if mask is not None and one_per_token(streams):
        token, alive = jnp.zeros_like(token) + jnp.arange(streams.num_tokens), mask
    elif mask is not None:
        order = jnp.argsort(~mask, axis=1, stable=True).astype(token.dtype)
        token = jnp.take_along_axis(order, token, axis=1)
    return Rows(token, alive, streams.log_score, lineage.depth, lineage.parent)


def check_sited(model: Any) -> None:
    """Raise a ValueError unless a model has the members of `SitedModel`."""
    names = ("sites", "vocab_size", "embed_tokens", "run_sites", "logits", "decode")
    if missing := [name for name in names if not hasattr(model, name)]:
        raise ValueError(
            f"{type(model).__name__} can't be read at sites: it has no {', '.join(missing)} "
            "(see thoughtbubbles.sites.SitedModel)"
        )


def check_sites(sites: Collection[str], choices: Collection[str]) -> None:
    """Raise a ValueError unless all sites are among the choices."""
    for site in sites:
        if site not in choices:
            raise ValueError(f"no site {site!r} here: choose from {', '.join(choices)}")

"""Ablations of latent memory: filters for `Request.keep_memory` that drop selected memories."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from memgen.analysis import Clusters, Memories, unit_rows
from memgen.short_repr import ShortRepr


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ClusterAblation(ShortRepr):
    """Filter for `Request.keep_memory` that drops the memories of one cluster.

    A memory is the group of latents that one event inserts. The rule "nearest" drops a memory if
    the distance of its mean latent to the cluster's centroid is below `1 - margin` times the
    distance to every other centroid. The rule "paper" pools all centroids and token embeddings, and
    drops a memory if the cluster's centroid is among the `neighbours` pool members with the highest
    cosine similarity to the mean latent. If latents lie far from all embeddings, every centroid is
    among these neighbours, so the rule "paper" drops nearly all memories, whichever cluster is
    chosen. Under either rule, compare the effect with a `CountMatchedControl`.

    Attributes:
        centroids: `[C, D]` float32 centroids of all `C` clusters (`Clusters.centroids`).
        cluster: Index of the cluster to drop, an int32 scalar.
        margin: Margin of the rule "nearest", a float32 scalar. A margin of 0 drops the memories
            that k-means would assign to the cluster.
        embeddings: `[V, D]` float32 token embeddings of the reasoner for the rule "paper"; None
            for the rule "nearest".
        neighbours: Number of nearest neighbours that the rule "paper" considers (static).
    """

    centroids: jax.Array
    cluster: jax.Array
    margin: jax.Array
    embeddings: jax.Array | None
    neighbours: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        clusters: Clusters,
        cluster: int,
        *,
        margin: float = 0.1,
        rule: Literal["nearest", "paper"] = "nearest",
        embeddings: np.ndarray | jax.Array | None = None,
        neighbours: int = 10,
    ) -> "ClusterAblation":
        """Make the filter that drops a cluster.

        Args:
            clusters: Clusters of memories.
            cluster: Index of the cluster to drop.
            margin: Margin of the rule "nearest", from 0 to 1.
            rule: Rule that decides whether a memory belongs to the cluster: "nearest" or "paper".
            embeddings: `[V, D]` token embeddings of the reasoner, required by the rule "paper".
                The rule "nearest" requires None.
            neighbours: Number of nearest neighbours that the rule "paper" considers.

        Raises:
            ValueError: The cluster or the rule does not exist, the margin is outside of [0, 1], or
                the embeddings do not fit the rule.
        """
        if not 0 <= cluster < len(clusters.centroids):
            raise ValueError(f"cluster={cluster} of {len(clusters.centroids)}: count from 0")
        if not 0 <= margin <= 1:
            raise ValueError(f"margin={margin}: choose from 0 to 1")
        if rule not in ("nearest", "paper"):
            raise ValueError(f"rule={rule!r}: choose nearest or paper")
        if (rule == "paper") != (embeddings is not None):
            raise ValueError(f"rule={rule!r}: the paper's rule needs embeddings, the other none")
        return cls(
            jnp.asarray(clusters.centroids, jnp.float32),
            jnp.int32(cluster),
            jnp.float32(margin),
            None if embeddings is None else jnp.asarray(embeddings, jnp.float32),
            neighbours,
        )

    def __call__(self, latents: jax.Array, valid: jax.Array, keys: jax.Array) -> jax.Array:
        """Decide which memories to keep.

        Args:
            latents: `[B, K, D]` latents of `B` memories with `K` latent slots each.
            valid: `[B, K]` bool, True for real latents and False for unused slots.
            keys: Unused; the filter is deterministic.

        Returns:
            `[B]` bool, True for memories to keep.
        """
        weight = valid.astype(jnp.float32)[..., None]
        mean = (latents * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1)
        if self.embeddings is not None:
            near = unit_rows(mean) @ unit_rows(jnp.concatenate([self.centroids, self.embeddings])).T
            own = jnp.take(near, self.cluster, axis=1)[:, None]
            return (near > own).sum(axis=1) >= self.neighbours
        distance = jnp.linalg.norm(mean[:, None] - self.centroids, axis=2)
        named = jnp.arange(len(self.centroids)) == self.cluster
        own = jnp.where(named, distance, 0).sum(axis=1)
        other = jnp.where(named, jnp.inf, distance).min(axis=1)
        return own >= (1 - self.margin) * other

    def drop_rate(self, memories: Memories) -> float:
        """Return the fraction of recorded memories that the filter drops."""
        keys = jax.random.split(jax.random.key(0), len(memories.latents))
        kept = self(jnp.asarray(memories.latents), jnp.asarray(memories.valid), keys)
        return float(1 - kept.mean())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class CountMatchedControl(ShortRepr):
    """Filter for `Request.keep_memory` that drops memories at random with a fixed probability.

    The filter is a control for a `ClusterAblation` that drops the same fraction of memories. It
    shows the effect of losing arbitrary memories: only the part of the ablation's effect that
    exceeds the control's effect is due to the cluster.

    Attributes:
        rate: Probability of dropping a memory, a float32 scalar. To match an ablation, set `rate`
            to the ablation's `drop_rate` of memories that were recorded without any filter.
    """

    rate: jax.Array

    @classmethod
    def of(cls, rate: float) -> "CountMatchedControl":
        """Make a control; raise a ValueError if the rate is outside of [0, 1]."""
        if not 0 <= rate <= 1:
            raise ValueError(f"rate={rate}: choose from 0 to 1")
        return cls(jnp.float32(rate))

    def __call__(self, latents: jax.Array, valid: jax.Array, keys: jax.Array) -> jax.Array:
        """Draw which of `B` memories to keep, `[B]` bool, with one PRNG key of `keys` for each."""
        return jax.vmap(jax.random.uniform)(keys) >= self.rate

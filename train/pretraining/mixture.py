"""Pretraining on a mixture: the loss of each source, beside the loss that is trained on."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from thoughtbubbles import Architecture
from train.data import MixtureData
from train.engine.step import Loss

_NATS, _TARGETS = "mixture_nats", "mixture_targets"
SOURCE_SUMS = frozenset((_NATS, _TARGETS))
"""Names of the sums of each source; a source is in few steps, so they are added up over steps."""


def mixture_loss(num_sources: int) -> Loss:
    """`Loss` of rows and their sources, which is that of the rows alone.

    The sums of each source are added to those for the metrics, unless the model's loss is no sum of
    `token_losses` (`Architecture.loss_by_token`).

    Args:
        num_sources: Number of sources (S).
    """

    def loss(
        model: Architecture, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        rows = batch["tokens"]
        if not model.loss_by_token:
            return model.loss(rows, track=True, key=key)
        nats, output = model.token_losses(rows, track=True, key=key)
        is_target = rows[:, 1:] >= 0
        source = jax.nn.one_hot(batch["source"], num_sources)
        fixed = jax.lax.stop_gradient(nats).sum(axis=1)
        sums = {
            _NATS: jnp.einsum("b,bs->s", fixed, source),
            _TARGETS: jnp.einsum("b,bs->s", is_target.sum(axis=1, dtype=jnp.float32), source),
        }
        return nats.sum(), is_target.sum(dtype=jnp.float32), model.statistics(output) | sums

    return loss


def mixture_metrics(
    data: MixtureData, sums: Mapping[str, Any], sequences: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics of each source: share and epochs so far, and the loss of its rows.

    Args:
        data: The mixture.
        sums: Sums of the step; those of the sources are of all steps that the loss is the mean of.
        sequences: Number of sequences that the run has read.

    Returns:
        Metrics by name, and the sums that are not of the mixture. A source without rows in
        these steps has no loss.
    """
    metrics: dict[str, float] = {}
    for name, (share, epochs) in data.progress(sequences).items():
        metrics |= {f"source/{name}/share": share, f"source/{name}/epochs": epochs}
    if _NATS in sums:
        both = zip(data.parts, np.asarray(sums[_NATS]), np.asarray(sums[_TARGETS]), strict=True)
        metrics |= {f"source/{name}/loss": float(n / count) for name, n, count in both if count}
    return metrics, {name: of for name, of in sums.items() if name not in (_NATS, _TARGETS)}

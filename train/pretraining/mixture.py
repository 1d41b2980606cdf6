"""Pretraining on a mixture: the loss and the metrics of each source beside the training loss."""

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
"""Names of the sums over each source's rows. The sums are added up over the steps between log
lines, since a step may have no row of a source."""


def mixture_loss(num_sources: int) -> Loss:
    """Make the `Loss` of a mixture's rows, which also sums nats and targets of each source.

    The loss itself is the same as for a single corpus. The sums of each source are left out if the
    model's loss is not that of `summed_loss` (`Architecture.loss_by_token`).

    Args:
        num_sources: Number of sources.

    Returns:
        Loss of a batch, a mapping with `tokens`, `[B, T + 1]` int32, and `source`, the index `[B]`
        int32 of each row's source.
    """

    def loss(
        model: Architecture, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        rows = batch["tokens"]
        if not model.loss_by_token:
            return model.loss(rows, track=True, key=key)
        total, nats, output = model.summed_loss(rows, track=True, key=key)
        is_target = rows[:, 1:] >= 0
        source = jax.nn.one_hot(batch["source"], num_sources)
        sums = {
            _NATS: jnp.einsum("bt,bs->s", nats, source),
            _TARGETS: jnp.einsum("b,bs->s", is_target.sum(axis=1, dtype=jnp.float32), source),
        }
        return total, is_target.sum(dtype=jnp.float32), model.statistics(output) | sums

    return loss


def mixture_metrics(
    data: MixtureData, sums: Mapping[str, Any], sequences: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Compute the metrics of each source.

    Args:
        data: Mixture that the run reads.
        sums: Mapping from name to sum that the loss returned in a step, in which the `SOURCE_SUMS`
            are totals over all steps since the last metrics.
        sequences: Number of sequences that the run has read.

    Returns:
        Mapping from name to metric, and the sums other than `SOURCE_SUMS`. The metrics are
        `source/NAME/share` and `source/NAME/epochs` of the data read so far, and
        `source/NAME/loss`, the mean over the source's targets, which is left out for a source
        without rows in these steps.
    """
    metrics: dict[str, float] = {}
    for name, (share, epochs) in data.progress(sequences).items():
        metrics |= {f"source/{name}/share": share, f"source/{name}/epochs": epochs}
    if _NATS in sums:
        both = zip(data.parts, np.asarray(sums[_NATS]), np.asarray(sums[_TARGETS]), strict=True)
        metrics |= {f"source/{name}/loss": float(n / count) for name, n, count in both if count}
    return metrics, {name: of for name, of in sums.items() if name not in (_NATS, _TARGETS)}

"""Fork statistics as sums over a batch, which can be added over micro-batches and devices."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from thoughtbubbles.forward import Output

SCORE_BINS = 10


def fork_statistics(output: Output) -> dict[str, jax.Array]:
    """Count tokens and streams of a batch after each of `F` fork layers.

    Returns:
        Dict of float32 arrays, empty without fork layers: `tokens [F]`, `streams [F]`,
        `forked_tokens [F]` (number of tokens with more than one stream), and
        `scores [F, SCORE_BINS]`, a histogram of the streams' cumulative scores p in equal bins of
        [0, 1].
    """
    if not output.forks:
        return {}
    layers = []
    for streams in output.forks:
        _, size = streams.bubbles()
        score = jnp.exp(streams.log_score)
        bin_of = jnp.minimum((score * SCORE_BINS).astype(jnp.int32), SCORE_BINS - 1)
        bins = jnp.arange(SCORE_BINS)[None, None]
        in_bin = (bin_of[..., None] == bins) & streams.alive[..., None]
        originals = streams.original
        layers.append(
            {
                "tokens": originals.sum(dtype=jnp.float32),
                "streams": streams.alive.sum(dtype=jnp.float32),
                "forked_tokens": (originals & (size > 1)).sum(dtype=jnp.float32),
                "scores": in_bin.sum(axis=(0, 1), dtype=jnp.float32),
            }
        )
    return jax.tree.map(lambda *values: jnp.stack(values), *layers)


def thresholds(tracked: Any) -> dict[str, jax.Array]:
    """Return the tracked thresholds of the `F` fork layers.

    Args:
        tracked: `nnx.State` of the model's tracked variables.

    Returns:
        Dict with `threshold [F]`, or an empty dict if the policy tracks no threshold.
    """
    values = jax.tree.leaves(tracked)
    return {"threshold": jnp.stack(values)} if values else {}


def readable(sums: Mapping[str, Any], fork_layers: tuple[int, ...]) -> dict[str, Any]:
    """Compute metrics of each fork layer from sums of `fork_statistics` and `thresholds`.

    Args:
        sums: Sums of `fork_statistics` over a step, joined with the dict of `thresholds`.
        fork_layers: Indices `L` of the blocks that follow the fork layers.

    Returns:
        Metrics `fork_L/streams_per_token`, `fork_L/forked_share` (fraction of tokens with more than
        one stream), `fork_L/score_histogram` (fraction of streams in each bin of scores) and, if
        tracked, `fork_L/threshold`. Empty for sums without `tokens`.
    """
    metrics: dict[str, Any] = {}
    if "tokens" not in sums:
        return metrics
    for index, layer in enumerate(fork_layers):
        layer_sums = {name: np.asarray(values)[index] for name, values in sums.items()}
        tokens = max(float(layer_sums["tokens"]), 1.0)
        name = f"fork_{layer}"
        metrics[f"{name}/streams_per_token"] = float(layer_sums["streams"]) / tokens
        metrics[f"{name}/forked_share"] = float(layer_sums["forked_tokens"]) / tokens
        scores = layer_sums["scores"] / max(float(layer_sums["scores"].sum()), 1.0)
        if "threshold" in layer_sums:
            metrics[f"{name}/threshold"] = float(layer_sums["threshold"])
        metrics[f"{name}/score_histogram"] = [round(float(share), 6) for share in scores]
    return metrics


def score_samples(sums: Mapping[str, Any], fork_layers: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return the scores of all streams after each fork layer, rounded to the middle of their bin.

    Args:
        sums: Sums of `fork_statistics`.
        fork_layers: Indices `L` of the blocks that follow the fork layers.

    Returns:
        Mapping from `fork_L/score` to one score for each stream; empty for sums without `scores`.
    """
    if "scores" not in sums:
        return {}
    middles = (np.arange(SCORE_BINS) + 0.5) / SCORE_BINS
    return {
        f"fork_{layer}/score": np.repeat(middles, np.asarray(sums["scores"])[index].astype(int))
        for index, layer in enumerate(fork_layers)
    }

"""Bubble maps: where a model forked, as arrays, as text for a terminal, and as a figure."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from thoughtbubbles.model import Thoughtbubbles

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class BubbleMap:
    """Bubbles of one text, by block and token.

    Attributes:
        streams: `[num_layers, T]` int32, live streams of each token in each block.
        score: `[num_layers, T]` float32, their mean cumulative score p (0 where none is left).
        tokens: the text of each token.
        fork_layers: blocks with a fork layer in front.
    """

    streams: np.ndarray
    score: np.ndarray
    tokens: tuple[str, ...]
    fork_layers: tuple[int, ...]

    def text(self, width: int = 100) -> str:
        """The map for a terminal: the text, and below it each token's streams after each fork."""
        label = max((len(f"fork {layer}") for layer in self.fork_layers), default=6)
        digits = len(str(self.streams.max()))  # ten streams or more need wider cells
        cells = [f"{_visible(token):<{digits}}" for token in self.tokens]
        lines, start = [], 0
        while start < len(cells):
            end, used = start, label + 2
            while end < len(cells) and (end == start or used + len(cells[end]) <= width):
                used += len(cells[end])
                end += 1
            lines.append((" " * (label + 2) + "".join(cells[start:end])).rstrip())
            for layer in self.fork_layers:
                counts = self.streams[layer, start:end]
                row = [f"{n:<{len(c)}}" for n, c in zip(counts, cells[start:end], strict=True)]
                lines.append(f"{f'fork {layer}':<{label}}  " + "".join(row).rstrip())
            lines.append("")
            start = end
        return "\n".join(lines)

    def figure(self) -> "Figure":
        """Two heat maps, layer by token: number of streams, and mean score. Needs matplotlib."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        count = len(self.tokens)
        figure = Figure(figsize=(min(max(6.0, 0.17 * count), 24.0), 4.8), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True)
        panels = (
            (self.streams, "streams per token", "viridis", 1, max(2, int(self.streams.max()))),
            (self.score, "mean score p", "magma", 0, 1),
        )
        for axis, (values, title, colours, low, high) in zip(axes, panels, strict=True):
            image = axis.imshow(
                values, aspect="auto", origin="lower", cmap=colours, vmin=low, vmax=high,
                interpolation="nearest",
            )  # fmt: skip
            figure.colorbar(image, ax=axis, label=title, ticks=MaxNLocator(5, integer=high > 1))
            axis.set_ylabel("block")
            axis.yaxis.set_major_locator(MaxNLocator(integer=True))
            for layer in self.fork_layers:
                axis.axhline(layer - 0.5, color="white", linewidth=0.8, linestyle=":")
        if count <= 140:
            axes[1].set_xticks(range(count), [_visible(token) for token in self.tokens])
            longest = max(map(len, self.tokens))
            axes[1].tick_params(axis="x", labelsize=7, rotation=90 if longest > 2 else 0)
        axes[1].set_xlabel("token (dotted lines: fork layers)")
        return figure


def bubble_map(model: Thoughtbubbles, ids: Sequence[int], tokens: Sequence[str]) -> BubbleMap:
    """Run the model over one text and read its bubbles.

    Args:
        ids: token ids, at least one.
        tokens: the text of each.
    """
    if len(ids) != len(tokens) or not len(ids):
        raise ValueError(
            f"{len(ids)} ids and {len(tokens)} texts: need as many of both, at least one"
        )
    counts, scores = _trace(model, jnp.asarray(ids, jnp.int32)[None])
    config = model.config
    forks_before = np.searchsorted(config.fork_layers, np.arange(config.num_layers), side="right")
    return BubbleMap(
        np.asarray(counts)[forks_before],
        np.asarray(scores)[forks_before],
        tuple(tokens),
        config.fork_layers,
    )


@jax.jit
def _trace(model: Thoughtbubbles, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Streams and mean score by token, `[1 + forks, T]` each, at the input and after each fork."""
    num_tokens = ids.shape[1]
    counts = [jnp.full((num_tokens,), model.config.copies, jnp.int32)]
    scores = [jnp.ones((num_tokens,), jnp.float32)]
    for streams in model.run(ids).forks:
        mine = (streams.token[0] == jnp.arange(num_tokens)[:, None]) & streams.alive[0]
        counts.append(mine.sum(axis=1, dtype=jnp.int32))
        total = jnp.where(mine, jnp.exp(streams.log_score[0]), 0).sum(axis=1)
        scores.append(total / jnp.maximum(counts[-1], 1))
    return jnp.stack(counts), jnp.stack(scores)


def _visible(token: str) -> str:
    token = token.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    return "".join(char if char.isprintable() else "·" for char in token) or "·"

"""Bubble maps: where a model forked in a text, as arrays, terminal text, figure or web page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from thoughtbubbles.config import ModelConfig
from thoughtbubbles.forking import membership
from thoughtbubbles.forward import ForkingDecoder
from thoughtbubbles.pages import Page, map_page
from thoughtbubbles.short_repr import ShortRepr
from thoughtbubbles.streams import Streams

if TYPE_CHECKING:
    from matplotlib.figure import Figure


READABLE = 70  # largest number of tokens whose counts are written into a figure


@dataclasses.dataclass(frozen=True, repr=False)
class BubbleMap(ShortRepr):
    """Number and mean score of each token's streams in each block; Jupyter shows the `page`.

    Attributes:
        streams: `[num_layers, T]` int32, number of live streams of each token in each block.
        score: `[num_layers, T]` float32, mean cumulative score p of the token's live streams; 0
            for a token without live streams.
        tokens: Text of each token.
        fork_layers: Indices of the blocks that a fork layer precedes.
    """

    streams: np.ndarray
    score: np.ndarray
    tokens: tuple[str, ...]
    fork_layers: tuple[int, ...]

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        streams: Sequence[np.ndarray] | np.ndarray,
        score: Sequence[np.ndarray] | np.ndarray,
        tokens: Sequence[str],
    ) -> BubbleMap:
        """Make the map of a text from its stream counts after each fork layer (see `Generation`).

        Args:
            config: Config of the model, with `F` fork layers.
            streams: `[F, T]` int32, number of live streams of each token after each fork layer.
            score: `[F, T]` float32, mean cumulative score p of the token's live streams.
            tokens: Text of each token.
        """
        before = np.searchsorted(config.fork_layers, np.arange(config.num_layers), side="right")
        start = np.full((1, len(tokens)), config.copies, np.int32)
        ones = np.ones((1, len(tokens)), np.float32)
        streams = np.concatenate([start, *(row[None] for row in streams)])
        score = np.concatenate([ones, *(row[None] for row in score)])
        return cls(streams[before], score[before], tuple(tokens), config.fork_layers)

    def text(self, width: int = 100) -> str:
        """Render the map for a terminal: below each token, its stream counts after fork layers.

        Args:
            width: Number of columns at which lines are wrapped.
        """
        label = max((len(f"fork {layer}") for layer in self.fork_layers), default=6)
        digits = len(str(self.streams.max()))  # ten streams or more need wider cells
        cells = [f"{visible_text(token):<{digits}}" for token in self.tokens]
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

    def page(self) -> Page:
        """Render the map in HTML: each token with its streams above, and scores as tooltips.

        `page().save("map.html")` writes a self-contained page.
        """
        return map_page(self.streams, self.score, self.tokens, self.fork_layers)

    def _repr_html_(self) -> str:
        return self.page()._repr_html_()

    def figure(self, title: str = "Streams of each token, and their scores") -> Figure:
        """Draw number and mean score of streams as two heat maps, block by token (matplotlib).

        Args:
            title: Title of the figure, such as the names of the model and of its policy.
        """
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        count = len(self.tokens)
        figure = Figure(figsize=(min(max(6.0, 0.17 * count), 24.0), 4.0), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True)
        figure.suptitle(title, fontsize="medium", wrap=True)
        low, high = min(1, int(self.streams.min())), max(2, int(self.streams.max()))
        counts = colormaps["Blues"].resampled(high - low + 1)  # one colour for each count
        panels = (
            (self.streams, "streams of a token", counts, low - 0.5, high + 0.5),
            (self.score, "mean score p", "magma", 0, 1),
        )
        for axis, (values, label, colours, least, most) in zip(axes, panels, strict=True):
            image = axis.imshow(
                values, aspect="auto", origin="lower", cmap=colours, vmin=least, vmax=most,
                interpolation="nearest",
            )  # fmt: skip
            figure.colorbar(image, ax=axis, label=label, ticks=MaxNLocator(5, integer=most > 1))
            axis.set_ylabel("block")
            axis.yaxis.set_major_locator(MaxNLocator(integer=True))
            for layer in self.fork_layers:
                axis.axhline(layer - 0.5, color="grey", linewidth=0.8, linestyle=":")
        if count <= READABLE:
            for block, token in np.argwhere(self.streams != 1):
                number = self.streams[block, token]
                shade = "white" if number > (low + high) / 2 else "black"
                at = {"ha": "center", "va": "center", "size": 7, "color": shade}
                axes[0].text(token, block, str(number), **at)
        if count <= 2 * READABLE:
            axes[1].set_xticks(range(count), [visible_text(token) for token in self.tokens])
            longest = max(map(len, self.tokens))
            axes[1].tick_params(axis="x", labelsize=7, rotation=90 if longest > 2 else 0)
        axes[1].set_xlabel("token (dotted lines: fork layers)")
        return figure


def bubble_map(model: ForkingDecoder, ids: Sequence[int], tokens: Sequence[str]) -> BubbleMap:
    """Run the model over one text and return its bubble map.

    Args:
        model: Model with or without fork layers.
        ids: Token ids, at least one.
        tokens: Text of each token.

    Raises:
        ValueError: `ids` is empty, or `tokens` has another length than `ids`.
    """
    if len(ids) != len(tokens) or not len(ids):
        raise ValueError(
            f"{len(ids)} ids and {len(tokens)} texts: give as many of both, at least one"
        )
    found = _trace(model, jnp.asarray(ids, jnp.int32)[None])
    streams = [np.asarray(count)[0] for count, _ in found]
    return BubbleMap.of(model.config, streams, [np.asarray(p)[0] for _, p in found], tokens)


def bubbles_of(streams: Streams) -> tuple[jax.Array, jax.Array]:
    """Count the live streams of each token, and average their scores.

    Returns:
        Number of live streams, `[B, T]` int32, and mean score p of the live streams, `[B, T]`
        float32; both are 0 for a token without live streams.
    """
    members = membership(streams)
    count = members.sum(axis=2, dtype=jnp.int32)
    total = jnp.where(members, jnp.exp(streams.log_score)[:, None, :], 0).sum(axis=2)
    return count, total / jnp.maximum(count, 1)


@jax.jit
def _trace(model: ForkingDecoder, ids: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    return [bubbles_of(streams) for streams in model.run(ids).forks]


def visible_text(token: str) -> str:
    """Return a token's text as one line of printable characters."""
    token = token.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    return "".join(char if char.isprintable() else "·" for char in token) or "·"

"""Figures of a Dragon Hatchling: the neurons that a text activates, and synapses over time."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from thoughtbubbles.bubbles import visible_text
from thoughtbubbles.hatchling.seeing import Synapses, most_active

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

READABLE = 140  # maximum number of tokens whose texts are shown as tick labels
# Palette of Okabe & Ito 2008, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def neurons_figure(
    x: np.ndarray, y: np.ndarray, tokens: Sequence[str], count: int = 48
) -> "Figure":
    """Draw heat maps of one layer's most active neurons at each token: x above, y below.

    Args:
        x: Neurons at each token of a text, `[T, n]` (or `[T, H, N]`, such as
            `Neurons.x[layer, row]`: `N` neurons in each of `H` heads).
        y: Gated neurons, of the same shape as `x`.
        tokens: Text of each of the T tokens.
        count: Maximum number of neurons to show, those with the largest sum of y over the tokens;
            the sum of x breaks ties, such as between neurons whose y is always 0.

    Raises:
        ValueError: matplotlib is not installed.
    """
    x, y = (np.asarray(values, np.float32).reshape(len(tokens), -1) for values in (x, y))
    shown = most_active(y + 1e-6 * x, min(count, x.shape[1]))
    # Sorted by the token at which each neuron is most active, so that the map is readable.
    shown = shown[np.argsort(x[:, shown].argmax(axis=0), kind="stable")]
    figure = _figure(min(max(6.0, 0.17 * len(tokens)), 24.0), 6.5)
    axes = figure.subplots(2, 1, sharex=True)
    for axis, values, name in zip(axes, (x, y), ("x", "y = gate · x"), strict=True):
        share = (values > 0).mean()
        image = axis.imshow(
            values[:, shown].T, aspect="auto", cmap="magma_r", vmin=0, interpolation="nearest"
        )
        figure.colorbar(image, ax=axis, label="activity")
        axis.set_ylabel("neuron, by its peak")
        axis.set_yticks([])
        axis.set_title(
            f"{name}: {len(shown)} of {values.shape[1]:,} neurons; {share:.1%} of all are active",
            fontsize=10,
            loc="left",
        )
    _label_tokens(axes[1], tokens)
    return figure


def traces_figure(traces: np.ndarray, tokens: Sequence[str], synapses: Synapses) -> "Figure":
    """Plot the strength of synapses after each token of a text.

    Args:
        traces: Strengths `[T, M]` of `M` synapses, one row of the result of `synapse_traces`.
        tokens: Text of each token.
        synapses: The `M` synapses, for the legend.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = _figure(min(max(6.0, 0.17 * len(tokens)), 24.0), 3.6)
    axis = figure.subplots()
    ends = zip(synapses.head, synapses.source, synapses.target, strict=True)
    for index, (head, source, target) in enumerate(ends):
        axis.plot(
            traces[:, index],
            color=COLOURS[index % len(COLOURS)],
            linestyle=("-", "--", ":")[index // len(COLOURS) % 3],
            label=f"head {head}: {source} → {target}",
        )
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(ylabel="strength σ", xlim=(-0.5, len(tokens) - 0.5))
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, title="synapse")
    _label_tokens(axis, tokens)
    return figure


def _label_tokens(axis: "Axes", tokens: Sequence[str]) -> None:
    if len(tokens) <= READABLE:
        texts = [visible_text(token) for token in tokens]
        axis.set_xticks(range(len(tokens)), texts)
        longest = max(map(len, texts))
        axis.tick_params(axis="x", labelsize=7, rotation=90 if longest > 2 else 0)
    axis.set_xlabel("token")


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        hint = 'pip install "thoughtbubbles[notebooks]"'
        raise ValueError(f"a figure needs matplotlib: {hint}") from error
    return Figure(figsize=(width, height), layout="constrained")

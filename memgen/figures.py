"""Figures of analyses of latent memory. All raise a ValueError if matplotlib is missing."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from memgen.analysis import CenterDistance, Clusters, InvocationHistogram, Neighbours
from memgen.continual import ContinualReport
from memgen.response import Response

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Palette of Okabe & Ito 2008, which colour-blind readers can distinguish. Markers, in a cycle of
# another length, distinguish groups of equal colour.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#999999"


def clusters_figure(
    points: np.ndarray, method: str, clusters: Clusters, tags: Sequence[str] | np.ndarray
) -> "Figure":
    """Plot the mean latents in two dimensions, in one panel by cluster and in one panel by tag.

    Args:
        points: `[M, 2]` points of `M` memories, as `embed_2d` returns them.
        method: Name of the embedding method, as `embed_2d` returns it, for the axes' labels.
        clusters: Clusters of the memories, as `cluster` returns them.
        tags: `[M]` tag of each memory.
    """
    figure = _figure(9.6, 4.4)
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    size = np.bincount(clusters.labels, minlength=len(clusters.centroids))
    by_cluster = [f"{label} ({size[label]})" for label in clusters.labels]
    panels = (
        (by_cluster, "cluster (memories)", f"k-means, silhouette {clusters.silhouette:.2f}"),
        (list(map(str, tags)), "tag", "the same memories by tag"),
    )
    for axis, (groups, legend, title) in zip(axes, panels, strict=True):
        marks = zip(cycle(COLOURS), cycle(MARKERS))  # noqa: B905 (both endless)
        for group, (colour, marker) in zip(sorted(set(groups)), marks):  # noqa: B905
            these = points[np.array(groups) == group]
            axis.scatter(
                *these.T, s=22, alpha=0.75, color=colour, marker=marker, label=group, linewidth=0
            )
        axis.set(title=title, xlabel=f"{method} 1", xticks=[], yticks=[])
        shown = axis.legend(
            title=legend, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False
        )
        for text in shown.get_texts():
            text.set_parse_math(False)
    axes[0].set_ylabel(f"{method} 2")
    figure.suptitle("Mean latent of each memory")
    return figure


def ranks_figure(ranks: np.ndarray, tags: Sequence[str] | np.ndarray, slots: int) -> "Figure":
    """Plot the effective rank of each memory, in one column for each tag, with the tag's mean.

    Args:
        ranks: `[M]` effective ranks of `M` memories, as `effective_rank` returns them.
        tags: `[M]` tag of each memory.
        slots: Number of latent slots of a memory, which is the maximum rank.
    """
    names = sorted(set(map(str, tags)))
    figure = _figure(max(3.6, 1.6 + 1.1 * len(names)), 4.2)
    axis = figure.subplots()
    rng = np.random.default_rng(0)  # spread, so that equal ranks stay visible
    for column, name in enumerate(names):
        these = ranks[np.asarray(tags) == name]
        across = column + rng.uniform(-0.25, 0.25, len(these))
        axis.scatter(across, these, s=14, alpha=0.5, color=BLUE, linewidth=0)
        axis.hlines(these.mean(), column - 0.35, column + 0.35, color="black", linewidth=2)
        axis.annotate(
            f"mean {these.mean():.2f}", (column, these.mean()), (0, 5),
            textcoords="offset points", ha="center", fontsize=9,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
        )  # fmt: skip
    axis.axhline(slots, color=GREY, linestyle=":", linewidth=1)
    axis.annotate(f"K = {slots}", (len(names) - 0.5, slots), (-4, 3), ha="right", color="dimgrey",
                  textcoords="offset points", fontsize=9)  # fmt: skip
    axis.set(
        title="Directions that a memory uses", ylabel="effective rank",
        xlim=(-0.5, len(names) - 0.5), ylim=(0.8, slots + 0.06 * slots + 0.2),
    )  # fmt: skip
    axis.set_xticks(range(len(names)), names, parse_math=False)
    return figure


def invocations_figure(histogram: InvocationHistogram) -> "Figure":
    """Plot the number of trigger decisions per response by position, one panel for each tag."""
    tags = list(histogram.queried)
    figure = _figure(7.0, 1.2 + 1.6 * len(tags))
    axes = figure.subplots(len(tags), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    left, width = 100 * histogram.edges[:-1], 100 * np.diff(histogram.edges)
    for axis, tag in zip(axes, tags, strict=True):
        rows = histogram.rows[tag]
        shape: dict[str, Any] = {"x": left, "width": width, "align": "edge"}
        axis.bar(**shape, height=histogram.queried[tag] / rows, color="none", edgecolor="dimgrey",
                 linewidth=0.8, label="queried")  # fmt: skip
        axis.bar(**shape, height=histogram.invoked[tag] / rows, color=BLUE, alpha=0.85,
                 label="invoked")  # fmt: skip
        queried, invoked = histogram.queried[tag].sum(), histogram.invoked[tag].sum()
        axis.set_title(f"{tag}: {rows} responses, invoked {invoked} of {queried} times",
                       fontsize=10, loc="left", parse_math=False)  # fmt: skip
    axes[0].legend(ncols=2, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    axes[-1].set(xlabel="position in the response (% of its tokens)", xlim=(0, 100))
    figure.supylabel("decisions per response", fontsize="medium")
    return figure


def nearest_figure(
    neighbours: Neighbours, texts: Mapping[int, str] | Sequence[str], rows: Sequence[str]
) -> "Figure":
    """Draw a table of the tokens nearest to each latent, shaded by cosine, with the latents' norms.

    Args:
        neighbours: Nearest tokens, as `nearest_tokens` returns them.
        texts: Surface text of each token id.
        rows: Name of each latent, which labels the latent's row of the table.
    """
    count, nearest = neighbours.ids.shape
    figure = _figure(2.6 + 1.15 * nearest, 1.5 + 0.3 * count)
    axis = figure.subplots()
    image = axis.imshow(neighbours.cosine, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, ax=axis, label="cosine (near 0: no likeness)")
    for (row, column), token in np.ndenumerate(neighbours.ids):
        cosine = neighbours.cosine[row, column]
        axis.text(column, row, f"{_visible(texts[int(token)])}\n{cosine:.2f}", ha="center",
                  va="center", fontsize=7, color="black" if cosine > 0.55 else "white",
                  parse_math=False)  # fmt: skip
    names = [f"{name}  ({n:.3g}×)" for name, n in zip(rows, neighbours.norm_ratio, strict=True)]
    axis.set_yticks(range(count), names, parse_math=False)
    axis.set_xticks(range(nearest), [str(1 + rank) for rank in range(nearest)])
    axis.set(title="Tokens nearest to each latent", xlabel="rank",
             ylabel="latent (its norm, in mean embedding norms)")  # fmt: skip
    return figure


def ablation_figure(
    ablated: Mapping[str, tuple[float, float]],
    control: Mapping[str, tuple[float, float]],
    baseline: tuple[float, float],
    score: str,
    dropped: Mapping[str, float],
) -> "Figure":
    """Plot the score of each cluster's ablation beside the score of the ablation's random control.

    Args:
        ablated: Mapping from a cluster's name to the score with the cluster's memories dropped, and
            the standard error of the score.
        control: Mapping from a cluster's name to the score with as many memories dropped at random,
            and the standard error of the score.
        baseline: Score with all memories, and the standard error of the score.
        score: Name of the score with its unit, for the axis label.
        dropped: Mapping from a cluster's name to the fraction of memories that its ablation drops.
    """
    figure = _figure(max(5.4, 2.6 + 1.1 * len(ablated)), 4.2)
    axis = figure.subplots()
    columns = np.arange(len(ablated))
    arms = (("without the cluster", ablated, -0.2, BLUE), ("as many at random", control, 0.2, GREY))
    for name, scores, offset, colour in arms:
        mean, error = np.array([scores[cluster] for cluster in ablated]).T
        axis.bar(columns + offset, mean, 0.38, yerr=error, color=colour, label=name, capsize=3)
    mean, error = baseline
    axis.axhline(mean, color="black", linewidth=1.2, label="all memory")
    axis.axhspan(mean - error, mean + error, color="black", alpha=0.1, linewidth=0)
    names = [f"{name}\n{dropped[name]:.0%}" for name in ablated]
    axis.set_xticks(columns, names, parse_math=False)
    axis.set(title="Ablation (bars: ± standard error)", ylabel=score,
             xlabel="cluster, and the share of memories dropped")  # fmt: skip
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def distances_figure(distances: Mapping[tuple[str, str], CenterDistance]) -> "Figure":
    """Plot the result of `center_distances` as bars, one panel for each distance measure."""
    figure = _figure(9.6, 1.5 + 0.45 * len(distances))
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots(1, len(CenterDistance._fields), sharey=True)
    names = [" – ".join(pair) for pair in distances]
    for axis, measure in zip(axes, CenterDistance._fields, strict=True):
        values = [getattr(distance, measure) for distance in distances.values()]
        axis.barh(range(len(names)), values, color=BLUE, height=0.6)
        for row, value in enumerate(values):
            axis.annotate(f"{value:.3g}", (value, row), (3, 0), va="center", fontsize=9,
                          textcoords="offset points")  # fmt: skip
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set(
            title=measure.replace("_", " "),
            xlabel="mean distance",
            xlim=(0, 1.25 * max(*values, 1e-9)),
        )
    axes[0].set_yticks(range(len(names)), names, parse_math=False)
    axes[0].invert_yaxis()
    return figure


def continual_figure(report: ContinualReport, digits: int = 1) -> "Figure":
    """Draw a heat map of accuracies by stage and task; frames mark the task that a stage trains."""
    rows, tasks = report.accuracy.shape
    figure = _figure(2.6 + 1.0 * tasks, 1.8 + 0.5 * rows)
    from matplotlib.patches import Rectangle

    axis = figure.subplots()
    low, high = report.accuracy.min(), report.accuracy.max()
    image = axis.imshow(report.accuracy, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    figure.colorbar(image, ax=axis, label="accuracy")
    for (row, column), value in np.ndenumerate(report.accuracy):
        bright = value > low + 0.55 * (high - low)
        axis.text(column, row, f"{value:.{digits}f}", ha="center", va="center",
                  color="black" if bright else "white")  # fmt: skip
    for stage in range(1, rows):
        axis.add_patch(Rectangle((stage - 1.47, stage - 0.47), 0.94, 0.94, fill=False,
                                 edgecolor=VERMILION, linewidth=2.5))  # fmt: skip
    axis.set_xticks(range(tasks), report.tasks, parse_math=False)
    stages = ["before training", *report.tasks[: rows - 1]]
    axis.set_yticks(range(rows), stages, parse_math=False)
    axis.set(xlabel="evaluated on", ylabel="after training on")
    if report.stages_done == tasks:
        axis.set_title(
            f"average {report.average_accuracy:.{digits}f}, "
            f"backward transfer {report.backward_transfer:+.{digits}f},\n"
            f"forward transfer {report.forward_transfer:+.{digits}f}, "
            f"forgetting {report.forgetting:.{digits}f}",
            fontsize=10,
        )
    return figure


def strips_figure(
    responses: Mapping[str, Response],
    prompts: Sequence[Sequence[int]],
    text_of: Callable[[int], str],
    rows: Sequence[int] | None = None,
) -> "Figure":
    """Draw rows of responses token by token, with a bar for each latent where memory is woven.

    A dotted line marks a boundary at which the trigger decided not to weave.

    Args:
        responses: Mapping from a name to a response; all responses answer the same prompts.
        prompts: Token ids of the prompt of each row, drawn on a grey background.
        text_of: Function from a token id to its text.
        rows: Indices of the rows to draw of each response; by default the first three rows.

    Raises:
        ValueError: A row index is outside of the prompts or of a response.
    """
    count = min([len(prompts), *(len(response.tokens) for response in responses.values())])
    rows = range(min(3, count)) if rows is None else rows
    if wrong := [row for row in rows if not 0 <= row < count]:
        raise ValueError(f"row {wrong[0]} of {count} rows: choose from 0 to {count - 1}")
    shown = [(name, response, row) for name, response in responses.items() for row in rows]
    figure = _figure(9.0, 0.3 + 0.42 * len(shown))
    axis = figure.subplots()
    for line, (_, response, row) in enumerate(shown):
        _strip(axis, line, response, row, prompts[row], text_of)
    axis.set_yticks(range(len(shown)), [name for name, _, _ in shown], parse_math=False)
    axis.set(xticks=[], ylim=(len(shown) - 0.5, -0.6))
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    return figure


def _strip(axis: Any, line: int, response: Response, row: int, prompt, text_of) -> None:
    """Draw one row of a response on one line of the figure."""
    points, latents = np.asarray(response.points[row]), np.asarray(response.latents[row])
    x = 0.0
    for at, id_ in enumerate([*prompt, *response.texts[row]], -len(prompt)):
        woven = latents[points == at] if at >= 0 else latents[:0]
        slots = np.arange((woven != 0).any(axis=2).sum())  # a latent of zeros is an unused slot
        axis.bar(x + 0.15 * slots, 0.7, 0.1, line - 0.35, align="edge", color=VERMILION)
        x += 0.15 * len(slots)
        if at >= 0 and response.decisions[row, at] == 0:
            axis.vlines(x, line - 0.4, line + 0.4, color=BLUE, linestyle=":", linewidth=2)
        face = "#EEEEEE" if at < 0 else "white"
        axis.bar(x, 0.7, 0.9, line - 0.35, align="edge", color=face, edgecolor=GREY)
        axis.text(x + 0.45, line, _visible(text_of(id_)), ha="center", va="center",
                  parse_math=False)  # fmt: skip
        x += 1.0


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('a figure needs matplotlib: pip install "thoughtbubbles[memgen]"') from (
            error
        )
    return Figure(figsize=(min(width, 24.0), min(height, 24.0)), layout="constrained")


def _visible(token: str) -> str:
    token = token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return "".join(char if char.isprintable() else "·" for char in token) or "·"

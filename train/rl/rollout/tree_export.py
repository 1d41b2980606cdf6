"""Export of finished search trees as lines of JSON and as figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.rl.rollout.formatter import PromptFormatter
from train.rl.rollout.search_tree import mean_nll
from train.rl.rollout.searching import Search
from train.runs.appended import append_objects, begins_with

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELLED = 120  # maximum number of nodes of a figure that shows the nodes' texts


def tree_json(search: Search, formatter: PromptFormatter) -> dict[str, Any]:
    """Convert the tree of a finished search to a JSON-serialisable dict.

    Args:
        search: Finished search.
        formatter: Formatter that translates token ids to texts.

    Returns:
        A dict of `uid`, `prompt` and `nodes`, the nodes in the order of generation, the root first.
        A node is a dict of its `parent`'s index (None for the root), `depth`, `text` including the
        observation, number of generated `tokens`, `entropy` (mean negative log-probability),
        `visits` (N), `value` (q), `bounded` (`bounded_value`), `outcome` (1 or -1, None if it is
        not a terminal), `output` (index among the terminals that were backed up, or None) and
        `score` (selection score of a frontier node, None for other nodes).
    """
    tree = search.tree
    frontier, outputs = set(tree.frontier), {end: at for at, end in enumerate(tree.outputs)}
    nodes = []
    for node in tree.nodes:
        payload = node.chunk.payload
        ids = [] if payload is None else payload.sampled.tokens.tolist()
        seen = [] if payload is None else list(payload.seen)
        nodes.append(
            {
                "parent": None if node.parent is None else node.parent.number,
                "depth": node.depth,
                "text": formatter.lm.tokenizer.decode([*ids, *seen]),
                "tokens": len(ids),
                "entropy": mean_nll([node]),
                "visits": node.visits,
                "value": node.accumulated_value,
                "bounded": tree.bounded_value(node),
                "outcome": node.chunk.outcome,
                "output": outputs.get(node),
                "score": tree.score(node) if node in frontier else None,
            }
        )
    return {"uid": search.problem.uid, "prompt": search.problem.prompt, "nodes": nodes}


def append_tree(
    path: Path, seed: Sequence[int], search: Search, formatter: PromptFormatter
) -> None:
    """Append a tree to a file as a line of JSON (`tree_json`), with the `seed` of its step."""
    line = {"seed": list(seed), **tree_json(search, formatter)}
    append_objects(path, [line], begins_with(b'{"seed": '))


def draw_tree(tree: dict[str, Any]) -> "Figure":
    """Draw a figure of a finished tree, the root on top.

    The colour of a node shows its bounded value. Terminals are squares, frontier nodes are
    diamonds, and other nodes are circles. A terminal that was backed up is labelled with the index
    of its backup, counted from 1. Trees of at most 120 nodes also show the nodes' texts.

    Args:
        tree: Tree as a dict, the result of `tree_json`.
    """
    from matplotlib.figure import Figure

    nodes = tree["nodes"]
    x, y = _positions(nodes), [-node["depth"] for node in nodes]
    size = min(max(8.0, max(x) / 5), 24.0), 1.5 - min(y)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for at, node in enumerate(nodes[1:], 1):
        above = node["parent"]
        axes.plot([x[above], x[at]], [y[above], y[at]], color="0.8", linewidth=0.7, zorder=1)
    kinds = {
        "inner node": ("o", [n["outcome"] is None and n["score"] is None for n in nodes]),
        "frontier": ("D", [n["score"] is not None for n in nodes]),
        "terminal, (order of backup)": ("s", [n["outcome"] is not None for n in nodes]),
    }
    drawn = None
    for label, (marker, mine) in kinds.items():
        some = [at for at, on in enumerate(mine) if on]
        drawn = axes.scatter(
            [x[at] for at in some], [y[at] for at in some],
            c=[nodes[at]["bounded"] for at in some], cmap="RdYlGn", vmin=-1, vmax=1,
            marker=marker, s=70, edgecolors="0.3", linewidths=0.6, zorder=2, label=label,
        )  # fmt: skip
    for at, node in enumerate(nodes):
        order = "" if node["output"] is None else f"({node['output'] + 1})"
        text = _printable(node["text"].strip()) if len(nodes) <= LABELLED else ""
        if order or text:
            axes.annotate(
                " ".join(filter(None, [order, text])), (x[at], y[at]), xytext=(0, -7), rotation=90,
                ha="center", va="top", fontsize=6, textcoords="offset points", parse_math=False,
            )  # fmt: skip
    axes.set(
        ylabel="depth", xticks=[], yticks=sorted(set(y)), ylim=(min(y) - 0.7, 0.5),
        title=f"{_printable(tree['prompt'].strip())}   ({len(nodes)} nodes)",
    )  # fmt: skip
    axes.set_yticklabels([str(-at) for at in sorted(set(y))])
    axes.legend(fontsize=7, loc="upper left")
    assert drawn is not None
    figure.colorbar(drawn, ax=axes, label="value (terminals: outcome)", pad=0.01)
    return figure


def _printable(text: str) -> str:
    """Replace all characters except printable ASCII, which fonts may lack, by dots."""
    return "".join(letter if " " <= letter <= "~" else "." for letter in text)


def _positions(nodes: Sequence[dict[str, Any]]) -> list[float]:
    """Compute the horizontal position of each node: leaves side by side, parents above children."""
    children: list[list[int]] = [[] for _ in nodes]
    for at, node in enumerate(nodes[1:], 1):
        children[node["parent"]].append(at)
    order, stack = [], [0]
    while stack:
        order.append(stack.pop())
        stack += children[order[-1]][::-1]
    leaves = [at for at in order if not children[at]]
    found = [0.0] * len(nodes)
    for number, at in enumerate(leaves):
        found[at] = float(number)
    for at in reversed(order):
        if children[at]:
            found[at] = sum(found[child] for child in children[at]) / len(children[at])
    return found

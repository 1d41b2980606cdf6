"""Finished search trees as JSON lines."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.rl.rollout.formatter import PromptFormatter
from train.rl.rollout.search_tree import mean_entropy
from train.rl.rollout.searching import Search


def tree_json(search: Search, formatter: PromptFormatter) -> dict[str, Any]:
    """A tree as JSON: its prompt and its nodes in the order of generation, the root first.

    A node has its `parent`'s index, `depth`, `text` and number of `tokens`, mean `entropy`,
    `visits` (N), `value` (q), `bounded` value for advantages, `outcome` (1, -1, or None where it
    ends nothing), `output` (its index among the terminals that were backed up, or None), and
    `score`, by which the frontier is ordered, or None where it can't be expanded.

    Args:
        search: Finished search.
        formatter: Translation of ids to texts.
    """
    tree = search.tree
    frontier, outputs = set(tree.frontier), {end: at for at, end in enumerate(tree.outputs)}
    nodes = []
    for node in tree.nodes:
        written = node.chunk.payload
        ids = [] if written is None else written.sampled.tokens.tolist()
        seen = [] if written is None else list(written.seen)
        nodes.append(
            {
                "parent": None if node.parent is None else node.parent.number,
                "depth": node.depth,
                "text": formatter.lm.tokenizer.decode([*ids, *seen]),
                "tokens": len(ids),
                "entropy": mean_entropy([node]),
                "visits": node.visits,
                "value": node.value,
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
    """Append a tree to a file of JSON lines, with the seed of its step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"seed": list(seed), **tree_json(search, formatter)}) + "\n")

"""The tree of a search (DeepSearch, arXiv 2509.25454): selection, backup and values, on the host.

A node is a chunk of a response, appended to the text of its parent. A tree asks for children of one
node at a time (`SearchTree.request`), so that whoever generates them can serve many trees at once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

LEAST_WEIGHT = 0.1  # of a node in a backup, however deep the tree is


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """Options of a search; defaults are those of the authors' code.

    Attributes:
        width: Number of children of an expanded node (n).
        exploration: Weight of the exploration term of UCT (λ).
        value_weight: Weight of tanh Q(parent) in the score of a frontier node (λ1).
        entropy_weight: Weight of the mean negative log-probability of a frontier node's own chunk
            (λ2): above 0 towards uncertain chunks, below 0 towards confident ones.
        depth_weight: Weight of the depth term of a frontier node (λ3).
        depth_term: Depth term of a node of depth d in a tree of greatest depth d_T: "sqrt" is
            sqrt(d / d_T), "log" is log(d + 1), "linear" is d.
        backup: Weight of a node of depth i in the backup of a terminal of depth l: "code" is
            (i+1)/(l+1) as in the authors' code, "paper" i/l; at least 0.1.
        value_scale: Bound on the value of a node that is no terminal (q_max).
        value_temperature: Divisor of a node's value inside the tanh that bounds it (ε_q).
    """

    width: int = 8
    exploration: float = 2.0
    value_weight: float = 0.4
    entropy_weight: float = 0.0
    depth_weight: float = 0.01
    depth_term: Literal["sqrt", "log", "linear"] = "sqrt"
    backup: Literal["code", "paper"] = "code"
    value_scale: float = 1.0
    value_temperature: float = 1.0

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width={self.width}: choose 1 or more")
        for name in ("value_scale", "value_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: choose a number above 0")
        for name in ("exploration", "value_weight", "entropy_weight", "depth_weight"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: choose a finite number")
        for name, choices in (
            ("depth_term", tuple(DEPTH_TERMS)),
            ("backup", ("code", "paper")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {' or '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What is generated for a node.

    Attributes:
        log_probs: Log-probability of each generated token, `[T]`.
        outcome: 1 for a terminal that solves the problem, -1 for any other; None for a chunk that
            ends nothing.
        complete: Whether a terminal is a whole response, not one that was cut.
        payload: Anything else that the generator keeps with the node.
    """

    log_probs: Sequence[float] | np.ndarray
    outcome: int | None = None
    complete: bool = True
    payload: Any = None

    @functools.cached_property
    def log_prob(self) -> float:
        """Sum of the log-probabilities, in float64."""
        return float(np.sum(self.log_probs, dtype=np.float64))


@dataclasses.dataclass(eq=False)
class Node:
    """A node of a search tree.

    Attributes:
        chunk: What was generated; an empty one at the root.
        parent: Parent; None at the root.
        number: Index of the node among those of its tree, in the order of generation.
        depth: Number of nodes between the root and this one, itself included (d).
        children: Children, in the order of generation.
        visits: Number of visits (N).
        value: Sum of what was backed up (q).
        backed_up: Whether the node is a terminal that was backed up.
    """

    chunk: Chunk
    parent: "Node | None" = None
    number: int = 0
    depth: int = 0
    children: "list[Node]" = dataclasses.field(default_factory=list)
    visits: int = 0
    value: float = 0.0
    backed_up: bool = False

    @property
    def terminal(self) -> bool:
        """Whether a response ends with this node."""
        return self.chunk.outcome is not None

    @property
    def mean_value(self) -> float:
        """Value per visit (Q), 0 without visits."""
        return self.value / self.visits if self.visits else 0.0

    @property
    def path(self) -> "list[Node]":
        """Nodes from the root to this one."""
        found: list[Node] = []
        node: Node | None = self
        while node is not None:
            found.append(node)
            node = node.parent
        return found[::-1]


def mean_entropy(nodes: Sequence[Node]) -> float:
    """Mean negative log-probability over all generated tokens of some nodes (H)."""
    tokens = sum(len(node.chunk.log_probs) for node in nodes)
    return -sum(node.chunk.log_prob for node in nodes) / tokens if tokens else 0.0


def uct(node: Node, parent_visits: int, exploration: float) -> float:
    """UCT(s) = Q(s) + λ sqrt(ln N_parent / N_s); the second term is 0 where a number is 0.

    Args:
        node: Node that could be visited next.
        parent_visits: Number of visits of its parent.
        exploration: Weight of the second term (λ).
    """
    if not (node.visits and parent_visits):
        return node.mean_value
    return node.mean_value + exploration * math.sqrt(math.log(parent_visits) / node.visits)


def back_up(terminal: Node, options: SearchOptions) -> None:
    """Add the outcome of a terminal to all nodes of its path; what once is positive stays so.

    A node's outcome is weighted by its depth. Where a node's value and the weighted outcome have
    opposite signs, good news replace the value and bad news are dropped.
    """
    outcome = terminal.chunk.outcome
    assert outcome is not None
    for node in terminal.path:
        found = backup_weight(node.depth, terminal.depth, options.backup) * outcome
        node.visits += 1
        if node.value * found >= 0:
            node.value += found
        elif found > 0:
            node.value = found


def backup_weight(depth: int, last: int, mode: Literal["code", "paper"]) -> float:
    """Weight of a node of a depth in the backup of a terminal of depth `last`, 0.1 at least."""
    share = (depth + 1) / (last + 1) if mode == "code" else depth / last
    return max(share, LEAST_WEIGHT)


DEPTH_TERMS: dict[str, Callable[[int, int], float]] = {
    "sqrt": lambda depth, most: math.sqrt(depth / most),
    "log": lambda depth, most: math.log(depth + 1),
    "linear": lambda depth, most: float(depth),
}


def frontier_score(node: Node, max_depth: int, options: SearchOptions) -> float:
    """λ1 tanh Q(parent) + λ2 H + λ3 D(d) of a frontier node.

    Args:
        node: Node with a parent.
        max_depth: Greatest depth of the tree (d_T).
        options: Options of the search.
    """
    assert node.parent is not None
    depth = DEPTH_TERMS[options.depth_term](node.depth, max_depth)
    uncertain = options.entropy_weight * mean_entropy([node]) if options.entropy_weight else 0.0
    value = options.value_weight * math.tanh(node.parent.mean_value)
    return value + uncertain + options.depth_weight * depth


def bounded_value(node: Node, options: SearchOptions) -> float:
    """Value for advantages: q_max tanh(q / ε_q); of a terminal its outcome."""
    if node.chunk.outcome is not None:
        return float(node.chunk.outcome)
    return options.value_scale * math.tanh(node.value / options.value_temperature)


def most_confident(terminals: Sequence[Node]) -> Node:
    """The terminal to back up: a right one if there is, else a whole one, else one that was cut.

    Among equals that of the least mean negative log-probability over its response.
    """

    def order(node: Node) -> tuple[bool, bool, float]:
        return node.chunk.outcome != 1, not node.chunk.complete, mean_entropy(node.path)

    return min(terminals, key=order)


@dataclasses.dataclass(frozen=True)
class Expansion:
    """What a tree needs next.

    Attributes:
        node: Node whose text is continued.
        count: Number of continuations.
        whole: Whether a continuation is a whole response, in place of a chunk.
    """

    node: Node
    count: int
    whole: bool = False


class SearchTree:
    """One search: expands nodes until `outputs` terminals have been backed up.

    A node is expanded to `width` children. If a child ends its response, one such child is backed
    up and the search goes on at the best node of the frontier, else at the best child by UCT. Where
    the frontier is empty, a terminal that is left is backed up, or else a whole response from the
    root is asked for.

    Args:
        outputs: Number of terminals to back up.
        max_depth: Greatest depth of a node (d_T).
        options: Options of the search.
        rng: Generator that breaks ties of UCT, which all fresh siblings have.
    """

    def __init__(
        self, outputs: int, max_depth: int, options: SearchOptions, rng: np.random.Generator
    ):
        self.root = Node(Chunk(()))
        self.nodes = [self.root]
        self.outputs: list[Node] = []
        """Terminals that were backed up, in order."""
        self.target, self._max_depth, self._options = outputs, max_depth, options
        self._rng = rng
        self._current: Node | None = self.root

    def request(self) -> Expansion | None:
        """The next expansion; None where the search is finished."""
        while len(self.outputs) < self.target:
            if self._current is not None:
                missing = self._options.width - len(self._current.children)
                return Expansion(self._current, missing)
            left = [node for node in self.nodes if node.terminal and not node.backed_up]
            if not left:
                return Expansion(self.root, 1, whole=True)
            self._output(most_confident(left))
        return None

    def expand(self, node: Node, chunks: Sequence[Chunk]) -> list[Node]:
        """Add the children that `request` asked for, and move on; returns them."""
        children = [self._add(node, chunk) for chunk in chunks]
        ended = [child for child in node.children if child.terminal and not child.backed_up]
        if ended:
            self._output(most_confident(ended))
        self._current = self._best_of_frontier() if ended else self._descend(node)
        return children

    def add_response(self, chunks: Sequence[Chunk]) -> list[Node]:
        """Add a whole response from the root, of which the last chunk ends; returns its nodes."""
        node, found = self.root, []
        for chunk in chunks:
            node = self._add(node, chunk)
            found.append(node)
        self._output(node)
        self._current = self._best_of_frontier()
        return found

    @property
    def frontier(self) -> list[Node]:
        """Nodes that can be expanded: no terminals, not the root, with too few children."""
        return [
            node
            for node in self.nodes[1:]
            if not node.terminal and len(node.children) < self._options.width
        ]

    @property
    def solved(self) -> bool:
        """Whether any terminal is right."""
        return any(node.chunk.outcome == 1 for node in self.nodes)

    def score(self, node: Node) -> float:
        """Score by which the frontier is ordered."""
        return frontier_score(node, self._max_depth, self._options)

    def bounded_value(self, node: Node) -> float:
        """Value of a node for advantages; those of a finished tree are final."""
        return bounded_value(node, self._options)

    def _add(self, parent: Node, chunk: Chunk) -> Node:
        node = Node(chunk, parent, len(self.nodes), parent.depth + 1)
        # A visit of its own that its ancestors do not count, as in the authors' code.
        node.visits = int(not node.terminal)
        parent.children.append(node)
        self.nodes.append(node)
        return node

    def _output(self, terminal: Node) -> None:
        terminal.backed_up = True
        back_up(terminal, self._options)
        self.outputs.append(terminal)

    def _best_of_frontier(self) -> Node | None:
        return max(self.frontier, key=self.score, default=None)  # the first of equals

    def _descend(self, node: Node) -> Node | None:
        """The first node with too few children on the way down by UCT; else the frontier's best."""
        while len(node.children) >= self._options.width:
            living = [child for child in node.children if not child.terminal]
            if not living:
                return self._best_of_frontier()
            scores = [uct(child, node.visits, self._options.exploration) for child in living]
            best = [c for c, score in zip(living, scores, strict=True) if score == max(scores)]
            node = best[int(self._rng.integers(len(best)))]
        return node

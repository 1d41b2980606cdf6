"""Search tree of DeepSearch (arXiv 2509.25454): selection, backup and values, on the host.

A node is a chunk of a response, appended to the text of its parent. A tree asks for children of one
node at a time (`SearchTree.request`), so that a generator can serve many trees in one batch.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

LEAST_WEIGHT = 0.1  # minimum weight of a node in a backup, in trees of any depth


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """Options of a tree search; the defaults are those of the authors' code.

    Attributes:
        width: Number of children of an expanded node (n).
        exploration: Weight of the exploration term of UCT (λ).
        value_weight: Weight of tanh Q(parent) in the score of a frontier node (λ1).
        entropy_weight: Weight of the mean negative log-probability of a frontier node's chunk (λ2):
            a positive weight prefers uncertain chunks, a negative weight confident chunks.
        depth_weight: Weight of the depth term of a frontier node (λ3).
        depth_term: Depth term of a node of depth d in a tree of maximum depth d_T: "sqrt" is
            sqrt(d / d_T), "log" is log(d + 1), "linear" is d.
        backup: Weight of a node of depth i in the backup of a terminal of depth l: "code" is
            (i+1)/(l+1) as in the authors' code, "paper" is i/l; both are at least 0.1.
        value_scale: Factor q_max of the bounded value q_max tanh(q / ε_q) that enters the
            advantages of a node that is not a terminal; q is the node's accumulated value.
        value_temperature: Divisor ε_q of the accumulated value q in this bounded value q_max tanh(q
            / ε_q).

    Raises:
        ValueError: `width` is below 1, `value_scale` or `value_temperature` is not above 0, a
            weight is not finite, or a choice is unknown.
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
    """Generated text of a node.

    Attributes:
        log_probs: Log-probability of each generated token, `[T]`.
        outcome: Outcome of a terminal, 1 if it solves the problem and -1 if not; None for a chunk
            that does not end its response.
        complete: Whether the response of a terminal has ended by itself and was not truncated.
        payload: Object that the generator attaches to the node and the tree does not read; a
            `NodePayload` in `train.rl.rollout.searching`.
    """

    log_probs: Sequence[float] | np.ndarray
    outcome: int | None = None
    complete: bool = True
    payload: Any = None

    @functools.cached_property
    def log_prob(self) -> float:
        """Sum of the log-probabilities of all tokens, in float64."""
        return float(np.sum(self.log_probs, dtype=np.float64))


@dataclasses.dataclass(eq=False)
class Node:
    """A node of a search tree.

    Attributes:
        chunk: Generated text of the node; an empty chunk at the root.
        parent: Parent of the node; None at the root.
        number: Index of the node in its tree, in the order of generation; 0 at the root.
        depth: Number of steps from the root to the node (d); 0 at the root.
        children: Children in the order of generation.
        visits: Number of visits (N).
        accumulated_value: Value accumulated by backups (q); see `back_up`.
        backed_up: Whether the node is a terminal that was backed up.
    """

    chunk: Chunk
    parent: "Node | None" = None
    number: int = 0
    depth: int = 0
    children: "list[Node]" = dataclasses.field(default_factory=list)
    visits: int = 0
    accumulated_value: float = 0.0
    backed_up: bool = False

    @property
    def terminal(self) -> bool:
        """Whether a response ends with this node."""
        return self.chunk.outcome is not None

    @property
    def mean_value(self) -> float:
        """Accumulated value divided by the number of visits (Q); 0 without visits."""
        return self.accumulated_value / self.visits if self.visits else 0.0

    @property
    def path(self) -> "list[Node]":
        """Nodes from the root to this one, both included."""
        found: list[Node] = []
        node: Node | None = self
        while node is not None:
            found.append(node)
            node = node.parent
        return found[::-1]


def mean_nll(nodes: Sequence[Node]) -> float:
    """Mean negative log-probability over the generated tokens of nodes (H); 0 without tokens."""
    tokens = sum(len(node.chunk.log_probs) for node in nodes)
    return -sum(node.chunk.log_prob for node in nodes) / tokens if tokens else 0.0


def uct(node: Node, parent_visits: int, exploration: float) -> float:
    """Upper-confidence score UCT(s) = Q(s) + λ sqrt(ln N_parent / N_s) of a node.

    If the node or its parent has no visits, the score is Q(s).

    Args:
        node: Node s that could be visited next.
        parent_visits: Number of visits of the node's parent (N_parent).
        exploration: Weight of the exploration term (λ).
    """
    if not (node.visits and parent_visits):
        return node.mean_value
    return node.mean_value + exploration * math.sqrt(math.log(parent_visits) / node.visits)


def back_up(terminal: Node, options: SearchOptions) -> None:
    """Back up the outcome of a terminal along its path, and count a visit of each node.

    For each node, the outcome is weighted by the node's depth (`backup_weight`). If the node's
    accumulated value is 0 or has the sign of the outcome, the weighted outcome is added to the
    value. Otherwise a positive weighted outcome replaces the negative value, and a negative outcome
    is ignored, so that a positive value stays positive.

    Args:
        terminal: Terminal node with an outcome.
        options: Options of the search.
    """
    outcome = terminal.chunk.outcome
    assert outcome is not None
    for node in terminal.path:
        found = backup_weight(node.depth, terminal.depth, options.backup) * outcome
        node.visits += 1
        if node.accumulated_value * found >= 0:
            node.accumulated_value += found
        elif found > 0:
            node.accumulated_value = found


def backup_weight(depth: int, last: int, mode: Literal["code", "paper"]) -> float:
    """Return the weight of a node at depth `depth` in the backup of a terminal at depth `last`.

    The weight is at least 0.1. It is (depth + 1) / (last + 1) in the mode "code", and depth / last
    in the mode "paper".
    """
    share = (depth + 1) / (last + 1) if mode == "code" else depth / last
    return max(share, LEAST_WEIGHT)


DEPTH_TERMS: dict[str, Callable[[int, int], float]] = {
    "sqrt": lambda depth, most: math.sqrt(depth / most),
    "log": lambda depth, most: math.log(depth + 1),
    "linear": lambda depth, most: float(depth),
}


def frontier_score(node: Node, max_depth: int, options: SearchOptions) -> float:
    """Selection score of a frontier node: λ1 tanh Q(parent) + λ2 H + λ3 D(d).

    Q(parent) is the parent's mean value, H is the mean negative log-probability of the node's
    chunk, and D is the depth term.

    Args:
        node: Node other than the root.
        max_depth: Maximum depth of a node in the tree (d_T).
        options: Options of the search.
    """
    assert node.parent is not None
    depth = DEPTH_TERMS[options.depth_term](node.depth, max_depth)
    uncertain = options.entropy_weight * mean_nll([node]) if options.entropy_weight else 0.0
    value = options.value_weight * math.tanh(node.parent.mean_value)
    return value + uncertain + options.depth_weight * depth


def bounded_value(node: Node, options: SearchOptions) -> float:
    """Return the bounded value of a node, from which the advantages of its tokens are computed.

    The bounded value of a terminal is its outcome, 1 or -1. Any other node has the bounded value
    q_max tanh(q / ε_q), where q is `Node.accumulated_value`, q_max is `SearchOptions.value_scale`
    and ε_q is `SearchOptions.value_temperature`.

    Args:
        node: Node of a finished search.
        options: Options of the search.
    """
    if node.chunk.outcome is not None:
        return float(node.chunk.outcome)
    return options.value_scale * math.tanh(node.accumulated_value / options.value_temperature)


def most_confident(terminals: Sequence[Node]) -> Node:
    """Choose the terminal to back up.

    Correct terminals are preferred to wrong terminals, then complete responses to truncated
    responses, then a lower mean negative log-probability over the whole response.
    """

    def order(node: Node) -> tuple[bool, bool, float]:
        return node.chunk.outcome != 1, not node.chunk.complete, mean_nll(node.path)

    return min(terminals, key=order)


@dataclasses.dataclass(frozen=True)
class Expansion:
    """Request of a tree for new nodes.

    Attributes:
        node: Node whose text is to be continued.
        count: Number of continuations.
        whole: Whether each continuation is a whole response, rather than a chunk.
    """

    node: Node
    count: int
    whole: bool = False


class SearchTree:
    """Tree of one search, which expands nodes until `outputs` terminals have been backed up.

    A node is expanded to `width` children. If some children are terminals, the best terminal
    (`most_confident`) is backed up and the search continues at the frontier node with the highest
    `score`. Otherwise the search continues at the child with the highest UCT score. If the frontier
    is empty, the best terminal that was not yet backed up is backed up; if there is no such
    terminal, the tree requests a whole response from the root.

    Args:
        outputs: Number of terminals to back up.
        max_depth: Maximum depth of a node (d_T).
        options: Options of the search.
        rng: Random generator that breaks ties of UCT scores, which are equal for new siblings.
    """

    def __init__(
        self, outputs: int, max_depth: int, options: SearchOptions, rng: np.random.Generator
    ):
        self.root = Node(Chunk(()))
        self.nodes = [self.root]
        self.outputs: list[Node] = []
        """Terminals that were backed up so far, in the order of their backups."""
        self.target, self._max_depth, self._options = outputs, max_depth, options
        self._rng = rng
        self._current: Node | None = self.root

    def request(self) -> Expansion | None:
        """Return the next expansion; None if the search is finished."""
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
        """Add the children that `request` asked for, and choose the next node.

        Args:
            node: Node of the requested expansion.
            chunks: Generated text of each new child.

        Returns:
            The new children.
        """
        children = [self._add(node, chunk) for chunk in chunks]
        ended = [child for child in node.children if child.terminal and not child.backed_up]
        if ended:
            self._output(most_confident(ended))
        self._current = self._best_of_frontier() if ended else self._descend(node)
        return children

    def add_response(self, chunks: Sequence[Chunk]) -> list[Node]:
        """Add a whole response as a path from the root, and back up its last node, a terminal.

        Args:
            chunks: Chunks of the response in order; only the last has an outcome.

        Returns:
            The new nodes, one for each chunk.
        """
        node, found = self.root, []
        for chunk in chunks:
            node = self._add(node, chunk)
            found.append(node)
        self._output(node)
        self._current = self._best_of_frontier()
        return found

    @property
    def frontier(self) -> list[Node]:
        """Nodes that can be expanded: not terminal, not the root, and with missing children."""
        return [
            node
            for node in self.nodes[1:]
            if not node.terminal and len(node.children) < self._options.width
        ]

    @property
    def solved(self) -> bool:
        """Whether any terminal solves the problem."""
        return any(node.chunk.outcome == 1 for node in self.nodes)

    def score(self, node: Node) -> float:
        """Return the score by which frontier nodes are selected (`frontier_score`)."""
        return frontier_score(node, self._max_depth, self._options)

    def bounded_value(self, node: Node) -> float:
        """Return the bounded value of a node, which is final once the search is finished."""
        return bounded_value(node, self._options)

    def _add(self, parent: Node, chunk: Chunk) -> Node:
        node = Node(chunk, parent, len(self.nodes), parent.depth + 1)
        # As in the authors' code, ancestors do not count this first visit.
        node.visits = int(not node.terminal)
        parent.children.append(node)
        self.nodes.append(node)
        return node

    def _output(self, terminal: Node) -> None:
        terminal.backed_up = True
        back_up(terminal, self._options)
        self.outputs.append(terminal)

    def _best_of_frontier(self) -> Node | None:
        return max(self.frontier, key=self.score, default=None)  # the first of equal scores

    def _descend(self, node: Node) -> Node | None:
        """Descend by UCT to a node with missing children, or return the best frontier node."""
        while len(node.children) >= self._options.width:
            living = [child for child in node.children if not child.terminal]
            if not living:
                return self._best_of_frontier()
            scores = [uct(child, node.visits, self._options.exploration) for child in living]
            best = [c for c, score in zip(living, scores, strict=True) if score == max(scores)]
            node = best[int(self._rng.integers(len(best)))]
        return node

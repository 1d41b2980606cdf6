"""The tree of DeepSearch: the specification's numbers, a slow reference, and what always holds."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest

from train.rl.rollout.search_tree import (
    Chunk,
    Node,
    SearchOptions,
    SearchTree,
    back_up,
    bounded_value,
    frontier_score,
    most_confident,
    uct,
)

CODE, PAPER = SearchOptions(), SearchOptions(backup="paper")
DEPTH = 64


def chunk(entropy: float = 1.0, outcome: int | None = None, complete: bool = True) -> Chunk:
    return Chunk([-entropy], outcome, complete)


def child(parent: Node, made: Chunk) -> Node:
    node = Node(made, parent, depth=parent.depth + 1)
    parent.children.append(node)
    return node


def example() -> dict[str, Node]:
    """root -> a, b, c; a -> a1, a2; a1 -> a1x (wrong), a1y (right)."""
    found = {"root": Node(Chunk(()))}
    for name, parent, made in (
        ("a", "root", chunk()), ("b", "root", chunk(1.0)), ("c", "root", chunk(0.2)),
        ("a1", "a", chunk()), ("a2", "a", chunk(0.9)),
        ("a1x", "a1", chunk(outcome=-1)), ("a1y", "a1", chunk(outcome=1)),
    ):  # fmt: skip
        found[name] = child(found[parent], made)
    return found


def values(nodes: dict[str, Node], *names: str) -> list[float]:
    return [nodes[name].accumulated_value for name in names]


def test_backup_by_the_weights_of_the_code():
    nodes = example()
    back_up(nodes["a1x"], CODE)
    assert values(nodes, "root", "a", "a1", "a1x") == [-0.25, -0.5, -0.75, -1]
    back_up(nodes["a1y"], CODE)
    assert values(nodes, "root", "a", "a1", "a1y") == [0.25, 0.5, 0.75, 1]
    back_up(nodes["a1x"], CODE)
    assert values(nodes, "root", "a", "a1", "a1x") == [0.25, 0.5, 0.75, -2]
    assert [nodes[name].visits for name in ("root", "a", "a1")] == [3, 3, 3]


def test_backup_by_the_weights_of_the_paper():
    nodes = example()
    back_up(nodes["a1x"], PAPER)
    assert values(nodes, "root", "a", "a1", "a1x") == pytest.approx([-0.1, -1 / 3, -2 / 3, -1])
    back_up(nodes["a1y"], PAPER)
    assert values(nodes, "root", "a", "a1", "a1y") == pytest.approx([0.1, 1 / 3, 2 / 3, 1])
    back_up(nodes["a1x"], PAPER)
    assert values(nodes, "root", "a", "a1", "a1x") == pytest.approx([0.1, 1 / 3, 2 / 3, -2])


def test_scores_of_the_frontier():
    nodes = example()
    back_up(nodes["a1x"], CODE)
    back_up(nodes["a1y"], CODE)
    assert (nodes["root"].mean_value, nodes["a"].mean_value) == (0.125, 0.25)

    def scores(options: SearchOptions) -> list[float]:
        return [frontier_score(nodes[name], DEPTH, options) for name in ("b", "c", "a2")]

    assert scores(CODE) == pytest.approx([0.050991, 0.050991, 0.099735], abs=5e-7)
    entropy = SearchOptions(entropy_weight=0.4)
    assert scores(entropy) == pytest.approx([0.450991, 0.130991, 0.459735], abs=5e-7)
    depth = SearchOptions(value_weight=0.0, depth_weight=1.0, depth_term="linear")
    assert scores(depth) == [1, 1, 2]
    log = [math.log(2), math.log(2), math.log(3)]
    assert scores(dataclasses.replace(depth, depth_term="log")) == pytest.approx(log)


def test_selection_among_siblings():
    good = Node(chunk(), visits=3, accumulated_value=1.5)
    new = Node(chunk(), visits=1, accumulated_value=-0.2)
    assert uct(good, 10, 2.0) == pytest.approx(2.252174, abs=5e-7)
    assert uct(new, 10, 2.0) == pytest.approx(2.834854, abs=5e-7)
    assert uct(Node(chunk()), 10, 2.0) == 0 and uct(good, 0, 2.0) == 0.5


def test_values_are_bounded_for_advantages_except_those_of_terminals():
    given = {
        -2: -0.964028, -0.5: -0.462117, 0.25: 0.244919, 0.5: 0.462117, 1: 0.761594, 2: 0.964028,
    }  # fmt: skip
    for value, bounded in given.items():
        assert bounded_value(Node(chunk(), accumulated_value=value), CODE) == pytest.approx(
            bounded, abs=5e-7
        )
    assert bounded_value(Node(chunk(outcome=-1), accumulated_value=-2.0), CODE) == -1
    wide = SearchOptions(value_scale=0.5, value_temperature=2.0)
    assert bounded_value(Node(chunk(), accumulated_value=1.0), wide) == 0.5 * math.tanh(0.5)


def test_the_most_confident_of_wrong_responses():
    root = Node(Chunk(()))

    def response(entropies: Sequence[float], outcome=-1, complete=True) -> Node:
        first = child(root, Chunk([-entropies[0]]))
        return child(first, Chunk([-value for value in entropies[1:]], outcome, complete))

    wrong = [response(e) for e in ([0.2, 0.4, 0.3], [1, 0.1], [0.35, 0.25, 0.3, 0.2])]
    assert most_confident(wrong) is wrong[2]
    cut = response([0.01, 0.01], complete=False)
    assert most_confident([cut, *wrong]) is wrong[2]
    assert most_confident([cut]) is cut
    right = [response([3.0, 3.0], 1), response([2.0, 2.0], 1)]
    assert most_confident([*wrong, *right]) is right[1]


@pytest.mark.parametrize("second", [1, -1])
def test_advantages_of_two_responses_with_nothing_in_common(second):
    """Depth 4: prefixes of wrong answers are above the mean of a tree that only fails."""
    root = Node(Chunk(()))
    ends = []
    for outcome in (second, -1):
        node = root
        for _ in range(3):
            node = child(node, chunk())
        ends.append(child(node, chunk(outcome=outcome)))
        back_up(ends[-1], CODE)
    mean = (second - 1) / 2
    found = [[bounded_value(node, CODE) - mean for node in end.path[1:]] for end in ends]
    if second == 1:
        right = [0.380, 0.537, 0.664, 1]
        assert found[0] == pytest.approx(right, abs=5e-4)
        assert found[1] == pytest.approx([-value for value in right], abs=5e-4)
    else:
        assert found == [pytest.approx([0.620, 0.463, 0.336, 0], abs=5e-4)] * 2


def grown(seed: int, outputs: int, depth: int, options: SearchOptions, ends: float, right: float):
    """A tree over random chunks, and what it did: expansions and backups in order."""
    rng = np.random.default_rng(seed)
    tree = SearchTree(outputs, depth, options, np.random.default_rng(seed))
    log: list[tuple[str, tuple[int, ...]]] = []

    def draw(at: int) -> Chunk:
        over = at == depth or rng.random() < ends
        outcome = (1 if rng.random() < right else -1) if over else None
        cut = over and at == depth and outcome == -1
        return Chunk(-rng.random(int(rng.integers(1, 4))), outcome, not cut)

    def note(kind: str, node: Node) -> None:
        log.append((kind, address(node)))

    def note_outputs() -> None:
        said = sum(kind == "output" for kind, _ in log)
        for node in tree.outputs[said:]:
            note("output", node)

    while (asked := tree.request()) is not None:
        note_outputs()
        if asked.whole:
            chunks = [draw(1)]
            while chunks[-1].outcome is None:
                chunks.append(draw(len(chunks) + 1))
            note("whole", tree.add_response(chunks)[-1])
        else:
            note("expand", asked.node)
            tree.expand(asked.node, [draw(asked.node.depth + 1) for _ in range(asked.count)])
        note_outputs()
    note_outputs()
    return tree, log


def address(node: Node) -> tuple[int, ...]:
    """Number of each node of a path among its siblings."""
    path = node.path
    return tuple(above.children.index(below) for above, below in zip(path, path[1:], strict=False))


class Reference:
    """The search once more, slowly: everything is computed anew from the log at each decision."""

    def __init__(self, tree: SearchTree, options: SearchOptions, depth: int):
        self.chunks = {address(node): node.chunk for node in tree.nodes}
        self.born = {address(node): node.number for node in tree.nodes}
        self.options, self.depth = options, depth
        self.outputs: list[tuple[int, ...]] = []

    def value(self, at: tuple[int, ...]) -> float:
        total = 0.0
        for end in self.outputs:
            if end[: len(at)] == at:
                share = (
                    (len(at) + 1) / (len(end) + 1)
                    if self.options.backup == "code"
                    else len(at) / len(end)
                )
                outcome = self.chunks[end].outcome
                assert outcome is not None
                new = max(share, 0.1) * outcome
                if (total > 0) == (new > 0) or total == 0:
                    total += new
                elif new > 0:
                    total = new
        return total

    def visits(self, at: tuple[int, ...]) -> int:
        own = at != () and self.chunks[at].outcome is None
        return own + sum(end[: len(at)] == at for end in self.outputs)

    def mean(self, at: tuple[int, ...]) -> float:
        return self.value(at) / self.visits(at) if self.visits(at) else 0.0

    def surprise(self, at: tuple[int, ...], whole: bool) -> float:
        starts = range(1, len(at) + 1) if whole else [len(at)]
        return -float(np.concatenate([self.chunks[at[:end]].log_probs for end in starts]).mean())

    def children(self, at: tuple[int, ...], now: int) -> list[tuple[int, ...]]:
        return [a for a in self.chunks if a[:-1] == at and a != () and self.born[a] < now]

    def frontier(self, now: int) -> list[tuple[int, ...]]:
        return [
            at
            for at, chunk in self.chunks.items()
            if at != () and self.born[at] < now and chunk.outcome is None
            and len(self.children(at, now)) < self.options.width
        ]  # fmt: skip

    def next(self, now: int) -> tuple[int, ...] | None:
        options = self.options

        def score(at):
            return (
                options.value_weight * math.tanh(self.mean(at[:-1]))
                + options.entropy_weight * self.surprise(at, False)
                + options.depth_weight * math.sqrt(len(at) / self.depth)
            )

        frontier = self.frontier(now)
        return max(frontier, key=lambda at: (score(at), -self.born[at])) if frontier else None

    def best_end(self, ends: list[tuple[int, ...]]) -> tuple[int, ...]:
        right = [at for at in ends if self.chunks[at].outcome == 1]
        whole = [at for at in ends if self.chunks[at].complete]
        return min(right or whole or ends, key=lambda at: self.surprise(at, True))

    def replay(self, log: list[tuple[str, tuple[int, ...]]], outputs: int) -> None:
        """Check each line of the log against what the rules say at that time."""
        now, allowed, last, whole, kind_before = 1, {()}, (), False, ""
        for kind, at in log:
            if kind == "output":
                every = [a for a, c in self.chunks.items() if c.outcome and self.born[a] < now]
                ends = [a for a in every if kind_before != "expand" or a[:-1] == last]
                assert kind_before == "expand" or allowed == {None} or whole
                left = [a for a in ends if a not in self.outputs]
                assert at == (at if whole else self.best_end(left))
                self.outputs.append(at)
                allowed, whole, kind_before = {self.next(now)}, False, kind
                continue
            whole, kind_before = kind == "whole", kind
            if whole:
                ends = [a for a, c in self.chunks.items() if c.outcome and self.born[a] < now]
                assert allowed == {None} and set(ends) <= set(self.outputs)
                now = self.born[at] + 1
                continue
            assert at in allowed
            last = at
            now += self.options.width - len(self.children(at, now))
            allowed = self.descend(at, now)
        assert len(self.outputs) == outputs

    def descend(self, at: tuple[int, ...], now: int) -> set[tuple[int, ...] | None]:
        """The nodes that selection by UCT may choose, ties included."""
        children = self.children(at, now)
        if len(children) < self.options.width:
            return {at}
        living = [a for a in children if self.chunks[a].outcome is None]
        if not living:
            return {self.next(now)}
        above = self.visits(at)
        scores = []
        for a in living:
            bonus = math.sqrt(math.log(above) / self.visits(a)) if above else 0.0
            scores.append(self.mean(a) + self.options.exploration * bonus)
        best = [a for a, score in zip(living, scores, strict=True) if score == max(scores)]
        return set().union(*(self.descend(a, now) for a in best))


SETTINGS = [
    (3, 4, CODE, 0.3, 0.3),
    (8, 3, PAPER, 0.5, 0.1),
    (6, 5, SearchOptions(width=2, entropy_weight=0.4), 0.1, 0.5),
    (9, 1, SearchOptions(width=4), 1.0, 0.4),  # every response is one chunk
    (7, 4, SearchOptions(width=2, depth_weight=-0.3), 0.8, 0.0),  # short responses: a lean tree
    (5, 6, SearchOptions(width=1), 0.3, 0.5),
]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("seed", range(12))
def test_a_search_does_what_the_slow_reference_says(setting, seed):
    outputs, depth, options, ends, right = setting
    tree, log = grown(seed, outputs, depth, options, ends, right)
    reference = Reference(tree, options, depth)
    reference.replay(log, outputs)
    assert [address(node) for node in tree.outputs] == reference.outputs
    for node in tree.nodes:
        assert node.accumulated_value == pytest.approx(reference.value(address(node)), rel=1e-12)
        assert node.visits == reference.visits(address(node))


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_holds_in_any_search(setting):
    outputs, depth, options, ends, right = setting
    for seed in range(20):
        tree, _ = grown(100 + seed, outputs, depth, options, ends, right)
        assert len(tree.outputs) == len(set(tree.outputs)) == outputs
        assert all(node.terminal and node.backed_up for node in tree.outputs)
        assert tree.root.visits == outputs
        for node in tree.nodes:
            below = [end for end in tree.outputs if node in end.path]
            won = any(end.chunk.outcome == 1 for end in below)
            assert (node.accumulated_value > 0) == won, (
                "good news are never lost, bad ones never add up to it"
            )
            assert node.accumulated_value == 0 or below
            assert node.depth <= depth and (node.depth < depth or node.terminal)
            assert not (node.terminal and node.children)
            assert node is tree.root or len(node.children) <= options.width
            assert abs(tree.bounded_value(node)) <= 1
        if options.width > 1:
            again, _ = grown(100 + seed, outputs, depth, options, ends, right)
            assert [n.accumulated_value for n in again.nodes] == [
                n.accumulated_value for n in tree.nodes
            ]


def test_a_tree_of_one_chunk_is_plain_sampling():
    """An empty frontier: terminals that are left, then whole responses from the root."""
    tree, log = grown(0, 8, 1, SearchOptions(width=8), 1.0, 0.5)
    assert [kind for kind, _ in log] == ["expand"] + ["output"] * 8
    assert len(tree.nodes) == 9 and {len(end.path) for end in tree.outputs} == {2}
    tree, log = grown(0, 10, 1, SearchOptions(width=8), 1.0, 0.5)
    kinds = [kind for kind, _ in log]
    assert kinds == ["expand"] + ["output"] * 8 + ["whole", "output"] * 2
    assert len(tree.root.children) == 10


def test_a_whole_response_opens_the_frontier_again():
    tree = SearchTree(4, 3, SearchOptions(width=1), np.random.default_rng(0))
    tree.expand(tree.root, [chunk(outcome=-1)])
    asked = tree.request()
    assert asked is not None and asked.whole and asked.node is tree.root
    tree.add_response([chunk(), chunk(outcome=1)])
    assert tree.solved
    asked = tree.request()
    assert asked is not None and asked.whole, "its prefix has all of its children: one"
    wide = SearchTree(4, 3, SearchOptions(width=2), np.random.default_rng(0))
    wide.expand(wide.root, [chunk(outcome=-1), chunk(outcome=-1)])
    assert wide.request() is not None and len(wide.outputs) == 2
    first, _ = wide.add_response([chunk(), chunk(outcome=1)])
    asked = wide.request()
    assert asked is not None and (asked.node, asked.count, asked.whole) == (first, 1, False)


def test_ties_are_broken_by_lot():
    """Fresh siblings are all alike."""
    chosen = set()
    for seed in range(20):
        tree = SearchTree(1, 9, SearchOptions(width=3), np.random.default_rng(seed))
        tree.expand(tree.root, [chunk(), chunk(), chunk()])
        asked = tree.request()
        assert asked is not None
        chosen.add(asked.node.number)
    assert chosen == {1, 2, 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width=0: choose 1 or more"),
        ({"value_scale": 0.0}, "value_scale=0.0: choose a number above 0"),
        ({"entropy_weight": math.inf}, "entropy_weight=inf: choose a finite number"),
        ({"backup": "mine"}, "backup='mine': choose code or paper"),
    ],
)
def test_mistakes_are_one_line(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CODE, **change)

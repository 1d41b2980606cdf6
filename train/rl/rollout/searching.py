"""Running many tree searches at once, with shared batches for the chunks of all trees."""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from memgen.insertion import INFERENCE, PROMPT
from train.rl.buckets import SHORTEST, bucket
from train.rl.rollout.episodes import (
    EnvironmentEpisode,
    Rollout,
    TrajectoryBuilder,
    act_all,
    begin_episodes,
)
from train.rl.rollout.formatter import PromptFormatter
from train.rl.rollout.prefix_cache import Prefix, PrefixCache
from train.rl.rollout.sampler import Conversation, Sampled, Sampler
from train.rl.rollout.search_tree import Chunk, Expansion, Node, SearchOptions, SearchTree
from train.rl.scoring import score_all
from train.rl.types import Completion, Problem, Reward, Trajectory

_NOISE = 2  # part of the seed, so that searches and direct rollouts of a step differ
_MOST_NODES = 1 << 20  # of a tree; gives two searches of one problem in a step different noise


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of the searches of a run, in tokens, turns and bytes.

    Attributes:
        step_len: Maximum number of tokens of a node in a task of one response.
        max_new_tokens: Maximum number of tokens per response.
        turns: Number of turns after which an episode is truncated, where each turn is one node; 0
            for a task of one response.
        max_observation: Maximum number of tokens of an observation.
        cache_bytes: Maximum number of bytes of cached states.
    """

    step_len: int
    max_new_tokens: int
    turns: int
    max_observation: int
    cache_bytes: float

    @property
    def max_depth(self) -> int:
        """Maximum depth of a tree (d_T)."""
        return self.turns or -(-self.max_new_tokens // self.step_len)

    @property
    def row_tokens(self) -> int:
        """Maximum number of tokens per row after the prompt."""
        return max(self.turns, 1) * (self.max_new_tokens + self.observation_tokens)

    @property
    def observation_tokens(self) -> int:
        """Maximum number of observation tokens after a turn; 0 for a task of one response."""
        return self.max_observation if self.turns else 0


@dataclasses.dataclass(frozen=True)
class NodePayload:
    """Generated text of a search node, linked to the generated texts of the node's ancestors.

    Attributes:
        sampled: Generated tokens of the node.
        before: Generated text of the parent; None if the parent is the root.
        seen: Ids of the observation that follows the generated tokens.
        play: Episode after the node's turn; None in a task of one response.
        completion: Response that ends in this node: the turn's response in an environment, the
            whole response of a terminal in a task of one response, else None.
        reward: Reward of a terminal; None for other nodes.
    """

    sampled: Sampled
    before: "NodePayload | None"
    seen: Sequence[int] = ()
    play: EnvironmentEpisode | None = None
    completion: Completion | None = None
    reward: Reward | None = None

    @functools.cached_property
    def generated(self) -> int:
        """Number of tokens generated since the prompt, up to this node, without observations."""
        return len(self.sampled.tokens) + (0 if self.before is None else self.before.generated)

    @property
    def path(self) -> "list[NodePayload]":
        """Generated texts of the nodes on the path, from the first after the prompt to this one."""
        found: list[NodePayload] = []
        at: NodePayload | None = self
        while at is not None:
            found.append(at)
            at = at.before
        return found[::-1]


@dataclasses.dataclass
class Search:
    """State of the tree search of one problem.

    Attributes:
        group: Index of the problem in its step.
        problem: Problem that is searched.
        repeat: Number of earlier searches of the same problem in this step.
        prompt: Ids of the prompt.
        tree: Tree of the search.
        start: Episode before the first turn; None for a task of one response.
    """

    group: int
    problem: Problem
    repeat: int
    prompt: list[int]
    tree: SearchTree
    start: EnvironmentEpisode | None


class Searcher:
    """Runs the tree searches of a step, in batches with rows of all trees.

    Args:
        sampler: Sampler with the current parameters of the policy.
        formatter: Formatter that translates texts to token ids.
        task: Task or environment.
        options: Options of the trees.
        limits: Limits of the searches.
        seed: Numbers that all randomness is derived from.
    """

    def __init__(
        self,
        sampler: Sampler,
        formatter: PromptFormatter,
        task: Any,
        options: SearchOptions,
        limits: Limits,
        seed: Sequence[int],
    ):
        self._sampler, self._formatter, self._task = sampler, formatter, task
        self._options, self._limits, self._seed = options, limits, seed
        self.counts: dict[str, float] = dict.fromkeys(
            ("trees", "solved", "one_sided", "expansions", "whole", "nodes", "tokens", "prefills",
             "reprefills", "prefilled_tokens", "reused_tokens", "generation_seconds"), 0.0,
        )  # fmt: skip
        """Totals over all searches, a mapping from name to number.

        The names are `trees`, `solved` trees, `one_sided` trees (whose rollouts all succeed or all
        fail), `expansions` of nodes, `whole` responses from the root, `nodes`, generated `tokens`,
        the counters of `PrefixCache`, and `generation_seconds`.
        """

    def run(
        self, groups: Sequence[int], problems: Sequence[Problem], outputs: Sequence[int]
    ) -> list[Search]:
        """Search several problems, and return the finished searches.

        Args:
            groups: Index of each problem in its step.
            problems: Problems to search.
            outputs: Number of terminals that each search backs up.
        """
        searches = self._start(groups, problems, outputs)
        if not searches:
            return []
        limits, before = self._limits, self._sampler.generated
        longest = max(len(search.prompt) for search in searches)
        nodes = sum(outputs) * limits.max_depth * self._options.width + len(searches)
        batch = min(self._sampler.max_rows, len(searches) * self._options.width)
        cache = PrefixCache(
            self._sampler, batch, nodes, limits.cache_bytes,
            bucket(longest, SHORTEST) + bucket(limits.row_tokens, SHORTEST), max(limits.turns, 1),
        )  # fmt: skip
        going = searches
        while asked := [(s, e) for s in going if (e := s.tree.request()) is not None]:
            self._expand([(s, e) for s, e in asked if not e.whole], cache)
            self._respond([s for s, e in asked if e.whole], cache)
            for search in going:
                if len(search.tree.outputs) >= search.tree.target:
                    cache.release([(search.group, node.number) for node in search.tree.nodes])
            going = [search for search, _ in asked]
        self._count(searches, cache, self._sampler.generated - before)
        return searches

    def trajectories(self, search: Search) -> list[Trajectory]:
        """Make a trajectory of each terminal that a search backed up, with its `node_values`."""
        found = []
        for number, end in enumerate(search.tree.outputs):
            row = TrajectoryBuilder(Rollout(search.group, search.problem, number), search.prompt)
            last: NodePayload = end.chunk.payload
            values = np.zeros(len(search.prompt))
            if not self._limits.turns:
                assert last.completion is not None
                row.respond(_joined(last.path), last.completion)
            for node, part in zip(end.path[1:], last.path, strict=True):
                if self._limits.turns:
                    assert part.completion is not None
                    row.respond(part.sampled, part.completion)
                    row.observe(part.seen)
                length = len(part.sampled.tokens) + len(part.seen)
                values = np.append(values, np.full(length, search.tree.bounded_value(node)))
            assert last.reward is not None
            rewards = last.play.rewards if last.play else [last.reward.value]
            made = row.trajectory(last.reward, rewards)
            found.append(dataclasses.replace(made, node_values=values, source="search"))
        return found

    def _start(self, groups, problems, outputs) -> list[Search]:
        repeats: dict[str, int] = {}
        found = []
        starts: Sequence[EnvironmentEpisode | None] = [None] * len(problems)
        if self._limits.turns:
            starts = begin_episodes(self._task, problems)
        for group, problem, target, start in zip(groups, problems, outputs, starts, strict=True):
            repeat = repeats.get(problem.uid, 0)
            repeats[problem.uid] = repeat + 1
            lot = np.frombuffer(problem.uid.encode() + bytes([repeat % 256]), np.uint8)
            rng = np.random.default_rng([*self._seed, *lot.tolist()])
            tree = SearchTree(target, self._limits.max_depth, self._options, rng)
            prompt = self._formatter.prompt([problem.prompt])
            found.append(Search(group, problem, repeat, prompt, tree, start))
        return found

    def _expand(self, asked: Sequence[tuple[Search, Expansion]], cache: PrefixCache) -> None:
        """Generate the chunks that trees have requested, and add them to the trees."""
        rows = [(s, e.node, number) for s, e in asked for number in range(e.count)]
        chunks: dict[int, list[Chunk]] = {id(search): [] for search, _ in asked}
        for batch in _batches(rows, self._sampler.max_rows, cache.capacity):
            searches, nodes, numbers = zip(*batch, strict=True)
            born = [len(s.tree.nodes) + n for s, n in zip(searches, numbers, strict=True)]
            begin = time.perf_counter()
            conversation = self._branch(cache, [(s, node) for s, node, _ in batch], born)
            before = [node.chunk.payload for node in nodes]
            sampled = self._generate(conversation, before)
            self.counts["generation_seconds"] += time.perf_counter() - begin
            made = self._chunks(searches, before, sampled)
            for search, chunk in zip(searches, made, strict=True):
                chunks[id(search)].append(chunk)
            begin = time.perf_counter()
            living = [row for row, chunk in enumerate(made) if chunk.outcome is None]
            if living:
                conversation.observe([chunk.payload.seen for chunk in made])
                keys = [(searches[row].group, born[row]) for row in living]
                cache.hold(conversation, living, keys)
            self.counts["generation_seconds"] += time.perf_counter() - begin
        for search, expansion in asked:
            search.tree.expand(expansion.node, chunks[id(search)])
            if expansion.node.parent is not None:  # the root may be expanded again
                cache.release([(search.group, expansion.node.number)])
        self.counts["expansions"] += len(asked)

    def _respond(self, searches: Sequence[Search], cache: PrefixCache) -> None:
        """Generate whole responses, chunk by chunk, for trees with nothing left to expand."""
        most = min(self._sampler.max_rows, cache.capacity)
        for start in range(0, len(searches), most):
            some = searches[start : start + most]
            begin = time.perf_counter()
            born = [len(search.tree.nodes) for search in some]
            conversation = self._branch(cache, [(s, s.tree.root) for s in some], born)
            chunks: list[list[Chunk]] = [[] for _ in some]
            active = np.ones(len(some), bool)
            while active.any():
                before = [made[-1].payload if made else None for made in chunks]
                sampled = self._generate(conversation, before, active)
                going = np.flatnonzero(active).tolist()
                made = self._chunks(
                    [some[row] for row in going],
                    [before[row] for row in going],
                    [sampled[row] for row in going],
                )
                for row, chunk in zip(going, made, strict=True):
                    chunks[row].append(chunk)
                    active[row] = chunk.outcome is None
                seen = [
                    whole[-1].payload.seen if on else ()
                    for whole, on in zip(chunks, active, strict=True)
                ]
                conversation.observe(seen)
            self.counts["generation_seconds"] += time.perf_counter() - begin
            for search, whole in zip(some, chunks, strict=True):
                search.tree.add_response(whole)
        self.counts["whole"] += len(searches)

    def _branch(
        self, cache: PrefixCache, rows: Sequence[tuple[Search, Node]], born: Sequence[int]
    ) -> Conversation:
        """Begin rows that continue nodes; problem and number of a new node decide its noise."""
        numbers = [s.repeat * _MOST_NODES + at for (s, _), at in zip(rows, born, strict=True)]
        prefixes: dict[int, Prefix] = {}
        for search, node in rows:  # siblings continue the same node
            if id(node) not in prefixes:
                prefixes[id(node)] = self._prefix(search, node)
        return cache.branch(
            [prefixes[id(node)] for _, node in rows],
            (*self._seed, _NOISE),
            [search.problem.uid for search, _ in rows],
            numbers,
        )

    def _generate(
        self, conversation: Conversation, before: Sequence[NodePayload | None], active: Any = None
    ) -> list[Sampled]:
        """Generate the next chunk, or the response of the next turn, in each row."""
        limits = self._limits
        if limits.turns:
            events = np.full(len(before), -1) if self._sampler.weaves else None
            return conversation.respond(limits.max_new_tokens, active, events=events)
        generated = np.array([0 if at is None else at.generated for at in before])
        left = np.minimum(limits.step_len, limits.max_new_tokens - generated)
        events = None
        if self._sampler.weaves:
            events = np.array([_events(at) for at in before])
        return conversation.respond(limits.step_len, active, limits=left, events=events)

    def _chunks(
        self,
        searches: Sequence[Search],
        before: Sequence[NodePayload | None],
        sampled: Sequence[Sampled],
    ) -> list[Chunk]:
        """Make chunks of generated tokens, and score those that end their responses."""
        make = self._turns if self._limits.turns else self._parts
        return make(searches, before, sampled)

    def _parts(self, searches, before, sampled) -> list[Chunk]:
        stop, most = self._sampler.sampling.stop, self._limits.max_new_tokens
        made = [NodePayload(*row) for row in zip(sampled, before, strict=True)]
        finished = [part.tokens[-1] in stop for part in sampled]
        ends = [
            row for row, payload in enumerate(made) if finished[row] or payload.generated >= most
        ]
        completions = [
            self._formatter.completion(searches[row].problem, _joined(made[row].path))
            for row in ends
        ]
        chunks = [Chunk(payload.sampled.log_probs, payload=payload) for payload in made]
        for row, completion, reward in zip(
            ends, completions, score_all(self._task, completions), strict=True
        ):
            payload = dataclasses.replace(made[row], completion=completion, reward=reward)
            outcome = 1 if reward.success else -1
            chunks[row] = Chunk(sampled[row].log_probs, outcome, bool(finished[row]), payload)
        return chunks

    def _turns(self, searches, before, sampled) -> list[Chunk]:
        completions = [
            self._formatter.completion(search.problem, part)
            for search, part in zip(searches, sampled, strict=True)
        ]
        plays = []
        for search, parent in zip(searches, before, strict=True):
            earlier = search.start if parent is None else parent.play
            assert earlier is not None
            plays.append(earlier.branch())
        observations = act_all(plays, completions)
        rows = zip(sampled, before, plays, completions, observations, strict=True)
        return [self._turn(*row) for row in rows]

    def _turn(
        self,
        sampled: Sampled,
        before: NodePayload | None,
        play: EnvironmentEpisode,
        completion: Completion,
        observation: str,
    ) -> Chunk:
        made = NodePayload(sampled, before, play=play, completion=completion)
        if not play.over and len(play.rewards) < self._limits.turns:
            seen = self._formatter.observation(observation, self._limits.max_observation)
            return Chunk(sampled.log_probs, payload=dataclasses.replace(made, seen=seen))
        made = dataclasses.replace(made, reward=play.reward)
        outcome = 1 if play.reward.success else -1
        return Chunk(sampled.log_probs, outcome, play.terminated, made)

    def _prefix(self, search: Search, node: Node) -> Prefix:
        """Return the text of a node with the latents that were woven into it."""
        tokens = list(search.prompt)
        points: list[int] = []
        kinds: list[int] = []
        latents: list[np.ndarray] = []
        for number, part in enumerate(_path(node.chunk.payload)):
            invoked = np.flatnonzero(part.sampled.decisions == 1)
            if self._sampler.weaves and len(invoked):
                assert part.sampled.latents is not None
                begins = bool(self._limits.turns) or number == 0
                points += (len(tokens) + invoked).tolist()
                kinds += [PROMPT if begins and at == 0 else INFERENCE for at in invoked]
                latents += list(part.sampled.latents)
            tokens += [*part.sampled.tokens.tolist(), *part.seen]
        return Prefix((search.group, node.number), tokens, points, kinds, latents)

    def _count(self, searches: Sequence[Search], cache: PrefixCache, tokens: int) -> None:
        counts = self.counts
        counts["trees"] += len(searches)
        counts["tokens"] += tokens
        for name in ("reprefills", "prefilled_tokens", "reused_tokens", "prefills"):
            counts[name] += getattr(cache, name)
        for search in searches:
            right = [end.chunk.outcome == 1 for end in search.tree.outputs]
            counts["solved"] += any(right)
            counts["one_sided"] += len(set(right)) == 1
            counts["nodes"] += len(search.tree.nodes)


def _path(payload: NodePayload | None) -> list[NodePayload]:
    return [] if payload is None else payload.path


def _events(before: NodePayload | None) -> int:
    """Count a response's events, without an event before its first token; -1 if not begun."""
    if before is None:
        return -1
    return int((_joined(before.path).decisions[1:] == 1).sum())


def _joined(parts: Sequence[NodePayload]) -> Sampled:
    """Concatenate the chunks of a response."""
    sampled = [part.sampled for part in parts]
    return Sampled(
        np.concatenate([part.tokens for part in sampled]),
        np.concatenate([part.log_probs for part in sampled]),
        np.concatenate([part.decisions for part in sampled]),
    )


def _batches(rows: Sequence[Any], max_rows: int, max_nodes: int) -> Iterator[list[Any]]:
    """Yield batches of at most `max_rows` rows `(search, node, number)` and `max_nodes` nodes."""
    batch: list[Any] = []
    nodes: set[int] = set()
    for row in rows:
        new = id(row[1]) not in nodes
        if batch and (len(batch) == max_rows or (new and len(nodes) == max_nodes)):
            yield batch
            batch, nodes = [], set()
        batch.append(row)
        nodes.add(id(row[1]))
    if batch:
        yield batch

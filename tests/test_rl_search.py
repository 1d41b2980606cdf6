"""Searches: branched caches are what the trainer sees, problems wait by success."""

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest
from rl_runs import job, rewards, timeless, trajectories
from rl_tiny import Vowels
from test_rl_sampler import ASCII, SPEECH, Asks, Echoes, make_sampler, of_parts, scored

from test_rl_sampler import arrays_of, decided  # isort: skip

from train.engine.optim import OptimizerConfig
from train.rl.config import RLConfig
from train.rl.learning.credit import assign_advantages
from train.rl.loop import train
from train.rl.rollout import searching
from train.rl.rollout.budgets import Uniform
from train.rl.rollout.collector import Collector, strategy_for
from train.rl.rollout.prefix_cache import row_bytes
from train.rl.rollout.sampler import Sampler
from train.rl.rollout.search import TreeSearch
from train.rl.rollout.solved_problems import SolvedProblems
from train.rl.rollout.strategies import OneResponse, Turns
from train.rl.rollout.tree_export import draw_tree
from train.rl.types import Episodes, Problem, Reward, Trajectory
from train.runs.checkpoint import load_params

NEW = 11  # tokens of a response: three nodes of 4, 4 and 3
COUNTS = (2, 1, 3, 0, 2, 4)
SEARCH = TreeSearch(width=2, step_len=4, probe=0, formatter=SPEECH, max_new_tokens=NEW)
PLAY = dataclasses.replace(SEARCH, step_len=None, max_observation=2, turns=3, max_new_tokens=3)


@dataclasses.dataclass
class Found:
    rows: list[Trajectory]
    metrics: dict[str, float]
    sampler: Sampler
    policy: Any


def search(name: str, strategy: TreeSearch = SEARCH, task: Any = None, counts=COUNTS, **changes):
    sampler, policy = make_sampler(name, **changes)
    task = task or Asks()
    problems = [task.problem("train", index) for index in range(len(counts))]
    strategy = dataclasses.replace(strategy)
    rows = strategy.collect(sampler, task, problems, counts, (7, 1))
    return Found(rows, strategy.metrics(), sampler, policy)


@functools.cache
def found(name: str) -> Found:
    return search(name, valid_vocab_size=ASCII)


@functools.cache
def played(name: str) -> Found:
    return search(name, PLAY, Echoes(), valid_vocab_size=ASCII)


def same(rows: Sequence[Trajectory], others: Sequence[Trajectory]) -> None:
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        np.testing.assert_array_equal(row.tokens, other.tokens)
        np.testing.assert_array_equal(row.decisions, other.decisions)
        np.testing.assert_allclose(row.log_probs, other.log_probs, atol=1e-4)
        np.testing.assert_allclose(cast(Any, row.node_values), cast(Any, other.node_values))


LONG = [pytest.param(name, marks=pytest.mark.experiment) for name in ("threshold", "trigger")]


@pytest.mark.parametrize("name", ["plain", *LONG])
def test_branched_rows_are_scored_as_they_were_sampled(name):
    """Three chunks from cached state are one response to the trainer, latents in their places."""
    made = found(name)
    assert [sum(row.group == group for row in made.rows) for group in range(6)] == list(COUNTS)
    scores, arrays = scored(made.rows, made.policy, valid_vocab_size=ASCII)
    np.testing.assert_allclose(scores, arrays["sampler"], atol=1e-4)
    assert max(row.num_generated for row in made.rows) > 8, "three chunks"
    assert {len(row.begins) for row in made.rows} == {1}
    assert made.metrics["search/reprefills"] == 0
    assert made.metrics["search/prefills"] == made.sampler.prefills == 5, "one for each prompt"
    assert made.metrics["search/reused_tokens"] > made.metrics["search/prefilled_tokens"]
    assert made.metrics["search/tokens"] == made.sampler.generated
    if name == "trigger":
        events = [int((row.decisions == 1).sum()) for row in made.rows]
        later = np.concatenate([row.decisions[row.begins[0] + 4 :] for row in made.rows])
        assert (later >= 0).any(), "it is asked in later chunks, as the same response goes on"
        assert max(events) <= 1 + made.sampler.policy.config.max_inference_events


@pytest.mark.parametrize("name", ["plain", pytest.param("trigger", marks=pytest.mark.experiment)])
def test_an_evicted_prefix_is_prefilled_again(name):
    """With its latents; a limit of bytes changes no text and only rounds log-probabilities."""
    whole = found(name)
    rows = row_bytes(whole.sampler.policy, 48, 1)
    tight = dataclasses.replace(SEARCH, cache_mib=2.5 * rows / 2**20)
    made = search(name, tight, valid_vocab_size=ASCII)
    assert made.metrics["search/reprefills"] > 3
    assert made.metrics["search/reused_tokens"] < whole.metrics["search/reused_tokens"]
    same(made.rows, whole.rows)


def test_a_search_depends_on_no_other():
    """Few rows at a time, and other problems beside it."""
    whole = found("plain")
    same(search("plain", valid_vocab_size=ASCII, max_rows=3).rows, whole.rows)
    alone = search("plain", counts=(0, 0, 3), valid_vocab_size=ASCII).rows
    same(alone, [row for row in whole.rows if row.group == 2])


def test_a_problem_that_comes_twice_is_searched_anew():
    class Same(Asks):
        def problem(self, split, index):
            return super().problem(split, 0)

    rows = search("plain", task=Same(), counts=(2, 2), valid_vocab_size=ASCII).rows
    texts = {tuple(row.tokens) for row in rows}
    assert len(texts) == 4


@pytest.mark.parametrize("name", ["plain", pytest.param("trigger", marks=pytest.mark.experiment)])
def test_a_turn_is_a_node(name):
    """Of its own environment's state; every turn is scored as it was sampled."""
    made = played(name)
    for row in made.rows:
        turns = 1 + row.group % 3
        assert len(row.begins) == len(row.turn_rewards) == len(row.texts) == turns
        values = row.node_values
        assert values is not None
        on_turns = [values[begin] for begin in row.begins]
        assert on_turns[-1] == (1 if row.reward.success else -1)
        assert row.reward.info["turns"] == turns
        assert row.reward.value == pytest.approx(sum(row.turn_rewards))
    scores, arrays = scored(made.rows, made.policy, valid_vocab_size=ASCII)
    np.testing.assert_allclose(scores, arrays["sampler"], atol=1e-4)
    if name == "trigger":
        trigger_policy = made.sampler.sampling.trigger_policy
        assert trigger_policy.learned and {0, 1} <= set(arrays["decisions"].ravel().tolist())
        assert np.isfinite(of_parts(decided, made.policy, arrays_of(made.rows))).all()


def test_nodes_of_one_chunk_are_plain_sampling():
    """The limit of long nodes: a response is a node, and advantages are those of Dr. GRPO."""
    one = dataclasses.replace(SEARCH, step_len=NEW, width=4)
    made = search("plain", one, LowByte(), counts=(4, 6, 0, 4, 3))
    assert made.metrics["search/whole"] == 2, "beyond the width, from the root"
    rows = made.rows
    assert len({tuple(row.tokens) for row in rows if row.group == 1}) > 3
    config = RLConfig(method="deepsearch", max_new_tokens=NEW)
    episodes = Episodes.from_trajectories(rows)
    ours = assign_advantages(rows, episodes, config)
    theirs = assign_advantages(rows, episodes, RLConfig(method="dr_grpo"))
    assert max(np.abs(advantage).max() for advantage in theirs) > 0
    for row, mine, other in zip(rows, ours, theirs, strict=True):
        on = row.trained  # rewards are 0 and 1, outcomes -1 and 1
        np.testing.assert_allclose(mine[on], 2 * other[on], atol=1e-12)


class LowByte(Asks):
    """A response whose second token is below 64, or that is one token long."""

    def score(self, completion):
        good = completion.tokens[min(1, len(completion.tokens) - 1)] < ASCII // 2
        return Reward(float(good), good)


def test_advantages_of_a_tree_are_values_less_the_mean_outcome():
    rows = trajectories([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.25]])
    rng = np.random.default_rng(0)
    given = [
        row if row.group == 3
        else dataclasses.replace(row, node_values=rng.uniform(-1, 1, len(row.tokens)))
        for row in rows
    ]  # fmt: skip

    def advantages(**changes) -> list[np.ndarray]:
        config = RLConfig(method="deepsearch", **changes)
        return assign_advantages(given, Episodes.from_trajectories(given), config)

    values = [cast(Any, row.node_values) for row in given]
    ours, kept = advantages(), advantages(advantage="tree(one_sided='keep')")
    shaped = advantages(reward="overlong(buffer=60)", max_new_tokens=64)
    for index, row in enumerate(given):
        if row.group == 0:
            np.testing.assert_allclose(ours[index], values[index] + 0.5)
            np.testing.assert_array_equal(kept[index], ours[index])
            tree = [r for r in given if r.group == 0]
            fine = [-max(0, r.num_generated - 4) / 60 for r in tree]
            mine = -max(0, row.num_generated - 4) / 60
            expected = values[index] + mine - np.mean([-0.5 + f for f in fine])
            np.testing.assert_allclose(shaped[index], expected)
        elif row.group == 3:
            np.testing.assert_allclose(ours[index], row.reward.value - 0.625)
        else:
            assert not ours[index].any() and not shaped[index].any()
            mean = 1 if row.reward.success else -1
            np.testing.assert_allclose(kept[index], values[index] - mean)


class Scripted(Vowels):
    """A finite task that is solved as often as a table of problems says, whatever is written."""

    sizes: Any = {"train": 6, "test": None}

    def __init__(self, rates: dict[str, float]):
        self.rates, self.asked = rates, {uid: 0 for uid in rates}

    def problem(self, split, index):
        return Problem(f"{split}{index}", f"vowels in text {index * 7919}")

    def score(self, completion):
        uid = completion.problem.uid
        self.asked[uid] = self.asked.get(uid, 0) + 1
        rate = self.rates.get(uid, 0.0)
        good = int(self.asked[uid] * rate) > int((self.asked[uid] - 1) * rate)
        return Reward(float(good), good)


def test_problems_wait_by_how_often_they_are_solved():
    task = Scripted({"train0": 1.0, "train1": 0.0, "train2": 0.125})
    sampler, _ = make_sampler("plain")
    problems = [task.problem("train", index) for index in range(3)]
    strategy = dataclasses.replace(SEARCH, width=8, step_len=NEW, probe=4)

    def visit(step: int) -> dict[int, list[Trajectory]]:
        rows = strategy.collect(sampler, task, problems, [8] * 3, (7, step))
        return {group: [row for row in rows if row.group == group] for group in range(3)}

    first = visit(1)
    assert [row.source for row in first[0]] == ["direct"] * 8, "easy: what was probed, and more"
    for group in (1, 2):
        assert [row.source for row in first[group]] == ["search"] * 8 + ["probe"] * 4
        assert len({row.episode for row in first[group]}) == 12
    assert strategy.sets_aside("train0") and not strategy.sets_aside("train1")
    solved = [row for row in first[2] if row.source == "search" and row.reward.success]
    assert len(solved) == 1
    second = visit(2)
    again = ["search"] * 8 + ["probe"] * 4
    assert [row.source for row in second[1]] == again, "never solved: searched again"
    assert [row.source for row in second[2]] == ["cache"] + ["direct"] * 7
    [again] = second[2][:1]
    for name in ("tokens", "trained", "log_probs", "decisions", "begins", "turn_rewards", "texts"):
        np.testing.assert_array_equal(getattr(again, name), getattr(solved[0], name))
    assert again.reward == solved[0].reward
    assert cast(Any, again.node_values).tolist() == [1.0] * len(again.tokens)
    metrics = strategy.metrics()
    assert metrics["search/hard"] == 2 and metrics["search/aside"] == 1
    assert metrics["search/direct"] == 2, "train0 was visited twice here"
    direct = [row for rows in (*first.values(), *second.values()) for row in rows]
    direct = [row.reward.success for row in direct if row.source in ("direct", "probe")]
    assert metrics["search/direct_rollouts"] == len(direct)
    assert metrics["search/direct_success"] == pytest.approx(np.mean(direct))
    other = dataclasses.replace(strategy)
    other.restore(json.loads(json.dumps(strategy.state)))
    assert other.state == strategy.state and other.state is not strategy.state
    task.rates["train2"] = 1.0
    visit(3)
    assert strategy.sets_aside("train2"), "the policy now solves it by itself"
    assert strategy.metrics()["search/solutions"] == 0
    strategy._add({"direct_rollouts": 0, "direct_success": 0})
    found = strategy.metrics()
    assert found["search/direct_rollouts"] == 0 and "search/direct_success" not in found
    strategy.requeue()
    assert not any(map(strategy.sets_aside, ("train0", "train1", "train2")))


def test_what_is_set_aside_is_passed_over_until_nothing_is_left():
    task = Scripted({})
    config = RLConfig(batch_size=2, pool=4)
    strategy = dataclasses.replace(SEARCH)
    collector = Collector(config, task, strategy, Uniform())
    epoch = [problem.uid for problem in collector.problems("train", 0, 4)]
    for uid in epoch[:3]:
        strategy._solved.visited(uid, 1.0)
    assert [problem.uid for problem in collector._draw(2)] == [epoch[3]] * 2
    assert 4 < collector.position <= 8
    strategy._solved.visited(epoch[3], 1.0)
    drawn = {problem.uid for problem in collector._draw(4)}
    assert len(drawn) >= 2 and not any(map(strategy.sets_aside, epoch)), "all were taken back"


def test_nothing_is_taken_back_while_a_problem_is_left():
    """Epochs are shuffled anew, so that its two visits may lie nearly two epochs apart."""
    for seed in range(50):
        strategy = dataclasses.replace(SEARCH)
        config = RLConfig(batch_size=1, pool=8, seed=seed)
        collector = Collector(config, Scripted({}), strategy, Uniform())
        uids = {problem.uid for problem in collector.problems("train", 0, 8)}
        for uid in uids - {"train3"}:
            strategy._solved.visited(uid, 1.0)
        assert {collector._draw(1)[0].uid for _ in range(6)} == {"train3"}


def test_a_strategy_that_takes_nothing_back_ends_the_run():
    class Never(OneResponse):
        word = "never"

        def sets_aside(self, uid: str) -> bool:
            return True

    for pool in (4, None):
        collector = Collector(RLConfig(pool=pool), Scripted({}), Never(), Uniform())
        with pytest.raises(ValueError, match="strategy never has set aside .* takes none back"):
            collector._draw(1)


def test_solutions_are_json_and_kept_once():
    [row, *_] = found("plain").rows
    kept = SolvedProblems(0.25)
    for number in range(20):
        tokens = row.tokens + number // 2 % 18
        reward = Reward(
            np.float32(1), np.bool_(True), {"first": np.int64(2)}, verdict=np.float64(1)
        )
        log_probs = row.log_probs + number  # of the policy of that time: no other answer
        changed = {"tokens": tokens, "reward": reward, "log_probs": log_probs}
        kept.visited("a", 0.0, [dataclasses.replace(row, **changed)])
    assert kept.num_solutions == 10
    other = SolvedProblems(0.25)
    other.restore(json.loads(json.dumps(kept.state)))
    [again] = other.solutions(
        0, dataclasses.replace(row.problem, uid="a"), 1, np.random.default_rng(0)
    )
    assert again.reward == Reward(1.0, True, {"first": 2.0}, verdict=1.0)


def test_a_search_keeps_the_limit_of_time(monkeypatch):
    limits = []
    begin = searching.begin_episodes

    def watched(environment, problems):
        limits.append(environment.limit_s)
        return begin(environment, problems)

    monkeypatch.setattr(searching, "begin_episodes", watched)
    strategy = dataclasses.replace(PLAY, environment_limit_s=7.0)
    search("plain", strategy, Echoes(), valid_vocab_size=ASCII)
    assert set(limits) == {7.0} and cast(Any, strategy._direct).environment_limit_s == 7.0


def test_held_out_problems_are_answered_not_searched():
    assert type(SEARCH.for_held_out) is OneResponse
    assert SEARCH.for_held_out.max_new_tokens == NEW
    turns = PLAY.for_held_out
    assert isinstance(turns, Turns) and (turns.max_turns, turns.keep_context) == (3, True)
    for one in (turns, turns.for_held_out):  # timeouts in a row are counted over the whole run
        assert one.limited(Echo) is PLAY.limited(Echo)


class KilledSearch(Scripted):
    """Dies in the middle of the searches of step 4."""

    def __init__(self, out: Path | None = None):
        super().__init__({"train0": 1.0, "train1": 0.13, "train2": 0.4, "train3": 0.2})
        self.out = out

    def score(self, completion):
        if self.out is not None and len(rewards(self.out)) == 3:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
        # The count of earlier calls is no part of a run: go by the text.
        uid = completion.problem.uid
        good = sum(completion.tokens) % 100 < 100 * self.rates.get(uid, 0.0)
        return Reward(float(good), good)

    left = 20


@pytest.mark.experiment  # test_rl_synthesis does this to a collector, without a job around it
def test_a_run_killed_in_a_search_goes_on_bit_for_bit(tmp_path: Path):
    method = "deepsearch(width=4, step_len=1, probe=2, threshold=0.5)"
    slow = OptimizerConfig(learning_rate=1e-4, warmup=0.0)
    changes = {"num_generations": 4, "max_new_tokens": 3, "optimizer": slow}
    whole, killed = job(tmp_path / "whole", method, KilledSearch(), **changes), tmp_path / "killed"
    final = train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(job(killed, method, KilledSearch(killed), **changes))
    assert len(rewards(killed)) == 3
    again = job(killed, method, KilledSearch(), **changes)
    assert train(again) == final and timeless(killed) == timeless(tmp_path / "whole")
    first, second = (made.collector.strategy for made in (whole, again))
    assert first.state == second.state and first.state["hard"]
    ours, theirs = (load_params(folder)[1] for folder in (killed, tmp_path / "whole"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    lines = [line for line in timeless(killed) if "reward" in line]
    assert max(line["search/trees"] for line in lines[3:]) > 0
    assert max(line["search/replayed"] for line in lines[1:]) > 0
    assert lines[-1]["search/aside"] > 0


def test_a_tree_is_exported_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    out = tmp_path / "trees.jsonl"
    out.write_text('{"seed": [7, 0]}\n{"seed": [7, 1], "no')  # of a run that was killed
    made = search(
        "plain", dataclasses.replace(SEARCH, export="~/trees.jsonl"), valid_vocab_size=ASCII
    )
    before, tree = [json.loads(line) for line in out.read_text().splitlines()]
    assert before == {"seed": [7, 0]}
    nodes = tree["nodes"]
    assert (tree["uid"], tree["seed"]) == ("train0", [7, 1])
    outputs = sorted((n for n in nodes if n["output"] is not None), key=lambda n: n["output"])
    rows = [row for row in made.rows if row.group == 0]
    for end, row in zip(outputs, rows, strict=True):
        text, at = "", end
        while at["parent"] is not None:
            text, at = at["text"] + text, nodes[at["parent"]]
        assert text == SPEECH.lm.tokenizer.decode(row.tokens[row.trained].tolist())
        assert end["outcome"] == end["bounded"] == (1 if row.reward.success else -1)
    frontier = [n for n in nodes if n["score"] is not None]
    assert frontier and all(n["outcome"] is None for n in frontier)
    figure = draw_tree(tree)
    points = sum(len(marks.get_offsets()) for marks in figure.axes[0].collections)
    assert points == len(nodes) and len(figure.axes[0].lines) == len(nodes) - 1


def strategy_of(**changes) -> Any:
    config = RLConfig(**{"method": "deepsearch", "max_new_tokens": 8} | changes)
    return strategy_for(config, Echo if config.task == "echo" else Vowels(), SPEECH)


Echo = Echoes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "deepsearch(step_len=9)"}, "step_len=9 is longer than a response, max_new_tok"),
        ({"method": "deepsearch(step_len=0)"}, "step_len=0: choose 1 or more"),
        ({"method": "deepsearch(probe=-1)"}, "probe=-1: choose 0 or more"),
        ({"method": "deepsearch(threshold=1.0)"}, "threshold=1.0: choose a success rate from 0"),
        ({"method": "deepsearch(cache_mib=0)"}, "cache_mib=0"),
        ({"method": "deepsearch(max_observation=10001)"}, "max_observation=10001: choose 10000 or"),
        (
            {"method": "deepsearch(importance_cap=2.0)"},
            "(importance_cap), and strategy tree_search trains on solutions of earlier policies",
        ),
        (
            {"method": "deepsearch(max_turns=3)"},
            "max_turns=3 is for environments, vowels is a task",
        ),
        (
            {"method": "deepsearch(max_observation=9)"},
            "max_observation=9 is for environments, vowels is a task",
        ),
        ({"method": "deepsearch(one_sided='drop')"}, "write deepsearch(clip_low=0.2"),
        (
            {"method": "deepsearch(step_len=2)", "task": "echo"},
            "step_len=2 is for tasks of one response, in echo a node is a turn",
        ),
        (
            {"method": "deepsearch(width=4)", "strategy": "one_response"},
            "width=4 of method deepsearch is of its strategy, which strategy one_response",
        ),
    ],
)
def test_mistakes_are_one_line(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        strategy_of(**changes)
    assert "\n" not in str(error.value)


def test_a_cache_that_holds_nothing_or_is_another_models_is_refused():
    with pytest.raises(ValueError, match=r"cache_mib=0.001 holds no prefix: 1 of \d+ tokens take"):
        search("plain", dataclasses.replace(SEARCH, cache_mib=0.001))
    state = SEARCH.state | {"tokenizer": 1}
    with pytest.raises(ValueError, match="are of another model's tokenizer .00000001, this one is"):
        dataclasses.replace(SEARCH).restore(state)


def test_the_published_numbers_are_the_defaults():
    method = cast(Any, RLConfig(method="deepsearch", max_new_tokens=16384))
    strategy = method.parts.strategy
    assert (strategy.width, strategy.exploration) == (8, 2.0)
    assert (strategy.value_weight, strategy.entropy_weight, strategy.depth_weight) == (0.4, 0, 0.01)
    assert (strategy.probe, strategy.threshold, strategy.value_temperature) == (4, 0.25, 1.0)
    assert dataclasses.replace(strategy, max_new_tokens=16384).limits.step_len == 256
    assert dataclasses.replace(strategy, max_new_tokens=16384).limits.max_depth == 64
    loss = method.parts.loss
    assert (loss.clip_low, loss.clip_high, loss.dual_clip) == (0.2, 0.28, 10.0)
    assert (loss.aggregate, loss.kl, method.num_generations) == ("token", 0, 8)

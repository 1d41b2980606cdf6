"""Many environments at once: slow, hanging and failing ones, what follows an episode's end."""

import dataclasses
import itertools
import threading
import time
from typing import Any

import numpy as np
import pytest

from train.rl.environments.players import completion_of
from train.rl.environments.stepping import StepPool, TimedOut, TimeLimited, counted_step
from train.rl.environments.vector import VectorEnvironment
from train.rl.named_tasks import make_task
from train.rl.types import Problem, Turn

GUESS: Any = make_task("guess_number", 0)


@dataclasses.dataclass(frozen=True)
class Counting:
    """Episodes of as many turns as the problem says; `before` is called in front of each step."""

    before: Any = lambda problem: None
    reward: float = 0.5
    name = "counting"
    sizes = {"train": None, "test": None}

    def problem(self, split, index):
        return Problem(f"{index}", f"{split} {index}", 1 + index % 3)

    def reset(self, problem):
        return problem.answer

    def step(self, state, action):
        self.before(action.problem)
        return Turn(state - 1, f"saw {action.text}", self.reward, state == 1, success=state == 1)


def numbers(slot: int, count: int, seed: int = 0) -> list[int]:
    """Problems of a slot, whatever the others do."""
    rng = np.random.default_rng([seed, slot])
    return [int(rng.integers(2**31)) for _ in range(count)]


@pytest.mark.parametrize("mode", ["next_step", "same_step", "disabled"])
def test_an_episode_ends_with_its_last_observation(mode):
    """In each mode; problems are those of the slot's own generator."""
    vector = VectorEnvironment([Counting()] * 3, autoreset=mode)
    expected = {slot: numbers(slot, 20) for slot in range(3)}
    shown = vector.reset()
    assert shown == {slot: f"train {expected[slot][0]}" for slot in range(3)}
    finished: dict[int, list] = {slot: [] for slot in range(3)}
    for round_ in range(9):
        steps = vector.step([f"a{round_}"] * 3)
        for slot, step in steps.items():
            begun = f"train {expected[slot][len(finished[slot]) + bool(step.finished)]}"
            if step.finished is None:
                assert not step.terminated
                assert step.observation == (begun if step.fresh else f"saw a{round_}")
                # The action in front of a new episode is not looked at, and pays nothing.
                assert step.reward == (0 if step.fresh else 0.5)
                continue
            finished[slot].append(step.finished)
            assert step.terminated and step.success and step.reward == 0.5
            assert step.finished.observation == f"saw a{round_}"
            assert step.observation == (begun if mode == "same_step" else f"saw a{round_}")
            assert step.fresh == (mode == "same_step")
            if mode == "disabled":
                with pytest.raises(ValueError, match=f"slot {slot} has no episode that goes on"):
                    vector.send({slot: "more"})
                assert vector.reset([slot]) == {slot: begun}
    for slot, episodes in finished.items():
        assert [int(e.problem.uid) for e in episodes] == expected[slot][: len(episodes)]
        assert len(episodes) >= 2
        for episode in episodes:
            assert episode.turns == episode.problem.answer
            assert (episode.reward, episode.success) == (0.5 * episode.turns, True)
    vector.close()


def test_a_slow_environment_does_not_hold_up_the_others():
    gate = threading.Event()
    slow = Counting(before=lambda problem: gate.wait(20))
    vector = VectorEnvironment([slow, Counting(), Counting()], autoreset="same_step")
    vector.reset()
    vector.send({slot: "go" for slot in range(3)})
    rounds = 0
    while rounds < 40:  # all while slot 0 takes its one step
        for slot in vector.receive():
            assert slot != 0
            vector.send({slot: "go"})
            rounds += 1
    with pytest.raises(ValueError, match="slot 0 is still stepping"):
        vector.send({0: "more"})
    gate.set()
    found: dict[int, Any] = {}
    while 0 not in found:
        found |= vector.receive()
    assert found[0].reward == 0.5 and not vector.counts.total()
    assert vector.receive(5).keys() | found.keys() == {0, 1, 2}
    assert vector.receive() == {}
    vector.close()


def test_the_speed_of_the_others_changes_nothing():
    def texts(delays) -> list:
        slots = [Counting(before=lambda p, s=s: time.sleep(s)) for s in delays]
        vector = VectorEnvironment(slots, autoreset="same_step", seed=3, threads=2)
        vector.reset()
        found = [vector.step(["x"] * 3) for _ in range(5)]
        vector.close()
        return found

    assert texts((0, 0, 0)) == texts((0.01, 0, 0.002))


def test_a_hanging_environment_is_cut_and_counted():
    """On one thread: it is replaced, so the next slot steps."""
    gate = threading.Event()

    def hang(problem):
        gate.wait(20)

    vector = VectorEnvironment(
        [Counting(before=hang), Counting()], autoreset="next_step", threads=1, limit_s=0.1
    )
    vector.reset()
    begin = time.monotonic()
    steps = vector.step(["go", "go"])
    assert time.monotonic() - begin < 5
    cut = steps[0]
    assert cut.terminated and not cut.success and cut.reward == 0 and cut.info == {"timeouts": 1}
    assert cut.finished is not None and cut.finished.turns == 1
    assert steps[1].observation == "saw go" and vector.counts == {"timeouts": 1}
    again = vector.step({0: "not looked at"})[0]
    assert again.fresh and again.observation == f"train {numbers(0, 2)[1]}"
    gate.set()
    vector.close()


def test_a_step_that_fails_is_counted_and_nothing_is_lost():
    def fail(problem):
        raise RuntimeError("broken")

    slots = [Counting(before=fail), Counting(reward=float("nan")), Counting()]
    vector = VectorEnvironment(slots, autoreset="same_step")
    shown = vector.reset()
    for round_ in range(3):
        steps = vector.step({0: "a", 1: "b", 2: "c"})
        for slot, counter in ((0, "scorer_errors"), (1, "invalid_turns")):
            step = steps[slot]
            assert step.info == {counter: 1} and step.reward == 0 and not step.success
            assert step.finished is not None and step.finished.info == {counter: 1}
            assert step.finished.problem.prompt == shown[slot] and step.fresh
            shown[slot] = step.observation
        assert vector.counts == {"scorer_errors": round_ + 1, "invalid_turns": round_ + 1}
        assert steps[2].reward == 0.5
    vector.close()


def test_a_reset_that_fails_is_tried_again_and_then_one_line():
    calls = itertools.count()

    @dataclasses.dataclass(frozen=True)
    class Rare(Counting):
        fails: int = 2

        def reset(self, problem):
            if next(calls) < self.fails:
                raise RuntimeError("no\nlevel")
            return super().reset(problem)

    vector = VectorEnvironment([Rare()])
    assert vector.reset() == {0: f"train {numbers(0, 3)[2]}"}
    assert vector.counts == {"reset_failures": 2}
    calls = itertools.count()
    vector = VectorEnvironment([Rare(fails=9)])
    with pytest.raises(ValueError, match="no episode of 3 problems, the last time: Runtime"):
        vector.reset()
    with pytest.raises(ValueError, match="slot 0 has no episode that goes on: reset it first"):
        vector.send({0: "x"})


def test_mistakes_are_one_line():
    with pytest.raises(ValueError, match="no environment is given"):
        VectorEnvironment([])
    mode: Any = "later"
    with pytest.raises(ValueError, match="autoreset='later': choose one of next_step, same_step"):
        VectorEnvironment([GUESS], autoreset=mode)
    with pytest.raises(ValueError, match="threads=0: choose 1 or more"):
        StepPool(0)
    with pytest.raises(ValueError, match="limit_s=0: choose a number of seconds above 0"):
        StepPool(1, 0)
    vector = VectorEnvironment([GUESS, GUESS])
    with pytest.raises(ValueError, match="1 actions for 2 slots"):
        vector.step(["5"])
    vector.close()


def test_a_pool_gives_outcomes_as_they_come():
    pool, gate = StepPool(2, limit_s=0.2), threading.Event()
    pool.submit("slow", lambda: gate.wait(20))
    pool.submit("quick", lambda: 7)
    assert pool.ready() == [("quick", 7)]
    [(key, outcome)] = pool.ready(5)
    assert key == "slow" and isinstance(outcome, TimedOut) and pool.hung == 1
    gate.set()
    assert pool.ready() == []
    pool.close()


def test_all_episodes_of_some_problems_favour_no_length():
    """Those that have ended after some time do: short ones come more often."""
    vector = VectorEnvironment([Counting()] * 200, autoreset="same_step", seed=1)
    vector.reset()
    first: dict[int, int] = {}
    early = []
    for _ in range(3):
        for slot, step in vector.step(["x"] * 200).items():
            if step.finished:
                early.append(step.finished.turns)
                first.setdefault(slot, step.finished.turns)
    vector.close()
    drawn = [1 + numbers(slot, 1, 1)[0] % 3 for slot in range(200)]
    assert [first[slot] for slot in range(200)] == drawn
    assert np.mean(early) < 1.9 < np.mean(drawn)


def test_a_strategy_that_steps_in_order_is_held_up_no_longer():
    gate = threading.Event()
    slow = TimeLimited(Counting(before=lambda problem: gate.wait(20)), limit_s=0.1)
    problem = slow.problem("train", 1)
    turn = slow.step(slow.reset(problem), completion_of(problem, "go"))
    gate.set()
    assert (turn.info, turn.terminated, turn.success) == ({"timeouts": 1}, True, False)
    limited = TimeLimited(GUESS)
    problem = Problem("p", "1-10? ", 5)
    action = completion_of(problem, "4")
    assert limited.step(limited.reset(problem), action) == GUESS.step(GUESS.reset(problem), action)
    assert (limited.name, limited.sizes, limited.max_turns) == (GUESS.name, GUESS.sizes, 8)
    odd = Counting(reward=float("inf"))
    assert counted_step(odd, problem, 1, action).info == {"invalid_turns": 1}

"""Many environments at once: slow, hanging and failing ones, what follows an episode's end."""

import contextvars
import dataclasses
import gc
import itertools
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from train.rl.environments.players import completion_of
from train.rl.environments.stepping import (
    PoolClosed,
    StepPool,
    TimedOut,
    TimeLimited,
    TimeLimits,
    counted_step,
)
from train.rl.environments.vector import VectorEnvironment
from train.rl.named_tasks import make_task
from train.rl.scoring import safe_step
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


@dataclasses.dataclass(frozen=True)
class Rare(Counting):
    """Resets fail as often as the iterator says."""

    fails: Any = dataclasses.field(default_factory=lambda: iter([]))

    def reset(self, problem):
        if next(self.fails, False):
            raise RuntimeError("no\nlevel")
        return super().reset(problem)


def test_a_reset_that_fails_is_tried_again_and_then_one_line():
    vector = VectorEnvironment([Rare(fails=iter([True] * 2))])
    assert vector.reset() == {0: f"train {numbers(0, 3)[2]}"}
    assert vector.counts == {"reset_failures": 2}
    vector = VectorEnvironment([Rare(fails=iter([True] * 5))])
    with pytest.raises(ValueError, match="no episode of 3 problems, the last time: Runtime"):
        vector.reset()
    with pytest.raises(ValueError, match="slot 0 has no episode that goes on: reset it first"):
        vector.send({0: "x"})
    assert vector.reset() == {0: f"train {numbers(0, 6)[5]}"}


def test_a_slot_that_cannot_begin_is_known_at_once_and_can_begin_anew():
    """Whatever others still do."""
    gate, begin = threading.Event(), time.monotonic()
    fails = iter([False, True, True, True])
    slots = [OneStep(fails=fails), OneStep(before=lambda problem: gate.wait(20))]
    for mode in ("next_step", "same_step"):
        vector = VectorEnvironment(slots, autoreset=mode)
        vector.reset()
        vector.send({0: "go", 1: "go"})
        assert vector.receive().keys() == {0}
        if mode == "next_step":
            vector.send({0: "not looked at"})
            with pytest.raises(ValueError, match="began no episode"):
                vector.receive(2)
            fails = iter([False, True, True, True])
            slots[0] = OneStep(fails=fails)
        assert vector.reset([0]).keys() == {0}
        assert vector.step({0: "go"})[0].finished
        vector.close()
    assert time.monotonic() - begin < 15, "before the other slot"
    gate.set()


class OneStep(Rare):
    """Every step ends its episode."""

    def problem(self, split, index):
        return Problem(f"{index}", f"{split} {index}", 1)


@pytest.mark.parametrize("mode", ["next_step", "same_step", "disabled"])
def test_a_slot_that_cannot_begin_takes_nothing_from_the_others(mode):
    """Outcomes that come with its failure are given; so is the turn that ended its last episode."""
    failing = OneStep(fails=itertools.chain([False], itertools.repeat(True)))
    vector = VectorEnvironment([failing, OneStep(), OneStep()], autoreset=mode)
    vector.reset()
    vector.send(dict.fromkeys(range(3), "go"))
    time.sleep(0.05)  # all outcomes come at once
    steps = vector.receive(3)
    for slot, step in steps.items():
        assert step.finished is not None and step.finished.observation == "saw go"
        assert step.fresh == (mode == "same_step" and slot > 0)
    if mode == "next_step":
        vector.send(dict.fromkeys(range(3), "not looked at"))
        time.sleep(0.05)
    with pytest.raises(ValueError, match="counting began no episode of 3 problems"):
        if mode == "same_step":
            vector.send({1: "no slot acts"})
        elif mode == "next_step":
            vector.receive(3)
        else:
            vector.reset()
    if mode != "same_step":
        assert all(step.fresh for step in vector.receive(2).values())
    assert vector.receive() == {}, "nothing is waited for"
    if mode != "next_step":
        with pytest.raises(ValueError, match="slot 0 has no episode that goes on"):
            vector.send({1: "x", 0: "x"})
    assert vector.step({1: "y"})[1].observation.endswith("saw y" if mode != "same_step" else "")
    assert vector.counts == {"reset_failures": 3}
    vector.close()


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
    with pytest.raises(ValueError, match="threads=0: choose 1 or more"):
        VectorEnvironment([GUESS], threads=0)
    split: Any = "dev"
    with pytest.raises(ValueError, match="guess_number has no problems of the split 'dev'"):
        VectorEnvironment([GUESS], split=split)
    vector = VectorEnvironment([Counting(), Counting()])
    vector.reset()
    for actions, words in (
        (["5"], "1 actions for 2 slots"),
        ("55", "one text for 2 slots"),
        ({0: "5", -1: "5"}, "slot -1: choose from 0 to 1"),
        ({0: "5", 2: "5"}, "slot 2: choose from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=words):
            vector.step(actions)
    for slots, words in (([0, 2], "slot 2: choose from 0 to 1"), ([0, 0], "slot 0 is given twice")):
        with pytest.raises(ValueError, match=words):
            vector.reset(slots)
    assert vector.receive() == {}, "no slot of these has acted"
    assert vector.reset() == {slot: f"train {numbers(slot, 2)[1]}" for slot in range(2)}
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


def steppers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "environment steps"}


def wait_until(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


@pytest.mark.usefixtures("few_objects")
def test_threads_start_with_calls_and_end_with_their_pool():
    before = steppers()
    pool, limited = StepPool(4), TimeLimited(GUESS)
    vector = VectorEnvironment([GUESS] * 5, autoreset="same_step")
    assert steppers() <= before, "no call, no thread"
    pool.submit(0, lambda: 1)
    assert len(steppers() - before) == 1 and pool.ready() == [(0, 1)]
    problem = GUESS.problem("train", 0)
    limited.step(limited.reset(problem), completion_of(problem, "5"))
    TimeLimited(Stuck(at="error")).reset(problem)  # its error has frames, which have the pool
    vector.reset()
    vector.step(["5"] * 5)
    assert steppers() - before
    del pool, limited, vector
    gc.collect()
    assert wait_until(lambda: steppers() <= before), "all without close"


def test_calls_of_a_closed_pool_are_refused_and_those_that_wait_end():
    gate = threading.Event()
    pool = StepPool(1)
    pool.submit("runs", lambda: gate.wait(20))
    pool.submit("waits", lambda: 7)
    assert wait_until(lambda: len(pool._workers.running) == 1)
    pool.close()
    [(key, outcome)] = pool.ready()
    assert key == "waits" and isinstance(outcome, PoolClosed)
    for use in (lambda: pool.submit(0, int), lambda: pool.call(int)):
        with pytest.raises(ValueError, match="the pool is closed and runs no more calls"):
            use()
    gate.set()
    assert pool.ready() == [("runs", True)] and pool.closed

    gate.clear()
    vector = VectorEnvironment([Counting(before=lambda p: gate.wait(20)), Counting()], threads=1)
    vector.reset()
    vector.send({0: "go", 1: "go"})
    assert wait_until(lambda: len(vector._pool._workers.running) == 1)
    vector.close()
    with pytest.raises(ValueError, match="the pool is closed"):
        vector.receive()
    for use in (lambda: vector.send({1: "go"}), vector.reset):
        with pytest.raises(ValueError, match="these environments are closed"):
            use()
    gate.set()
    assert vector.receive()[0].observation == "saw go" and vector.receive() == {}


def test_each_of_two_threads_gets_the_turns_of_its_own_episode():
    task, wrong = TimeLimited(Counting(before=lambda problem: time.sleep(0.001))), []

    def play(number: int) -> None:
        problem = Problem(f"{number}", "", 40)
        state = task.reset(problem)
        for turn in range(40):
            text = f"{number} {turn}"
            found = task.step(state, completion_of(problem, text))
            state = found.state
            if found.observation != f"saw {text}" or state != 39 - turn:
                wrong.append(found)

    threads = [threading.Thread(target=play, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    with pytest.raises(KeyError):
        StepPool(1).call(lambda: {}["none"])


@dataclasses.dataclass(frozen=True)
class OneAtATime(Counting):
    """Steps that must not run beside each other."""

    lock: Any = dataclasses.field(default_factory=threading.Lock)
    serial = True

    def step(self, state, action):
        with self.lock:
            time.sleep(0.1)
            return super().step(state, action)


def test_waiting_for_another_serial_environment_is_no_time_of_its_own():
    """Nor does an environment that is not serial wait for one that is."""
    quick = Counting()
    vector = VectorEnvironment([TimeLimited(OneAtATime()), *[OneAtATime()] * 4, quick], limit_s=0.3)
    vector.reset()
    vector.send({slot: "go" for slot in range(6)})
    assert vector.receive().keys() == {5}
    steps = vector.receive(5)
    vector.close()
    assert steps.keys() == {0, 1, 2, 3, 4} and not vector.counts
    assert all(step.observation == "saw go" for step in steps.values())


def test_a_failure_says_why():
    gate = threading.Event()

    def fail(problem):
        raise RuntimeError("broken")

    slots = [Counting(before=fail), Counting(reward=float("nan")),
             Counting(before=lambda problem: gate.wait(20))]  # fmt: skip
    vector = VectorEnvironment(slots, limit_s=0.1)
    vector.reset()
    steps = vector.step(["go"] * 3)
    gate.set()
    errors = [step.finished.error for step in steps.values() if step.finished]
    assert errors[0].endswith("RuntimeError: broken\n") and "Traceback" in errors[0]
    assert "the reward nan" in errors[1] and errors[2] == "no result after 0.1 seconds"
    vector.close()


@dataclasses.dataclass(frozen=True)
class Stuck(Counting):
    """It hangs where it is told to, and pays -1 for a failure."""

    at: str = "reset"
    gate: Any = dataclasses.field(default_factory=threading.Event)
    failure_value = -1.0

    def problem(self, split, index):
        return self._maybe("problem") or super().problem(split, index)

    def reset(self, problem):
        return self._maybe("reset") or super().reset(problem)

    def step(self, state, action):
        return self._maybe("step") or super().step(state, action)

    def _maybe(self, where: str) -> Any:
        if self.at == "error":
            raise RuntimeError("no level")
        return self.at == where and self.gate.wait(20) and None


@pytest.mark.parametrize(
    ("at", "counter", "reason"),
    [("reset", "timeouts", "no result after 0.05 seconds"), ("error", "scorer_errors", "no level")],
)
def test_a_reset_that_fails_in_order_is_counted_by_the_first_step(at, counter, reason):
    inner = Stuck(at=at)
    task, problem = TimeLimited(inner, 0.05), Problem("p", "", 2)
    turn = task.step(task.reset(problem), completion_of(problem, "go"))
    assert (turn.info, turn.reward, turn.terminated) == ({counter: 1}, -1, True)
    assert reason in turn.error
    with pytest.raises(ValueError, match="the episode is over"):
        task.step(turn.state, completion_of(problem, "go"))
    inner.gate.set()


def test_an_environment_that_hangs_again_and_again_is_named():
    inner = Stuck(at="step")
    task, problem = TimeLimited(inner, 0.01), Problem("p", "", 2)
    for _ in range(8):
        task.raise_if_hanging()
        task.step(task.reset(problem), completion_of(problem, "go"))
    with pytest.raises(ValueError, match="counting hangs: 8 calls in a row gave no result after 0"):
        task.raise_if_hanging()
    inner.gate.set()
    wait_until(lambda: task.step(2, completion_of(problem, "go")).info == {})
    task.raise_if_hanging()
    task = TimeLimited(Stuck(at="reset", gate=(gate := threading.Event())), 0.01)
    for _ in range(8):
        task.reset(problem)
    with pytest.raises(ValueError, match="8 calls in a row"):
        task.raise_if_hanging()
    gate.set()
    stuck = Stuck(at="problem")
    with pytest.raises(ValueError, match="problem 3 of test: no result after 0.01 s.*a larger"):
        TimeLimited(stuck, 0.01).problem("test", 3)
    stuck.gate.set()
    endless = TimeLimited(Counting(before=lambda problem: time.sleep(0.02)), float("inf"))
    assert endless.step(2, completion_of(problem, "go")).reward == 0.5
    main = TimeLimited(Counting(before=lambda p: seen.append(threading.current_thread())), None)
    seen: list[threading.Thread] = []
    main.step(2, completion_of(problem, "go"))
    assert seen == [threading.main_thread()]


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


def test_what_an_environment_calls_timeouts_is_no_hang():
    """Numbers of its own, zero or not; a grader that calls `sys.exit` is a counted failure."""

    class Own(Counting):
        def step(self, state, action):
            return dataclasses.replace(super().step(state, action), info={"timeouts": 2.0})

    class Exits(Counting):
        def step(self, state, action):
            sys.exit(3)

    class ExitsAtOnce(Counting):
        def reset(self, problem):
            sys.exit(3)

    own = TimeLimited(Own(), 5.0)
    problem = own.problem("train", 3)
    for _ in range(10):
        own.step(own.reset(problem), completion_of(problem, "go"))
    own.raise_if_hanging()
    for environment, limit in itertools.product((Exits(), ExitsAtOnce()), (5.0, None)):
        exits = TimeLimited(environment, limit)
        turn = safe_step(exits, problem, exits.reset(problem), completion_of(problem, "go"))
        assert turn.info == {"scorer_errors": 1} and "sys.exit(3)" in turn.error


def test_calls_run_in_the_callers_context():
    seen, variable = [], contextvars.ContextVar("variable", default="another")
    variable.set("the caller's")
    StepPool(1).call(lambda: seen.append(variable.get()))
    assert seen == ["the caller's"]


class Says:
    """An environment that fails in what it says of itself, or shows numbers."""

    name, sizes = "says", {"train": None, "test": None}

    def __init__(self, observation: Any = "", reward: Any = 0.0, failure_value: Any = 0.0):
        self.observation, self.reward, self.failure_value = observation, reward, failure_value

    def problem(self, split, index):
        return Problem(f"{index}", "", None)

    def reset(self, problem):
        return None

    def step(self, state, action):
        if action.text == "raise":
            raise OSError("gone")
        return Turn(state, self.observation, self.reward, False)


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (Says(observation=7), "an observation of the type int: observations are texts"),
        (Says(reward=1e19), "the reward 1e.19: rewards are at most 1e.18 in size"),
        (Says(reward=np.float32("nan")), "finite numbers"),
    ],
)
def test_a_turn_that_cannot_be_learned_from_is_counted(says, words):
    problem = says.problem("train", 0)
    turn = counted_step(says, problem, None, completion_of(problem, "x"))
    assert turn.terminated and turn.info == {"invalid_turns": 1.0}
    assert re.search(words, turn.error), turn.error


def test_a_slot_whose_environment_fails_in_its_own_failure_is_told_and_others_go_on():
    with VectorEnvironment([Says(failure_value="lost"), Says(reward=np.float32(0.5))]) as vector:
        vector.reset()
        with pytest.raises(ValueError, match="Says: ValueError: could not convert string"):
            vector.step(["raise", "go"])
        assert vector.receive()[1].reward == 0.5
        assert vector.reset([0]) == {0: ""}  # no slot waits for ever


def test_what_hangs_counts_over_all_steps_of_a_run():
    ended = threading.Event()
    environment: Any = Counting(before=lambda problem: ended.wait(30) if problem.answer > 1 else 0)
    limits = TimeLimits(0.02)
    limited = limits.of(environment)
    assert limits.of(environment) is limited and limits.of(Counting()) is not limited
    slow, quick = (limited.problem("train", index) for index in (1, 0))
    for _ in range(64):
        limited.raise_if_hanging()
        limited.step(2, completion_of(slow, "x"))
        limited.step(1, completion_of(quick, "x"))
    with pytest.raises(ValueError, match="hangs: 64 calls were cut and have not ended since"):
        limited.raise_if_hanging()
    ended.set()
    deadline = time.monotonic() + 30
    while limited.__dict__["_pool"].hanging and time.monotonic() < deadline:
        time.sleep(0.01)
    limited.raise_if_hanging()

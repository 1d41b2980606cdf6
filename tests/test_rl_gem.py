"""Environments of gem-llm through their adapter: with a stand-in, and with the package itself.

The six traps of the package are each reproduced with it and shown to be none of the adapter's.
`pip install "thoughtbubbles[gem]"` brings the package, which pins another version of reasoning-gym
than `pip install reasoning-gym` brings: each has an environment of its own.
"""

import itertools
import logging
import random
import sys
import threading
import time
import warnings
from typing import Any

import fake_gem
import numpy as np
import pytest

from train.rl.environments import gem_adapter
from train.rl.environments.gem_adapter import Gem
from train.rl.environments.players import completion_of, play_episode
from train.rl.environments.tools import CalculatorTool, ToolEnvironment
from train.rl.environments.vector import VectorEnvironment
from train.rl.named_tasks import make_task
from train.rl.types import Problem


@pytest.fixture
def stand_in(monkeypatch) -> Gem:
    monkeypatch.setitem(sys.modules, "gem", fake_gem)
    return Gem(id="guess")


@pytest.fixture(scope="module")
def package() -> Any:
    with warnings.catch_warnings(action="ignore"):  # of packages that it imports
        return pytest.importorskip("gem")


def randomness() -> Any:
    numpy: Any = np.random.get_state()
    return random.getstate(), numpy[1].tolist()


def act(task: Any, problem: Problem, texts: list[str]) -> list[Any]:
    state, turns = task.reset(problem), []
    for text in texts:
        turns.append(task.step(state, completion_of(problem, text)))
        state = turns[-1].state
    return turns


def test_states_are_branched_from(stand_in):
    """The package's object goes on from the newest state; an earlier one is played again."""
    problem = stand_in.problem("train", 0)
    assert problem.prompt.startswith("Guess 1-50, luck ") and "Your guess?" in problem.prompt
    texts = ["1", "2", "3"]
    turns = act(stand_in, problem, texts)
    assert [turn.observation for turn in turns] == ["higher\nYour guess?\n"] * 2 + ["Too late."]
    assert turns[-1].truncated and not turns[-1].success and 0 < turns[-1].reward < 1
    again = stand_in.step(turns[0].state, completion_of(problem, "2"))
    assert again == turns[1] and act(stand_in, problem, texts) == turns
    other = stand_in.step(turns[0].state, completion_of(problem, "50"))
    assert other.state.actions == ("1", "50") and other.info == turns[1].info
    assert set(other.info) == {"luck"}, "numbers that are finite"
    with pytest.raises(ValueError, match="the episode is over"):
        stand_in.step(turns[-1].state, completion_of(problem, "4"))
    assert stand_in.max_turns == 3 and Gem(id="guess", options={"max_turns": 5}).max_turns == 5


def test_interleaved_episodes_draw_from_generators_of_their_own(stand_in):
    problems = [stand_in.problem("train", index) for index in range(3)]
    alone = [act(stand_in, problem, ["1", "2"]) for problem in problems]
    random.seed(5)
    before = randomness()
    states = [stand_in.reset(problem) for problem in problems]
    for turn in range(2):
        for index, problem in enumerate(problems):
            step = stand_in.step(states[index], completion_of(problem, "12"[turn]))
            assert step == alone[index][turn]
            states[index] = step.state
    assert randomness() == before
    assert len({turns[0].info["luck"] for turns in alone}) > 1


def test_a_step_of_the_package_that_raises_is_a_counted_failure(stand_in):
    problem = stand_in.problem("test", 0)
    [turn] = act(stand_in, problem, ["nan"])
    assert (turn.terminated, turn.success, turn.reward) == (True, False, 0)
    assert turn.info == {"scorer_errors": 1} and turn.state.over
    assert "ValueError: invalid literal for int()" in turn.error


def test_a_step_of_the_package_that_hangs_is_cut(stand_in, monkeypatch):
    """The next episode goes on, with its own generators."""
    task, gate = Gem(id="guess", limit_s=0.1), threading.Event()
    first, second = (task.problem("train", index) for index in range(2))
    expected = act(stand_in, second, ["1"])
    step = fake_gem.Guess.step
    monkeypatch.setattr(fake_gem.Guess, "step", lambda self, action: gate.wait(20))
    random.seed(5)
    before = randomness()
    [turn] = act(task, first, ["1"])
    assert (turn.info, turn.terminated, turn.success) == ({"timeouts": 1}, True, False)
    monkeypatch.setattr(fake_gem.Guess, "step", step)
    assert act(task, second, ["1"]) == expected and randomness() == before
    gate.set()
    assert act(Gem(id="guess", limit_s=None), second, ["1"]) == expected


def test_an_earlier_state_is_played_again_within_the_limit(stand_in, monkeypatch):
    """A replay that hangs or raises is a counted failure, as the step itself would be."""
    task, gate = Gem(id="guess", limit_s=0.1), threading.Event()
    problem = task.problem("train", 0)
    [turn] = act(task, problem, ["1"])
    step = fake_gem.Guess.step

    def hang(self, action):
        return gate.wait(20) if action == "1" else step(self, action)

    def fail(self, action):
        return 1 / 0 if action == "1" else step(self, action)

    for replayed, counter, reason in (
        (hang, "timeouts", "no result after 0.1 seconds"),
        (fail, "scorer_errors", "ZeroDivisionError: division by zero\n"),
    ):
        task.__dict__["_live"].clear()
        monkeypatch.setattr(fake_gem.Guess, "step", replayed)
        failed = task.step(turn.state, completion_of(problem, "2"))
        assert failed.info == {counter: 1} and failed.state.over
        assert failed.state.actions == ("1", "2") and failed.error.endswith(reason)
    gate.set()


def test_a_reset_of_the_package_that_hangs_or_raises_is_one_line(stand_in, monkeypatch):
    task, gate = Gem(id="guess", limit_s=0.1), threading.Event()

    def fail(self, seed=None):
        raise RuntimeError("no\nlevel")

    for reset, words in (
        (lambda self, seed=None: gate.wait(20), "no result after 0.1 seconds: choose a larger lim"),
        (fail, "no level$"),
    ):
        monkeypatch.setattr(fake_gem.Guess, "reset", reset)
        with pytest.raises(ValueError, match=rf"no episode began from seed \d+: {words}"):
            task.problem("train", 0)
    gate.set()


def test_the_number_of_turns_is_the_greatest_of_eight_seeds(stand_in, monkeypatch):
    """However long they take to be made."""
    made: list[Any] = []

    def make(id, **options):
        time.sleep(0.01)
        made.append(fake_gem.Guess(max_turns=3 + len(made)))
        made[-1]._is_random = True
        return made[-1]

    monkeypatch.setattr(fake_gem, "make", make)
    assert Gem(id="guess").max_turns == 10 and len(made) == 8


def test_waiting_for_the_generators_of_the_process_is_no_time_of_a_step(stand_in, monkeypatch):
    step = fake_gem.Guess.step

    def slow(self, action):
        time.sleep(0.12)
        return step(self, action)

    monkeypatch.setattr(fake_gem.Guess, "step", slow)
    vector = VectorEnvironment([stand_in] * 6, limit_s=0.5)
    vector.reset()
    vector.step(["1"] * 6)
    vector.close()
    assert not vector.counts


def test_a_call_without_a_limit_that_hangs_holds_up_nobody_for_ever(monkeypatch):
    monkeypatch.setitem(sys.modules, "gem", fake_gem)
    endless = Gem(id="guess", limit_s=None)
    problem, began, ends = endless.problem("train", 0), threading.Event(), threading.Event()
    monkeypatch.setattr(gem_adapter, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(
        fake_gem.Guess, "step", lambda self, action: (began.set(), ends.wait(60)) and 1 / 0
    )
    hanging = threading.Thread(target=act, args=(endless, problem, ["1"]))
    hanging.start()
    began.wait(60)
    try:
        [turn] = act(endless, problem, ["1"])
        assert turn.terminated and "earlier call of gem-llm has not ended in 0.05 s" in turn.error
        with pytest.raises(ValueError, match="one at a time may run: choose a limit_s"):
            endless.problem("train", 1)
    finally:
        ends.set()
        hanging.join()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "gem", fake_gem)
    assert not act(endless, problem, ["1"])[0].error


def test_episodes_on_threads_are_those_of_one(stand_in):
    def played(threads: int) -> list:
        vector = VectorEnvironment([stand_in] * 6, autoreset="same_step", threads=threads)
        shown = [vector.reset(), *(vector.step(["7"] * 6) for _ in range(7))]
        vector.close()
        return shown

    assert played(4) == played(1)


def test_mistakes_are_one_line(stand_in, monkeypatch):
    for spec, message in (
        ("gem:", "write gem:ID"),
        ("gem", "write gem(id=..., options={}, success_reward=1.0, suffix=True, limit_s=20.0)"),
        ("gem:chess", "Environment chess not found"),
        ("gem(id='guess', options={'depth': 3})", "depth"),
    ):
        with pytest.raises(ValueError) as error:
            make_task(spec, 0)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert make_task("gem:guess", 3) == Gem(id="guess", seed=3)
    monkeypatch.setitem(sys.modules, "gem", None)
    with pytest.raises(ValueError, match=r"needs gem-llm .*pip install .thoughtbubbles\[gem\]"):
        make_task("gem:guess", 0)


def test_trap_1_the_last_observation_and_info(package):
    """The package's vector hides them where it resets in the same step."""
    theirs = package.make_vec(["game:GuessTheNumber-v0-easy"], seed=0)
    theirs.reset(seed=0)
    shown, rewards, ended, _, _ = theirs.step(["no number"])
    assert ended[0] and "valid guess" not in shown[0] and rewards[0] < 0
    task = Gem(id="game:GuessTheNumber-v0-easy")
    vector = VectorEnvironment([task], autoreset="same_step")
    vector.reset()
    step = vector.step(["no number"])[0]
    assert step.terminated and step.fresh and "You are playing" in step.observation
    assert (
        step.finished is not None and "did not provide a valid guess" in step.finished.observation
    )
    vector.close()


def test_trap_2_the_process_is_not_seeded(package):
    before = randomness()
    package.make("game:Mastermind-v0-easy").reset(seed=1)
    assert randomness() != before
    for name in ("game:Mastermind-v0-easy", "game:Minesweeper-v0-easy", "rg:chain_sum"):
        before = randomness()
        task = Gem(id=name)
        problem = task.problem("train", 0)
        turn = act(task, problem, [r"\boxed{1 2}"])[0]
        assert randomness() == before
        again = Gem(id=name)
        random.seed(7)
        assert again.problem("train", 0) == problem
        assert act(again, problem, [r"\boxed{1 2}"])[0] == turn


def test_trap_3_a_near_miss_is_no_success(package):
    task = Gem(id="game:GuessTheNumber-v0-hard")
    for index in itertools.count():
        problem = task.problem("train", index)
        number = task._begun(problem.answer)[0].environment.game_number
        if number < 50:
            break
    far = [n for n in range(1, 51) if abs(n - number) > 1][:6]
    turns = act(task, problem, [rf"\boxed{{{n}}}" for n in [*far, number + 1]])
    assert turns[-1].reward == pytest.approx(1 - 1 / 49, abs=1e-12)
    assert round(turns[-1].reward, 4) == 0.9796
    assert turns[-1].truncated and not turns[-1].success
    won = act(task, problem, [rf"\boxed{{{number}}}"])[0]
    assert won.success and won.reward == 1 and won.terminated


def test_trap_4_wrappers_ask_and_do_not_copy(package):
    from gem.wrappers.episode_tracking_wrapper import EpisodeTrackingWrapper  # noqa: PLC0415

    theirs: Any = EpisodeTrackingWrapper(package.make("game:GuessTheNumber-v0-easy"))
    theirs.reset(seed=0)
    for _ in range(2):
        theirs.step(r"\boxed{1}")
    assert (theirs.unwrapped.turn_count, theirs.turn_count) == (2, 0)
    inner = Gem(id="game:GuessTheNumber-v0-easy")
    task = ToolEnvironment(inner, (CalculatorTool(),), max_calls=1)
    assert inner.max_turns == 4 and task.max_turns == 5
    problem = task.problem("train", 0)
    called, first, second = act(task, problem, ["calc(2/2)", r"\boxed{1}", "x"])
    assert called.observation == " 1 " and len(first.state.inner.actions) == 1
    assert second.state.inner == inner.step(first.state.inner, completion_of(problem, "x")).state


def test_trap_5_a_fixed_set_of_episodes_is_played_to_its_end(package):
    """Those that have ended after a fixed time are the short ones."""
    task = Gem(id="game:GuessTheNumber-v0-easy")

    def player(shown, rng):
        return rf"\boxed{{{len(shown) // 2 + 1}}}"

    problems = [task.problem("train", index) for index in range(12)]
    lengths = [
        len(play_episode(task, problem, player, np.random.default_rng(0)).rewards)
        for problem in problems
    ]
    assert len(lengths) == 12 and max(lengths) == 4


def test_trap_6_a_scorer_that_raises_is_a_failed_answer(package):
    theirs = package.make("rg:prime_factorization")
    theirs.reset(seed=0)
    with pytest.raises(ValueError):
        theirs.step(r"\boxed{two}")
    task = Gem(id="rg:prime_factorization")
    [turn] = act(task, task.problem("train", 0), [r"\boxed{two}"])
    assert (turn.terminated, turn.reward, turn.info) == (True, 0, {"scorer_errors": 1})


def test_trap_6_in_reasoning_gym_without_the_package():
    with warnings.catch_warnings(action="ignore"):
        pytest.importorskip("reasoning_gym")
    task = make_task("reasoning_gym(dataset='prime_factorization', size=10)", 0)
    reward = task.score(completion_of(task.problem("train", 0), "two"))
    assert (reward.value, reward.success, reward.info) == (0, False, {"scorer_errors": 1})


def test_importing_the_package_leaves_the_log_alone(package):
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    for name in [name for name in sys.modules if name.split(".")[0] == "gem"]:
        del sys.modules[name]
    Gem(id="game:TowerofHanoi-v0-easy")
    assert (root.handlers, root.level) == (handlers, level)


GAMES = [
    f"game:{name}-v0-{level}"
    for name, levels in (
        ("GuessTheNumber", "easy hard random"), ("Mastermind", "easy hard random"),
        ("Minesweeper", "easy hard random"), ("FifteenPuzzle", "easy hard"),
        ("Sudoku", "easy hard random"), ("TowerofHanoi", "easy hard random"),
        ("Game2048", "easy hard random"), ("Sokoban", "easy"),
    )
    for level in levels.split()
]  # fmt: skip


@pytest.mark.parametrize("name", [*GAMES, "rg:chain_sum", "rg:spell_backward", "rg:gcd"])
def test_environments_are_usable_as_they_are(package, name):
    """Two copies play the same episode by the package's own random actions, to its end."""
    task = Gem(id=name)
    problem = task.problem("test", 1)
    live, prompt = task._begun(problem.answer)
    assert prompt == problem.prompt
    try:
        texts = [live.run(live.environment.sample_random_action) for _ in range(200)]
    except NotImplementedError:
        texts = [r"\boxed{7}"]
    turns, state = [], task.reset(problem)
    for text in texts:
        turn = task.step(state, completion_of(problem, text))
        turns.append(turn)
        state = turn.state
        if turn.terminated or turn.truncated:
            break
    assert all("scorer_errors" not in turn.info for turn in turns)
    assert state.over or len(turns) == 200
    if task.max_turns is not None:
        assert len(turns) <= task.max_turns
    again = Gem(id=name)
    middle = turns[len(turns) // 2 - 1].state if len(turns) > 1 else task.reset(problem)
    index = len(middle.actions)
    assert again.step(middle, completion_of(problem, texts[index])) == turns[index]

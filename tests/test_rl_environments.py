"""The suite of environments: promises of every entry, players, games, tools and the solvers."""

import dataclasses
import functools
import itertools
import json
import math
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from contracts import example
from rl_tiny import language_model

from thoughtbubbles.registry import is_ours
from train.data import ByteTokenizer
from train.experiments import environments as table
from train.experiments.study import read_results
from train.rl.environments import ENVIRONMENTS
from train.rl.environments.bm25 import BM25Index
from train.rl.environments.expressions import evaluate, number_text
from train.rl.environments.fifteen_puzzle import shortest, slid, solved
from train.rl.environments.game_2048 import pushed
from train.rl.environments.generated import GeneratedEnvironment
from train.rl.environments.hanoi import best_move, moves_left
from train.rl.environments.mastermind import feedback
from train.rl.environments.minesweeper import mine_chances
from train.rl.environments.observations import VIEWS, ObservationView
from train.rl.environments.one_turn import OneTurn
from train.rl.environments.players import completion_of, play_episode, player_of, score_player
from train.rl.environments.sokoban_levels import STEPS, Level, generate, solve
from train.rl.environments.stepping import StepPool, TimeLimited, counted_step
from train.rl.environments.tools import CalculatorTool, ToolEnvironment, call_of, run_tool
from train.rl.named_tasks import make_task, tasks_help
from train.rl.problems import GeneratedProblems
from train.rl.rollout.episodes import Rollout
from train.rl.scoring import safe_step
from train.rl.types import Problem

SUITE = [word for word in ENVIRONMENTS if word != "gem"]  # which needs a package
PLAYERS = ("random", "scripted")
INSTRUCTED = ("sokoban_variants", "general_points")  # whose prompt is an instruction, of any length
LONG = ("x" * 10**6, "9" * 10**6, f"calc({'1+' * 500_000}1)", f"search({'a ' * 500_000})")


@functools.cache
def environment(spec: str) -> Any:
    return make_task(spec, 0)


def entry(word: str) -> Any:
    """An environment of the registry, made as `--example` says."""
    return environment(example(word, ENVIRONMENTS[word]))


def entry_with_rules(word: str) -> Any:
    """An environment with the rules of `GeneratedEnvironment`, which those of others may lack."""
    task = entry(word)
    if not isinstance(task, GeneratedEnvironment):
        pytest.skip(f"{word} does not derive from GeneratedEnvironment, whose rules these are")
    return task


def players(task: Any, least: int) -> list[str]:
    """Names of the players that an environment has; a test that needs more is skipped."""
    kind, base = type(task), GeneratedEnvironment
    written = {name: getattr(kind, f"{name}_action", None) for name in PLAYERS}
    found = [
        name for name, act in written.items() if act not in (None, getattr(base, f"{name}_action"))
    ]
    if len(found) < least:
        missing = ", ".join(f"{name}_action" for name in PLAYERS if name not in found)
        pytest.skip(f"{task.word} has no {missing}: players are optional")
    return found


def finish(task: Any, problem: Problem, texts) -> list[Any]:
    """Turns of texts up to the end of the episode."""
    state, turns = task.reset(problem), []
    for text in texts:
        turns.append(task.step(state, completion_of(problem, text)))
        state = turns[-1].state
        if turns[-1].terminated or turns[-1].truncated:
            break
    return turns


@pytest.mark.parametrize("word", SUITE)
def test_the_scripted_player_is_better_than_the_random_one(word):
    """Each sees texts alone, and episodes end within the environment's number of turns."""
    task = entry(word)
    random, scripted = (score_player(task, player, 30, 0) for player in players(task, least=2))
    if is_ours(type(task)):
        assert scripted.success > random.success + 0.2 and scripted.reward > random.reward
    else:
        better = (scripted.success, -scripted.turns) > (random.success, -random.turns)
        assert better, "the scripted player solves no more problems, and needs no fewer turns"
    assert max(random.turns, scripted.turns) <= getattr(task, "max_turns", math.inf)
    assert scripted == score_player(task, "scripted", 30, 0)


@pytest.mark.parametrize("word", SUITE)
def test_a_whole_episode_is_shown_and_fits(word):
    """Observations fit into the 64 tokens that a strategy takes, byte by byte; the last is kept."""
    task = entry_with_rules(word)
    any_prompt = word in INSTRUCTED or not is_ours(type(task))
    for index, player in itertools.product(range(4), players(task, least=1)):
        problem, act = task.problem("train", index), player_of(task, player)
        episode = play_episode(task, problem, act, np.random.default_rng(index))
        for text in episode.shown[2::2] if any_prompt else episode.shown:
            assert 0 < len(text.encode()) <= 64, f"{text!r}: write 1 to 64 bytes"
        assert len(episode.shown) == 1 + 2 * len(episode.rewards)
        assert episode.last.observation == episode.shown[-1]
        assert episode.last.success == (episode.rewards[-1] == 1)
        last = finish(task, problem, episode.shown[1::2])
        assert [turn.observation for turn in last] == list(episode.shown[2::2])
        with pytest.raises(ValueError, match="the episode is over"):
            task.step(last[-1].state, completion_of(problem, "1"))


@pytest.mark.parametrize("word", SUITE)
def test_a_text_that_is_no_action_is_counted(word):
    task = entry_with_rules(word)
    problem = task.problem("train", 0)
    turns = finish(task, problem, itertools.repeat(" \n"))
    assert [turn.reward for turn in turns] == [task.malformed] * task.max_turns
    assert turns[-1].truncated and not turns[-1].terminated and not turns[-1].success
    assert turns[-1].info["malformed"] == task.max_turns and turns[-1].observation
    strict = dataclasses.replace(task, strict=True)
    [only] = finish(strict, problem, [""])
    assert only.terminated and only.reward == task.malformed and not only.success
    for text in LONG:
        turn = safe_step(task, problem, task.reset(problem), completion_of(problem, text))
        assert "scorer_errors" not in turn.info and not turn.success
        assert len(turn.observation) < 100


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mastermind(colours=10)", "colours=10: choose 9 or less"),
        ("mastermind(length=7, colours=9)", "make more than a million codes"),
        ("mastermind(length=1, colours=2)", "too few different problems"),
        ("mastermind(max_turns=0)", "max_turns=0: choose 1 or more"),
        ("minesweeper(mines=24)", "mines=24 of 25 cells: leave two cells free"),
        ("minesweeper(rows=27)", "rows=27: choose 26 or less"),
        ("sokoban(boxes=5, walls=4)", "boxes=5 and walls=4 in 16 cells: choose half"),
        ("sokoban(width=3)", "width=3: choose 4 or more"),
        ("hanoi(disks=10)", "disks=10: choose 9 or less"),
        ("fifteen_puzzle(size=5)", "size=5: choose 4 or less"),
        ("game_2048(goal=48)", "goal=48: choose a power of 2"),
        ("calculator(digits=10)", "digits=10: choose 9 or less"),
        ("search_qa(hops=3)", "hops=3: choose 1 or 2"),
        ("search_qa(path='nowhere')", "no file nowhere/passages.jsonl: give a folder with"),
        ("search_qa(people=400000)", "people=400000: choose 10000 or less"),
        ("mastermind(length=100000000)", "length=100000000 and colours=6 make more than a million"),
        ("sokoban(height=4, width=4)", "height=4 and width=4: choose one of them 5 or more"),
        ("sokoban(pulls=1000000000)", "pulls=1000000000: choose 1000 or less"),
        ("sokoban(height=1000000)", "height=1000000: choose 20 or less"),
        ("fifteen_puzzle(size=2, scramble=12)", "scramble=12 moves bring each board of size=2"),
        ("fifteen_puzzle(scramble=1000000000)", "scramble=1000000000: choose 1000 or less"),
        ("game_2048(size=2, goal=64)", "goal=64: choose 32 or less"),
        ("hanoi(malformed=1e999)", "malformed=inf: choose a finite number"),
        ("search_q", "unknown task 'search_q' (perhaps search_qa?)"),
    ],
)
def test_mistakes_in_options_are_one_line(spec, message):
    with pytest.raises(ValueError) as error:
        make_task(spec, 0)
    assert message in str(error.value) and "\n" not in str(error.value)


EXTREMES = (0, -1, -(10**20), 1, 2, 3, 10**4, 10**8, 10**400, 2.5, math.nan, math.inf, "3", None,
            True)  # fmt: skip


@pytest.mark.parametrize("word", [*SUITE, "arithmetic", "chain_sum", "copy", "hidden_facts"])
def test_any_value_of_any_option_is_taken_or_refused_at_once(word):
    task = entry(word) if word in ENVIRONMENTS else environment(word)
    pool, refused = StepPool(1, limit_s=10), 0
    fields = [field for field in dataclasses.fields(task) if field.init]
    for field, value in itertools.product(fields, EXTREMES):
        try:
            pool.call(functools.partial(dataclasses.replace, task, **{field.name: value}))
        except ValueError as error:
            said = f"{field.name}={value!r}: {error}: refuse it in check(), beginning with {word}"
            assert "\n" not in str(error) and str(error).startswith(word), said
            refused += 1
    assert refused > 30 or not isinstance(task, GeneratedProblems)
    pool.close()


def test_feedback_of_codes():
    assert feedback("1123", "1123") == (4, 0) and feedback("1123", "3211") == (0, 4)
    assert feedback("1123", "1111") == (2, 0) and feedback("1123", "2456") == (0, 1)
    assert feedback("12", "21") == (0, 2) and feedback("11", "12") == (1, 0)


def test_shortest_ways_are_shortest():
    """Towers from every position, and boards within four moves: against a search in breadth."""
    tower = environment("hanoi")
    goal = (2, 2, 2)
    distance = _distances(goal, lambda pegs: [
        move.game for a, b in itertools.permutations("abc", 2) if (move := tower.move(pegs, a + b))
    ])  # fmt: skip
    assert len(distance) == 27 and max(distance.values()) == 7
    for pegs, moves in distance.items():
        assert moves_left(pegs) == moves
        if moves:
            assert distance[tower.move(pegs, best_move(pegs)).game] == moves - 1
    near = _distances(
        solved(3), lambda tiles: [after for way in "UDLR" if (after := slid(tiles, way))], 4
    )
    assert all(len(shortest(tiles)) == moves for tiles, moves in near.items())
    with pytest.raises(ValueError, match="cannot be brought into order"):
        shortest("213.")
    with pytest.raises(ValueError, match="8672543.1 within 9 boards: choose a smaller scramble"):
        shortest("8672543.1", 9)


def _distances(start, neighbours, most=math.inf):
    found, queue = {start: 0}, [start]
    for here in queue:
        for after in neighbours(here) if found[here] < most else ():
            if after not in found:
                found[after] = found[here] + 1
                queue.append(after)
    return found


LEVEL = ("#######", "#@--#-#", "#-$-.-#", "#--*--#", "#######")


def test_levels_are_read_and_written():
    level = Level.from_rows(LEVEL)
    assert level.rows == list(LEVEL) and Level.from_rows(level.rows) == level
    on_goal = Level.from_rows(["+$", ".$"])
    assert on_goal.player in on_goal.goals and on_goal.rows == ["+$", ".$"]
    for row, words in (("@x", "character 'x'"), ("$.", "0 players"), ("@$", "1 boxes and 0")):
        with pytest.raises(ValueError, match=words):
            Level.from_rows([row])


def test_boxes_are_pushed_one_at_a_time():
    level = Level.from_rows(["######", "#@$-$#", "#-..-#", "######"])
    once = level.moved("R")
    assert once is not None and once.rows[1] == "#-@$$#" and level.rows[1] == "#@$-$#"
    assert once.moved("R") is None, "two boxes"
    assert level.moved("U") is None and level.moved("L") is None, "walls"
    right = Level.from_rows(["#####", "#.@$#", "#####"])
    assert right.moved("R") is None, "a box against a wall"
    edge = Level.from_rows(["@$", "-."])
    assert edge.moved("R") is None and edge.moved("U") is None, "the end of the board"


def test_generated_levels_are_solved_by_the_fewest_steps():
    rng = np.random.default_rng(0)
    for boxes in (1, 2, 3):
        for _ in range(4):
            level = generate(rng, 6, 6, boxes, 2, 20)
            solution = solve(level)
            assert solution and not level.solved and len(level.boxes) == boxes
            for way in solution:
                level = level.moved(way)
                assert level is not None
            assert level.solved
    small = generate(rng, 5, 5, 1, 1, 20)
    steps = _distances(small, lambda here: [a for way in STEPS if (a := here.moved(way))])
    solution = solve(small)
    assert solution is not None
    assert len(solution) == min(moves for level, moves in steps.items() if level.solved)
    assert solve(Level.from_rows(["#####", "#$@.#", "#####"])) is None
    for size in ({"height": 4, "width": 4}, {"height": 3, "width": 3}, {"boxes": 16}):
        with pytest.raises(ValueError, match="choose a larger one, or fewer boxes and walls"):
            generate(rng, **{"walls": 0, **size})
    with pytest.raises(ValueError, match="no solution within 3 positions: choose fewer boxes or"):
        solve(Level.from_rows(["#######", "#@--$.#", "#######"]), 3)


def test_pushed_tiles_merge_once():
    assert pushed(((2, 2, 4), (2, 2, 2), (0, 4, 4)), "L") == ((4, 4, 0), (4, 2, 0), (8, 0, 0))
    assert pushed(((2, 2, 2), (0, 0, 0), (2, 0, 4)), "R") == ((0, 2, 4), (0, 0, 0), (0, 2, 4))
    assert pushed(((2, 0), (2, 4)), "U") == ((4, 4), (0, 0))
    assert pushed(((2, 0), (2, 4)), "D") == ((0, 0), (4, 4))


def test_chances_of_mines_are_those_of_all_boards_that_agree():
    """Against all placements of the mines, in front of each action of some episodes."""
    task = environment("minesweeper(rows=4, columns=4, mines=4)")
    varied = 0
    for index in range(8):
        problem = task.problem("train", index)
        episode = play_episode(task, problem, task.scripted_action, np.random.default_rng(0))
        for shown in episode.shown[:-1:2]:
            marks = "".join(shown.split("\n")[1:])
            closed = {cell for cell, mark in enumerate(marks) if mark == "?"}
            numbers = [
                (closed & set(task._around(cell)), int(mark) if mark != "." else 0)
                for cell, mark in enumerate(marks)
                if mark != "?"
            ]
            boards = [
                set(mines)
                for mines in itertools.combinations(sorted(closed), 4)
                if all(len(cells & set(mines)) == count for cells, count in numbers)
            ]
            near = set().union(*(cells for cells, _ in numbers))
            varied += len({len(mines & near) for mines in boards}) > 1
            found = mine_chances(closed, [pair for pair in numbers if pair[0]], 4)
            for cell in closed:
                share = sum(cell in mines for mines in boards) / len(boards)
                assert found[cell] == pytest.approx(share, abs=1e-12)
    assert varied > 3, "boards that agree have different numbers of mines near open cells"


def test_expressions():
    """Against Python's own values of random expressions, in fractions."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        numbers = [f"Fraction({n})" for n in rng.integers(0, 50, 5)]
        signs = [str(s) for s in rng.choice(["+", "-", "*", "/", "*-", "-("], 4)]
        python = numbers[0] + "".join(s + n for s, n in zip(signs, numbers[1:], strict=True))
        python += ")" * python.count("-(")
        text = python.replace("Fraction(", "").replace(")", "", 5)
        try:
            expected = eval(python)
        except ZeroDivisionError:
            with pytest.raises(ValueError, match="division by zero"):
                evaluate(text)
            continue
        assert evaluate(text) == expected, text
    assert evaluate(" 2 * (3 - 1.5) ") == 3 and evaluate("--2") == 2
    shown = [number_text(Fraction(*pair)) for pair in ((6, 3), (1, 3), (-5, 2), (10**20, 1))]
    assert shown == ["2", "0.333333", "-2.5", "1" + "0" * 20]
    for pair, text in (
        ((10**20, 3), "3" * 20 + ".333333"),
        ((-1, 10**9), "0"),
        ((2, 3), "0.666667"),
        ((-2 * 10**30, 3), "-" + "6" * 30 + ".666667"),
        ((1, 2 * 10**6), "0"),
        ((3, 2 * 10**6), "0.000002"),
        ((2 * 10**7 - 1, 10**7), "2"),
        ((10**7 + 1, 10**2), "100000.01"),
    ):
        assert number_text(Fraction(*pair)) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the end came too early"), ("2+", "the end came too early"), ("(2", "not closed"),
        ("2)", r"unexpected '\)'"), ("2 3", "unexpected '3'"), ("x", "unexpected 'x'"),
        ("2 x", "unexpected 'x'"),
        ("2**3", r"unexpected '\*'"), ("1/(2-2)", "division by zero"), ("٣", "unexpected"),
        ("1" * 257, "257 characters: write 256 or less"), ("(" * 99, "more than 32 brackets"),
        ("9" * 200, "too large"), ("*".join(["99999999"] * 25), "too large"), ("1e9", "unexpected"),
    ],
)  # fmt: skip
def test_bad_expressions_are_named(text, words):
    with pytest.raises(ValueError, match=words):
        evaluate(text)


def test_bm25_is_that_of_the_package():
    bm25s = pytest.importorskip("bm25s")
    rng = np.random.default_rng(0)
    words = [f"w{n}" for n in range(12)]
    passages = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(30)]
    theirs = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    theirs.index([passage.split() for passage in passages], show_progress=False)
    ours = BM25Index(passages)
    for _ in range(5):
        query = list(dict.fromkeys(rng.choice(words, 3).tolist()))
        found, scores = ours.scores(" ".join(query)), theirs.get_scores(query)
        # Lucene leaves out the constant factor k1 + 1.
        expected = np.array([found.get(i, 0.0) for i in range(30)]) / 2.5
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
        best = ours.search(" ".join(query), 30)
        assert len(best) == np.count_nonzero(scores) and best[0] == passages[int(scores.argmax())]
    assert ours.search("nothing", 3) == []
    with pytest.raises(ValueError, match="2 passages without a word"):
        BM25Index(["", "?"])


@pytest.mark.parametrize("hops", [1, 2])
def test_a_question_is_answered_by_as_many_searches_as_its_hops(hops):
    score = score_player(make_task(f"search_qa(hops={hops})", 0), "scripted", 12, 0)
    assert (score.success, score.turns) == (1, hops + 1)


def test_a_corpus_of_ones_own(tmp_path):
    texts = [{"text": f"The colour of {n} is c{n}."} for n in range(12)]
    asked = [{"question": f"Colour of {n}?", "answer": f"c{n}"} for n in range(12)]
    for name, lines in (("passages", texts), ("questions", asked)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = make_task(f"search_qa(path={str(tmp_path)!r}, hops=1)", 0)
    assert make_task(task.name, 0) == task
    assert score_player(task, "scripted", 12, 0).success == 1
    problem = task.problem("train", 0)
    number = problem.prompt.split()[-1].rstrip("?")
    found, answered = finish(task, problem, [f"search({number})", f"C{number}."])
    assert found.observation == f" The colour of {number} is c{number}. " and answered.success
    more = [line | {"answer": f"{line['answer']} alone"} for line in asked]  # other golds
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, [*asked, *more])))
    (tmp_path / "passages.jsonl").write_text('{"text": "..."}\n{"text": "words"}')
    twice = make_task(task.name, 0)
    train, test = ({twice.problem(s, i).prompt for i in range(99)} for s in ("train", "test"))
    assert not train & test and train | test == {f"{line['question']} " for line in asked}
    assert problem.prompt in train
    act = player_of(twice, "random")
    actions = {act([], np.random.default_rng(seed)) for seed in range(20)}
    assert "nothing" in actions
    (tmp_path / "questions.jsonl").write_text('{"question": "a"}')
    with pytest.raises(ValueError, match=r"questions.jsonl, line 1"):
        make_task(task.name, 0)


def test_a_call_that_fails_is_counted():
    task = environment("calculator")
    problem = Problem("p", "6*7? ", ["6*7?", "42"])
    texts = [LONG[2], "calc(1/0)", "calc(6*7)", "42"]
    turns = finish(task, problem, texts)
    assert [turn.info["tool_errors"] for turn in turns] == [1, 2, 2, 2]
    assert turns[0].observation == " error: 1000001 characters, 256 at most "
    assert turns[1].observation == " error: division by zero "
    assert turns[2].observation == " 42 "
    assert turns[3].success and [turn.reward for turn in turns] == [0, 0, 0, 1]
    assert turns[3].info == {"malformed": 0, "tool_calls": 3, "tool_errors": 2}
    assert finish(task, problem, [LONG[2], ""])[1].info == {
        "malformed": 1, "tool_calls": 1, "tool_errors": 1
    }  # fmt: skip
    [wrong] = finish(task, problem, ["41"])
    assert (wrong.terminated, wrong.success, wrong.reward) == (True, False, 0)


@dataclasses.dataclass(frozen=True)
class Broken:
    """A tool that gives no text, or raises what has no message."""

    name: str = "broken"

    def __call__(self, argument: str) -> Any:
        if argument:
            raise RuntimeError
        return 3


def test_tools_around_an_environment():
    inner = environment("guess_number")
    task = ToolEnvironment(inner, (CalculatorTool(), Broken()), max_calls=2, tool_reward=0.25)
    # What a wrapper says of the environment is asked of it, not copied.
    assert task.max_turns == inner.max_turns + 2 and task.sizes == inner.sizes
    assert task.name == "guess_number with calc+broken"
    problem = Problem("p", "1-10? ", 5)
    texts = ["calc(2+2)", "4", "broken(1)", "calc(1+1)", "5"]
    turns = finish(task, problem, texts)
    assert [turn.observation for turn in turns] == [
        " 4 ", " higher ", " error: RuntimeError ", " no calls left 1-10? ", " right "
    ]  # fmt: skip
    assert [turn.reward for turn in turns] == [0.25, 0, 0, -0.1, 1]
    assert turns[-1].info == {"malformed": 1, "tool_calls": 2, "tool_errors": 1}
    assert turns[-1].state.inner.turns == 3
    assert run_tool(Broken(), "").failed
    assert run_tool(sys.exit, "3").failed
    for text in ("calc(1) more", "calculate(1)", " calc", "calc)"):
        assert call_of(text, task.tools) is None
    sums = ToolEnvironment(OneTurn(make_task("arithmetic", 0)), (CalculatorTool(),))
    problem = sums.problem("test", 0)
    called, answered = finish(sums, problem, [f"calc({problem.prompt[:-1]})", problem.answer])
    assert called.observation == f" {problem.answer} " and answered.success and answered.terminated


def test_an_episode_with_tools_ends_and_keeps_its_numbers():
    task = ToolEnvironment(environment("guess_number"), (CalculatorTool(),))
    problem = Problem("p", "1-10? ", 5)
    malformed, called = finish(task, problem, ["x", "calc(2+2)"])
    assert malformed.info == {"malformed": 1, "tool_calls": 0, "tool_errors": 0}
    assert called.info == {"malformed": 1, "tool_calls": 1, "tool_errors": 0}
    [won] = finish(task, problem, ["5"])
    cut = finish(task, problem, ["4"] * 8)[-1]
    assert won.terminated and cut.truncated
    for last, text in itertools.product((won, cut), ("calc(1)", "5")):
        with pytest.raises(ValueError, match="guess_number with calc: the episode is over"):
            task.step(last.state, completion_of(problem, text))
    for options, words in (
        ({"max_calls": -1}, "max_calls=-1: choose 0 or more"),
        ({"max_argument": 0}, "max_argument=0: choose 1 or more"),
        ({"tool_reward": math.nan}, "tool_reward=nan: choose a finite number"),
    ):
        with pytest.raises(ValueError, match=words):
            ToolEnvironment(environment("hanoi"), (), **options)


class Silent:
    """An environment that says its failures are worth -1, and has no players."""

    name, sizes, failure_value, max_turns, serial = "silent", {"train": 3}, -1.0, 7, True

    def problem(self, split, index):
        return Problem("p", "go? ", index)

    def reset(self, problem):
        return 0

    def step(self, state, action):
        raise RuntimeError("broken")


WRAPPERS = (
    TimeLimited,
    lambda inner: ToolEnvironment(inner, ()),
    *(lambda inner, view=view: ObservationView(inner, view) for view in VIEWS),
)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_is_what_its_environment_is(wrap):
    silent: Any = Silent()
    task = wrap(silent)
    assert (task.failure_value, task.serial, task.sizes) == (-1.0, True, {"train": 3})
    assert task.max_turns == 7 + getattr(task, "max_calls", 0)
    problem = task.problem("train", 1)
    turn = counted_step(task, problem, task.reset(problem), completion_of(problem, "x"))
    assert turn.reward == -1 and turn.error.endswith("RuntimeError: broken\n")
    with pytest.raises(ValueError, match="player='scripted': silent.* has no such player"):
        score_player(task, "scripted", 1, 0, "train")
    for word in ("hanoi", "mastermind", "guess_number"):
        inner = environment(word)
        assert not wrap(inner).serial and wrap(inner).failure_value == 0
        for player in ("random", "scripted"):
            assert score_player(wrap(inner), player, 9, 0) == score_player(inner, player, 9, 0)


def test_a_view_of_ones_own_has_no_players():
    task = ObservationView(environment("hanoi"), lambda shown: "hidden")
    with pytest.raises(ValueError, match="has no such player: play it yourself"):
        score_player(task, "random", 1, 0)


def test_one_turn_says_why_its_task_failed():
    @dataclasses.dataclass(frozen=True)
    class Broken:
        name, sizes, failure_value = "broken", {"train": None}, -2.0

        def problem(self, split, index):
            return Problem("p", "1?", "1")

        def score(self, completion):
            raise RuntimeError("no verifier")

    broken: Any = Broken()
    task = OneTurn(broken)
    [turn] = finish(task, task.problem("train", 0), ["x"])
    assert (turn.reward, turn.info) == (-2, {"scorer_errors": 1})
    assert turn.error.endswith("RuntimeError: no verifier\n") and task.failure_value == -2


def test_views_of_an_episode():
    inner = environment("guess_number")
    problem = Problem("p", "1-10? ", 5)
    for view, expected in (
        ("last", " lower "),
        ("observations", "1-10?  higher  lower "),
        ("transcript", "1-10? 2 higher 9 lower "),
        (lambda shown: f"{len(shown) // 2} turns", "2 turns"),
    ):
        task = ObservationView(inner, view)
        assert finish(task, problem, ["2", "9"])[-1].observation == expected
        assert task.max_turns == inner.max_turns
    with pytest.raises(ValueError, match="unknown view 'all': choose one of last, observations"):
        ObservationView(inner, "all")


def test_help_prints_the_suite():
    printed = tasks_help()
    for word, kind in ENVIRONMENTS.items():
        assert f"\n  {word}(" in printed
        assert kind.__doc__.partition("\n")[0][:40] in printed


def test_the_experiment_plays_what_is_missing(tmp_path, capsys):
    out = str(tmp_path / "scores.jsonl")
    with pytest.raises(ValueError, match="unknown environment with players 'gem'"):
        table.main(table.Experiment(environments=("gem",), out=out))
    config = table.Experiment(environments=("hanoi(disks=2)",), episodes=3, out=out)
    table.main(config)
    assert "hanoi(disks=2), scripted, seed 0: success 1.000 ± 0.000" in capsys.readouterr().out
    table.main(dataclasses.replace(config, seeds=(0, 1)))
    assert "seed 0" not in capsys.readouterr().out
    table.main(table.Experiment(report=out))
    printed = capsys.readouterr().out
    assert "| `hanoi(disks=2)` | scripted | 0 1 | 1.000 ± 0.000 |" in printed
    scores = {"success": 0.5, "success_error": 0.1, "reward": 0.4, "turns": 3.0}
    costs = {"rollouts": 640, "tokens": 12_800, "updates": 9, "cpu_seconds": 61.0}
    arm = {"environment": "hanoi", "player": "grpo", "episodes": 3, **dict.fromkeys(table.SIZES, 8)}
    runs = [arm | scores | costs | {"seed": 0, "steps": steps} for steps in (10, 20)]
    first, second = table.report(runs).splitlines()[2:]
    assert first == (
        "| `hanoi` | `grpo`, steps 10 | 0 | 0.500 ± 0.100 | 0.400 | 3.00 | 640 | 12,800 | 9 | 61 |"
    )
    assert "steps 20" in second


@pytest.mark.experiment
def test_the_experiment_trains_what_is_missing(tmp_path, capsys):
    """`python -m pytest -m experiment tests/test_rl_environments.py`, a minute."""
    config = table.Experiment(
        environments=("guess_number",), episodes=8, arms=("grpo",), supervised=1, steps=1,
        batch_size=2, num_generations=2, out=str(tmp_path / "scores.jsonl"),
    )  # fmt: skip
    for players in (["random", "scripted", "before", "grpo"], []):
        table.main(config)
        said = [line for line in capsys.readouterr().out.splitlines() if ", seed 0: " in line]
        assert [line.split(", ")[1] for line in said] == players
    trained = read_results(config.out)[-1]
    assert trained["rollouts"] == 4 and trained["tokens"] > 0 and trained["cpu_seconds"] > 0


def test_a_trained_player_has_seen_actions_of_the_random_one():
    """Each action and its end are trained on, what the environment says is not, and nothing after
    the last action."""
    environment = make_task("guess_number(max_turns=3)", 0)
    lm = language_model("shallow")
    rollouts = [Rollout(0, environment.problem("train", index), index) for index in range(6)]
    rows = [table.player_episode(lm, environment, rollout, seed=0) for rollout in rollouts]
    for row in rows:
        said = [[*text.encode(), ByteTokenizer.separator] for text in row.texts]
        assert row.tokens[row.trained].tolist() == sum(said, []) and row.trained[-1]
        assert len(row.begins) == len(row.turn_rewards) == len(said)
    assert max(len(row.begins) for row in rows) > 1
    score = table.score_of(rows)
    assert score.turns == np.mean([len(row.begins) for row in rows])
    assert score.success == np.mean([row.reward.success for row in rows])
    with pytest.raises(ValueError, match="unknown method 'a2c'"):
        table.Experiment(arms=("a2c",))
    with pytest.raises(ValueError, match="steps=0 is below 1"):
        table.Experiment(steps=0)

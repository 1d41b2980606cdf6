"""Reinforcement learning by several real processes: the same run, its work divided."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest
from processes import processes
from rl_runs import job, timeless
from rl_tiny import MEMGEN, Echo, Vowels

from train.devices.mesh import MeshConfig
from train.engine.config import EvalConfig
from train.rl.loop import train
from train.rl.types import Reward

SEARCH = "tree_search(step_len=1, width=2, probe=1)"
WEAVER = dataclasses.replace(MEMGEN, trigger=None, max_inference_events=1)
RUNS: dict[str, dict[str, Any]] = {
    # As many held-out problems as rollouts of a step: one program.
    "responses": {"steps": 2, "evaluation": EvalConfig(every=0, rows=32)},
    "turns": {"steps": 2, "strategy": "turns(max_turns=3)"},
    "search": {"steps": 2, "method": "deepsearch", "strategy": SEARCH, "pool": 4},
    "weaver": {"steps": 2, "train": "weaver", "memgen": WEAVER, "mesh": MeshConfig(1, 2)},
    "reset": {"steps": 2, "method": "brorl(reference_reset=9)"},
    "unmoved": {"steps": 2, "method": "dapo"},
    "killed": {"steps": 4},
    "wrong": {"steps": 2},
}


class Noted:
    """A task or an environment that writes down what it was asked, a file for each process."""

    def __init__(self, inner: Any, file: Path):
        self._inner, self._file = inner, file
        self._scored = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _note(self, completion: Any) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps([completion.problem.uid, *map(int, completion.tokens)]) + "\n")


@dataclasses.dataclass(frozen=True)
class Graded(Reward):
    """A reward with a field that the run does not know."""

    grade: bytes = b""


class NotedVowels(Noted):
    def score(self, completion: Any) -> Any:
        self._note(completion)
        reward = self._inner.score(completion)
        if completion.tokens[0] % 5 == 0:
            raise RuntimeError("no number")
        info: Any = {"first": np.float32(completion.tokens[0])}
        return Graded(reward.value, cast(Any, np.bool_(reward.success)), info, grade=b"no JSON")


class Unmoved(NotedVowels):
    """Nothing is learned of it, so that a run saves the weights that it began with."""

    def score(self, completion: Any) -> Any:
        return dataclasses.replace(super().score(completion), value=0.0, success=False)


class Dies(Noted):
    """Vowels until the fourth step, which process 1 of two does not survive."""

    def score(self, completion: Any) -> Any:
        self._note(completion)
        self._scored += 1
        if self._scored == 3 * 16 + 5 and jax.process_index():
            os.kill(os.getpid(), signal.SIGKILL)
        return self._inner.score(completion)


class Wrong(Noted):
    """Vowels that process 1 gives a reward which is no number."""

    def score(self, completion: Any) -> Any:
        value = float("nan") if jax.process_index() else 1.0
        return dataclasses.replace(self._inner.score(completion), value=value)


class NotedEcho(Noted):
    def step(self, state: Any, action: Any) -> Any:
        self._note(action)
        assert state is not None, "of another process"
        return self._inner.step(state, action)


def run(kind: str, folder: Path, devices: Any = None, **changes: Any) -> None:
    number = jax.process_index()
    noted = {"turns": NotedEcho, "unmoved": Unmoved, "killed": Dies, "wrong": Wrong}.get(
        kind, NotedVowels
    )
    task = noted(Echo() if kind == "turns" else Vowels(), folder / f"{kind}-{number}.jsonl")
    options = {"method": "grpo", **RUNS[kind], **changes}
    train(job(folder / kind, task=task, devices=devices, **options))


PROGRAM = """
import sys
from pathlib import Path
import test_rl_processes
from train.devices.distributed import DistributedConfig, distributed_context
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
port, count, number = (
    words[f"--distributed.{name}"] for name in ("coordinator", "num-processes", "process-id")
)
with distributed_context(DistributedConfig(port, int(count), int(number))):
    for kind in sys.argv[1].split(",")[1:]:
        test_rl_processes.run(kind, Path(sys.argv[1].split(",")[0]))
"""


def started_on(folder: Path, *kinds: str) -> Any:
    """Two processes, of a device each, that make these runs in a folder."""
    folder.mkdir(exist_ok=True)
    words = ("-c", PROGRAM, ",".join([str(folder), *kinds]))
    return processes(words, folder.parent, devices=1)


def assert_equal_metrics(ours: Path, theirs: Path) -> None:
    for mine, other in zip(timeless(ours), timeless(theirs), strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            np.testing.assert_allclose(mine[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def notes(folder: Path, kind: str, processes: int) -> list[list[Any]]:
    """What each process was asked."""
    files = [folder / f"{kind}-{number}.jsonl" for number in range(processes)]
    return [[*map(json.loads, file.read_text().splitlines())] for file in files]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds",
    [
        ("responses",),
        pytest.param(("turns", "search"), marks=pytest.mark.experiment),
        pytest.param(("weaver",), marks=pytest.mark.experiment),
        pytest.param(("reset", "unmoved"), marks=pytest.mark.experiment),
    ],
    ids=" ".join,
)
def test_two_processes_do_what_one_does(tmp_path: Path, kinds: tuple[str, ...]):
    two, one = tmp_path / "two", tmp_path / "one"
    one.mkdir()
    with started_on(two, *kinds) as started:
        assert started.statuses() == [0, 0], started.output(0) + started.output(1)
        assert "reward" in started.output(0) and "reward" not in started.output(1)
    for kind in kinds:
        run(kind, one, devices=jax.devices()[:2])
        [all_], shares = notes(one, kind, 1), notes(two, kind, 2)
        assert sorted(all_) == sorted(shares[0] + shares[1])
        assert min(map(len, shares)) >= len(all_) // 3, "both score"
        assert_equal_metrics(two / kind, one / kind)


@pytest.mark.experiment
def test_a_kill_of_one_process_leaves_no_trace(tmp_path: Path):
    two, one = tmp_path / "two", tmp_path / "one"
    one.mkdir()
    with started_on(two, "killed") as started:
        assert started.statuses() == [1, -9], started.output(0) + started.output(1)
        started.wait_for_words(0, "start all of them again")
    with started_on(two, "killed") as started:
        assert started.statuses() == [0, 0], started.output(0) + started.output(1)
        assert "continuing" in started.output(0) and "from step 2" in started.output(0)
    run("killed", one, devices=jax.devices()[:2])
    assert_equal_metrics(two / "killed", one / "killed")


@pytest.mark.experiment
def test_a_mistake_of_one_scorer_ends_all(tmp_path: Path):
    with started_on(tmp_path / "two", "wrong") as started:
        assert started.statuses() == [2, 2], started.output(0) + started.output(1)
        for number in range(2):
            *_, last = started.output(number).splitlines()
            assert last.startswith("error: ") and "the reward nan" in last
            assert "Traceback" not in started.output(number)

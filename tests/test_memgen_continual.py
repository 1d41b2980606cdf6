"""Continual learning: the metrics of hand-made matrices, and a run that is stopped anywhere."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from memgen.continual import ContinualReport, Records, run_continual

TASKS = ("a", "b", "c")
# In eighths, so that sums are exact. Training began with a loss of a; stage 2 cost b something.
HAND_MADE = ContinualReport(
    TASKS,
    np.array([[8, 2, 3], [7, 6, 2], [5, 5, 4], [3, 4, 8]]) / 8,
)


def test_55_continual_metrics_of_a_hand_made_matrix():
    assert HAND_MADE.average_accuracy == (3 + 4 + 8) / 3 / 8
    assert HAND_MADE.backward_transfer == ((3 - 7) + (4 - 5)) / 2 / 8
    assert HAND_MADE.forward_transfer == ((6 - 2) + (4 - 3)) / 2 / 8
    assert HAND_MADE.forgetting == ((7 - 3) + (6 - 4)) / 2 / 8


def test_metrics_of_the_table_in_the_paper():
    """MemGen SFT, arXiv 2509.24704 table 4; the metrics are ours, by hand from its numbers."""
    report = ContinualReport(
        ("AQuA", "GPQA", "GSM8K", "KodCode"),
        np.array(
            [
                [41.34, 11.62, 39.51, 24.55],
                [43.31, 19.70, 39.80, 19.55],
                [39.85, 20.72, 47.96, 28.80],
                [38.43, 21.72, 55.67, 19.75],
                [40.34, 20.09, 53.72, 52.95],
            ]
        ),
    )
    assert report.average_accuracy == pytest.approx(41.775)
    assert report.backward_transfer == pytest.approx((-2.97 - 0.63 - 1.95) / 3)
    assert report.forward_transfer == pytest.approx((8.08 + 8.45 - 4.80) / 3)
    assert report.forgetting == pytest.approx((2.97 + 1.63 + 1.95) / 3)
    table = report.markdown().splitlines()
    assert table[0] == "| after training on | AQuA | GPQA | GSM8K | KodCode |"
    assert table[2] == "| – | 41.34 | 11.62 | 39.51 | 24.55 |"
    assert table[4] == "| GPQA | 39.85 | **20.72** | 47.96 | 28.80 |"
    assert "| backward transfer | -1.85 |" in table and "| forward transfer | +3.91 |" in table


def test_one_task_has_no_transfer():
    report = ContinualReport(("a",), np.array([[0.25], [0.5]]))
    assert report.average_accuracy == 0.5
    assert math.isnan(report.backward_transfer) and math.isnan(report.forward_transfer)
    assert math.isnan(report.forgetting)


def test_metrics_wait_for_the_last_stage():
    report = ContinualReport(TASKS, HAND_MADE.accuracy[:3])
    for metric in ("average_accuracy", "backward_transfer", "forward_transfer", "forgetting"):
        with pytest.raises(ValueError, match="2 of 3 stages"):
            getattr(report, metric)
    assert "metric" not in report.markdown()


@pytest.mark.parametrize("shape", [(0, 3), (5, 3), (2, 2), (3,)])
def test_a_matrix_of_another_shape_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"shape \[.*\] for 3 tasks"):
        ContinualReport(TASKS, np.zeros(shape))


class Stopped(Exception):
    pass


@dataclasses.dataclass
class Learner:
    """A state is the tuple of tasks seen; its accuracy tells order and number of them.

    Attributes:
        stop_at: which call of any kind fails, counted from 0.
    """

    folder: Path
    stop_at: int | None = None
    calls: list[str] = dataclasses.field(default_factory=list)

    def _call(self, what: str) -> None:
        if self.stop_at == len(self.calls):
            raise Stopped
        self.calls.append(what)

    def train(self, state: tuple[str, ...], task: str) -> tuple[str, ...]:
        self._call(f"train {task}")
        return (*state, task)

    def evaluate(self, state: tuple[str, ...], task: str) -> float:
        self._call(f"evaluate {task}")
        return len(state) + (state.index(task) + 1) / 16 if task in state else -len(state)

    def save(self, state: tuple[str, ...], task: str) -> None:
        self._call(f"save {task}")
        (self.folder / task).write_text(",".join(state))

    def restore(self, task: str) -> tuple[str, ...]:
        return tuple((self.folder / task).read_text().split(","))

    def run(self, tasks=TASKS) -> ContinualReport:
        records = Records(self.folder / "report.json", self.save, self.restore)
        return run_continual(tasks, (), self.train, self.evaluate, records)


def test_stages_run_in_order_and_fill_the_matrix(tmp_path: Path):
    learner = Learner(tmp_path)
    report = run_continual(TASKS, (), learner.train, learner.evaluate)
    expected = [
        [0, 0, 0],
        [1 + 1 / 16, -1, -1],
        [2 + 1 / 16, 2 + 2 / 16, -2],
        [3 + 1 / 16, 3 + 2 / 16, 3 + 3 / 16],
    ]
    np.testing.assert_array_equal(report.accuracy, expected)
    assert [call for call in learner.calls if "train" in call] == ["train a", "train b", "train c"]


def test_a_run_stopped_anywhere_goes_on(tmp_path: Path):
    (tmp_path / "whole").mkdir()
    whole = Learner(tmp_path / "whole")
    expected = whole.run()
    for stop_at in range(len(whole.calls)):
        folder = tmp_path / str(stop_at)
        folder.mkdir()
        with pytest.raises(Stopped):
            Learner(folder, stop_at).run()
        second = Learner(folder)
        np.testing.assert_array_equal(second.run().accuracy, expected.accuracy)
        # 3 calls before training, then 5 a stage: whole stages are not done again.
        begun = 0 if stop_at < 3 else 3 + (stop_at - 3) // 5 * 5
        assert second.calls == whole.calls[begun:]
    again = Learner(tmp_path / "whole")
    np.testing.assert_array_equal(again.run().accuracy, expected.accuracy)
    assert again.calls == []


def test_the_folder_of_a_report_is_made(tmp_path: Path):
    path = tmp_path / "new" / "report.json"
    ContinualReport(("a",), np.zeros((1, 1))).save(path)
    assert ContinualReport.load(path).stages_done == 0


def test_mistakes_are_one_line(tmp_path: Path):
    Learner(tmp_path).run()
    with pytest.raises(ValueError, match=r"\['a', 'b', 'c'\], this run \['c', 'a'\]"):
        Learner(tmp_path).run(("c", "a"))
    for tasks in ((), ("a", "a")):
        with pytest.raises(ValueError, match="give one or more, each once"):
            Learner(tmp_path).run(tasks)
    for content in ("[]", "not json", '{"tasks": ["a"]}'):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(ValueError, match=r"report.json is no report") as error:
            Learner(tmp_path).run()
        assert "\n" not in str(error.value)

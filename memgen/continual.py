"""Continual learning: train a model on several tasks in sequence, and measure forgetting."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from memgen.short_repr import ShortRepr

State = TypeVar("State")


@dataclasses.dataclass(frozen=True, repr=False)
class ContinualReport(ShortRepr):
    """Accuracy on every task after every training stage, and the metrics computed from it.

    There are `T` tasks, and stage `k` trains on task `k`. The formulas count stages and tasks from
    1: `R[i, j]` is the accuracy on task `j` after stage `i`, and `R[0, j]` the accuracy before any
    training. All metrics have the unit of the accuracies, and raise a ValueError if a stage is
    unfinished.

    Attributes:
        tasks: Names of the tasks, in the order of training.
        accuracy: `[stages_done + 1, T]` float64 accuracies. Row 0 precedes any training.
    """

    tasks: tuple[str, ...]
    accuracy: np.ndarray

    def __post_init__(self):
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "accuracy", np.asarray(self.accuracy, np.float64))
        rows, count = len(self.accuracy), len(self.tasks)
        if self.accuracy.shape != (rows, count) or not 1 <= rows <= count + 1:
            raise ValueError(
                f"accuracy of shape {list(self.accuracy.shape)} for {count} tasks: give one "
                f"column for each task, and a row before training and after each stage"
            )

    @property
    def stages_done(self) -> int:
        """Number of finished stages."""
        return len(self.accuracy) - 1

    @property
    def average_accuracy(self) -> float:
        """Mean final accuracy `1/T · Σ_j R[T, j]` (ACC, Lopez-Paz & Ranzato 2017, 1706.08840)."""
        return float(self._whole()[-1].mean())

    @property
    def backward_transfer(self) -> float:
        """Mean change of a task's accuracy between its own stage and the last stage.

        This is BWT of Lopez-Paz & Ranzato 2017, `1/(T−1) · Σ_{j<T} (R[T, j] − R[j, j])`. A negative
        value means forgetting. NaN for a single task.
        """
        learned = np.diagonal(self._whole()[1:])
        return _mean((self.accuracy[-1] - learned)[:-1])

    @property
    def forward_transfer(self) -> float:
        """Mean change of a task's accuracy through the stages before its own stage.

        This is FWT of Lopez-Paz & Ranzato 2017, `1/(T−1) · Σ_{j>1} (R[j−1, j] − R[0, j])`. In their
        paper, the baseline R[0, j] is the accuracy of a random initialisation. Here the baseline is
        the accuracy before stage 1: for latent memory in a pretrained model, that model's accuracy.
        NaN for a single task.
        """
        just_before = np.diagonal(self._whole()[:-1])
        return _mean((just_before - self.accuracy[0])[1:])

    @property
    def forgetting(self) -> float:
        """Mean drop of a task's accuracy from its best value at an earlier stage to the last stage.

        This is `1/(T−1) · Σ_{j<T} (max_{1≤i<T} R[i, j] − R[T, j])` (Chaudhry et al. 2018,
        1801.10112). Unlike in backward transfer, the best value may be from a stage before the
        task's own. NaN for a single task.
        """
        accuracy = self._whole()
        if len(self.tasks) == 1:
            return float("nan")
        return _mean((accuracy[1:-1].max(axis=0) - accuracy[-1])[:-1])

    def markdown(self, digits: int = 2) -> str:
        """Format the accuracies, and after the last stage also the metrics, as Markdown tables.

        The accuracy on each task after the task's own stage is in bold.

        Args:
            digits: Number of decimal places.
        """
        lines = [
            "| after training on | " + " | ".join(self.tasks) + " |",
            "|---|" + "---:|" * len(self.tasks),
        ]
        for stage, row in enumerate(self.accuracy):
            name = "–" if stage == 0 else self.tasks[stage - 1]
            cells = [f"{value:.{digits}f}" for value in row]
            if stage:
                cells[stage - 1] = f"**{cells[stage - 1]}**"
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        if self.stages_done == len(self.tasks):
            metrics = (
                ("average accuracy", self.average_accuracy, ""),
                ("backward transfer", self.backward_transfer, "+"),
                ("forward transfer", self.forward_transfer, "+"),
                ("forgetting", self.forgetting, ""),
            )
            lines += ["", "| metric | value |", "|---|---:|"]
            lines += [f"| {name} | {value:{sign}.{digits}f} |" for name, value, sign in metrics]
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write the report as JSON, atomically: a reader sees the old file or the new one.

        A missing folder is made.
        """
        content = json.dumps({"tasks": self.tasks, "accuracy": self.accuracy.tolist()})
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(content + "\n", encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> "ContinualReport":
        """Read a file that `save` wrote; raise a ValueError for any other file."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(content["tasks"], content["accuracy"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is no report of continual learning ({error}): choose another file"
            ) from error

    def _whole(self) -> np.ndarray:
        if self.stages_done < len(self.tasks):
            raise ValueError(
                f"{self.stages_done} of {len(self.tasks)} stages are done: finish the run first"
            )
        return self.accuracy


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


@dataclasses.dataclass(frozen=True)
class Records(Generic[State]):
    """Report file and save/restore functions, with which `run_continual` resumes a stopped run.

    Attributes:
        report: Path of the report's JSON file, which is written before the first stage and after
            every stage.
        save: Function `save(state, task)` that saves the state after training on a task. If a run
            stops before the report is written, the resumed run calls `save` again for that task.
        restore: Function `restore(task)` that returns the state that was saved after a task.
    """

    report: Path
    save: Callable[[State, str], None]
    restore: Callable[[str], State]


def run_continual(
    tasks: Sequence[str],
    state: State,
    train: Callable[[State, str], State],
    evaluate: Callable[[State, str], float],
    records: Records[State] | None = None,
) -> ContinualReport:
    """Train a state on the tasks in order, and evaluate the state on all tasks after each stage.

    With records, a stopped run resumes after its last finished stage, and a finished run returns
    its saved report without training.

    Args:
        tasks: Names of the tasks, in the order of training.
        state: State before any training, such as a model, of any type that `train` accepts.
        train: Function from a state and a task to the state after training on the task.
        evaluate: Function from a state and a task to the accuracy of the state on the task.
        records: Report file and functions that save and restore states; None for a run that can't
            be resumed.

    Returns:
        Report of the accuracies before training and after each stage.

    Raises:
        ValueError: There are no tasks, a task occurs twice, or the report file exists and is not a
            report of these tasks.
    """
    tasks = tuple(tasks)
    if not tasks or len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks {list(tasks)}: give one or more, each once")
    accuracy: list[list[float]] = []
    if records is not None and records.report.exists():
        earlier = ContinualReport.load(records.report)
        if earlier.tasks != tasks:
            raise ValueError(
                f"{records.report} has the tasks {list(earlier.tasks)}, this run {list(tasks)}: "
                f"choose another file, or the same tasks"
            )
        accuracy = earlier.accuracy.tolist()
        if 0 < earlier.stages_done < len(tasks):
            state = records.restore(tasks[earlier.stages_done - 1])
    for stage in range(len(accuracy), len(tasks) + 1):
        if stage > 0:
            state = train(state, tasks[stage - 1])
            if records is not None:
                records.save(state, tasks[stage - 1])
        accuracy.append([float(evaluate(state, task)) for task in tasks])
        if records is not None:
            ContinualReport(tasks, np.array(accuracy)).save(records.report)
    return ContinualReport(tasks, np.array(accuracy))

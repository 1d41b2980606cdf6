"""Score tasks: accuracies and perplexities with standard errors, and a record of every answer."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.evaluation.scoring import Score, Scorer
from train.evaluation.task_files import Item, Task
from train.runs.files import write_atomically


@dataclasses.dataclass(frozen=True)
class Answer:
    """An item and the scores of its choices.

    Attributes:
        item: Item of a task.
        scores: Scores in the order of the item's choices.
    """

    item: Item
    scores: tuple[Score, ...]

    def pick(self, lengths: Sequence[float] | None = None) -> int:
        """Return the index of the choice with the highest log-probability per unit of length.

        Args:
            lengths: Length of each choice, by which its log-probability is divided; None compares
                the log-probabilities themselves.
        """
        log_probs = np.array([score.log_prob for score in self.scores])
        return int(np.argmax(log_probs if lengths is None else log_probs / np.array(lengths)))

    def metrics(self) -> dict[str, float]:
        """Compute the accuracies of the item, each 0 or 1.

        Returns:
            Accuracies by name, with choices ranked by log-probability (`acc`), by log-probability
            per character (`acc_norm`), and by log-probability per UTF-8 byte (`acc_bytes`).
        """
        gold, choices = self.item.gold, self.item.choices
        return {
            "acc": float(self.pick() == gold),
            "acc_norm": float(self.pick([len(choice) for choice in choices]) == gold),
            "acc_bytes": float(self.pick([len(choice.encode()) for choice in choices]) == gold),
        }

    def record(self, task: str, cloze: bool) -> dict[str, Any]:
        """Convert the answer to a dict for a line of JSON.

        Args:
            task: Name of the task.
            cloze: Whether the item is a cloze.
        """
        item = self.item
        record: dict[str, Any] = {"task": task, "line": item.line, "context": item.context}
        if cloze:
            [score], [target] = self.scores, item.choices
            found = {"log_prob": score.log_prob, "tokens": score.tokens, "greedy": score.greedy}
            return record | {"target": target} | found
        return record | {
            "choices": item.choices,
            "gold": item.gold,
            "chosen": self.pick(),
            "log_probs": [score.log_prob for score in self.scores],
            "greedy": [score.greedy for score in self.scores],
            **self.metrics(),
        }


def answers(scorer: Scorer, tasks: Sequence[Task]) -> list[list[Answer]]:
    """Score the items of tasks, with the rows of all tasks in the same batches.

    Args:
        scorer: Scorer of the model.
        tasks: Tasks whose items are scored.

    Returns:
        Answers to the items of each task, in the order of tasks and items.

    Raises:
        ValueError: An item can't be scored (`Scorer.row`). The message names its file and line,
            and is raised before any item is scored.
    """
    rows = []
    for task in tasks:
        for item in task.items:
            try:
                rows += [scorer.row(item.context, text) for text in item.continuations]
            except ValueError as error:
                raise ValueError(f"{task.path}, line {item.line}: {error}") from error
    scores = iter(scorer.score(rows))
    return [
        [Answer(item, tuple(next(scores) for _ in item.choices)) for item in task.items]
        for task in tasks
    ]


def summary(task: Task, found: Sequence[Answer]) -> dict[str, Any]:
    """Compute the metrics of a task and their standard errors.

    Args:
        task: Task of the answers.
        found: Answers to all items of the task.

    Returns:
        Dict with `file`, `format` and `count` (number of items), and the metrics. Multiple choice
        has the means of `Answer.metrics`. A cloze has `acc`, the fraction of targets that greedy
        decoding writes, and `perplexity`, exp of the mean negative log-likelihood of a target.
        `NAME_stderr` is the standard error of NAME (by the delta method for `perplexity`), or None
        for a single item.
    """
    result: dict[str, Any] = {
        "file": str(task.path),
        "format": task.format,
        "count": len(found),
    }
    if not task.cloze:
        columns = [answer.metrics() for answer in found]
        for name in columns[0]:
            result |= _with_error(name, [column[name] for column in columns])
        return result
    scores = [answer.scores[0] for answer in found]
    result |= _with_error("acc", [float(score.greedy) for score in scores])
    nats = _with_error("nats", [-score.log_prob for score in scores])
    perplexity, error = math.exp(min(nats["nats"], 700.0)), nats["nats_stderr"]
    spread = None if error is None else perplexity * error
    return result | {"perplexity": perplexity, "perplexity_stderr": spread}


def _with_error(name: str, values: Sequence[float]) -> dict[str, Any]:
    count = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else None
    return {name: float(np.mean(values)), f"{name}_stderr": error}


def task_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Format a text table with a line for each metric of each task.

    Args:
        summaries: Mapping from the name of a task to the result of `summary`.
    """
    width = max(len("task"), *map(len, summaries))
    lines = [f"{'task':{width}}  {'items':>6}  {'metric':10}  {'value':>9}   standard error"]
    for name, found in summaries.items():
        for metric in ("acc", "acc_norm", "acc_bytes", "perplexity"):
            if metric in found:
                error = found[f"{metric}_stderr"]
                lines.append(
                    f"{name:{width}}  {found['count']:6}  {metric:10}  {found[metric]:9.4f} ± "
                    f"{'unknown' if error is None else format(error, '.4f')}"
                )
    return "\n".join(lines)


def check_output(path: Path) -> None:
    """Check before any work that a file can be written at a path.

    Raises:
        ValueError: The path is a folder, or the folder of the file does not exist.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{path} can't be written: it is a folder, or its folder does not exist")


def write_results(path: Path, result: Mapping[str, Any]) -> None:
    """Write results, such as summaries of tasks, as indented JSON."""
    write_atomically(path, json.dumps(result, indent=2) + "\n")


def write_records(path: Path, tasks: Sequence[Task], found: Sequence[Sequence[Answer]]) -> None:
    """Write every answer of every task as a line of JSON (`Answer.record`)."""
    records = [
        answer.record(task.name, task.cloze)
        for task, answers in zip(tasks, found, strict=True)
        for answer in answers
    ]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))

"""Files of `thoughtbubbles probe`: how often a model solves each problem of a task."""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from train.data.json_lines import read_json_lines

_HEAD = b'{"probe": '  # of the first line, as `append_lines` writes it


@dataclasses.dataclass(frozen=True)
class Probed:
    """Result of a probe for one problem: one line of the file.

    Attributes:
        uid: Name of the problem (`Problem.uid`).
        correct: Number of sampled responses that solve the problem.
        samples: Number of sampled responses.
    """

    uid: str
    correct: int
    samples: int


def read_probe(path: str | Path) -> tuple[dict[str, Any], list[Probed]]:
    """Read a file of `thoughtbubbles probe`.

    Returns:
        The options of the probe, and the results of all problems that have been probed so far.

    Raises:
        ValueError: The file does not exist, or was not written by `thoughtbubbles probe`.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"probe {path}: no such file: make it with `thoughtbubbles probe`")
    lines = [line.fields for line in read_json_lines(file)]
    try:
        return dict(lines[0]["probe"]), [Probed(**line) for line in lines[1:]]
    except (IndexError, KeyError, TypeError):
        raise ValueError(f"{path} is no file of `thoughtbubbles probe`: give one") from None


def drop_half_line(path: str | Path) -> None:
    """Remove the incomplete last line of a probe's file, which an interrupted probe may leave.

    A file that does not begin as a probe's file does is left alone.
    """
    whole = Path(path).read_bytes()
    kept = whole.rfind(b"\n") + 1
    if kept < len(whole) and whole[: len(_HEAD)] == _HEAD[: len(whole)]:
        os.truncate(path, kept)


def append_lines(path: str | Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append dicts to the file of a probe, each as a line of JSON."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def unsolved_problems(path: str | Path, task: Any) -> frozenset[str]:
    """Return the names of the training problems that the probed model never solved.

    Args:
        path: File of the probe.
        task: Task that was probed.

    Raises:
        ValueError: The file does not exist, was not written by `thoughtbubbles probe`, is of
            another task, or lacks some of this task's training problems.
    """
    _, problems = read_probe(path)
    uids = {problem.uid for problem in problems}
    size = task.sizes["train"] or 1
    missing = sum(task.problem("train", index).uid not in uids for index in range(size))
    first = task.problem("train", 0).uid
    if first not in uids:
        raise ValueError(
            f"probe {path} has no problem {first!r}, the first of {task.name}: it is of another "
            "task or seed; probe this one"
        )
    if missing:
        raise ValueError(
            f"probe {path} has {size - missing} of the {size} training problems of {task.name}: "
            "run `thoughtbubbles probe` again, it goes on where it stopped"
        )
    return frozenset(problem.uid for problem in problems if not problem.correct)

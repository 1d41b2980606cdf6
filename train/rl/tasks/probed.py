"""Files of `thoughtbubbles probe`: how often a model solves each problem of a task."""

import dataclasses
from pathlib import Path
from typing import Any

from train.data.json_lines import read_json_lines
from train.runs.appended import begins_with

is_probe = begins_with(b'{"probe": ')
"""Function that says of a file's first line whether `thoughtbubbles probe` wrote it."""

WITHOUT_MODEL = "was written by an earlier version, which did not note its model"
"""Words for a file that no probe goes on with."""


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
        The options of the probe, with the fingerprint of its model as `model` (which files of
        earlier versions lack); and the results of all problems that have been probed so far.

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


def unsolved_problems(path: str | Path, task: Any) -> frozenset[str]:
    """Return the names of the training problems that the probed model never solved.

    Args:
        path: File of the probe.
        task: Task that was probed.

    Raises:
        ValueError: The file does not exist, was not written by `thoughtbubbles probe`, is of
            another task, or lacks some of this task's training problems.
    """
    options, problems = read_probe(path)
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
        way_out = "run `thoughtbubbles probe` again, it goes on where it stopped"
        if "model" not in options:
            way_out = f"it {WITHOUT_MODEL}, so probe all into another file"
        raise ValueError(
            f"probe {path} has {size - missing} of the {size} training problems of {task.name}: "
            f"{way_out}"
        )
    return frozenset(problem.uid for problem in problems if not problem.correct)

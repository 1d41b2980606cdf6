"""The file of an experiment: one finished run a line, so that it can be interrupted."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The results in a file, in the order they were finished."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]


class Results:
    """Finished runs, one JSON object a line; what is in the file need not be run again.

    Args:
        path: made with its folder when the first run is finished.
        key: names of the entries that make two results the same run.
    """

    def __init__(self, path: str | Path, key: Sequence[str]):
        self._path, self._key = Path(path), tuple(key)
        self.found = read_results(path) if self._path.exists() else []

    def __contains__(self, run: dict[str, Any]) -> bool:
        mine = [run[name] for name in self._key]
        return any([found[name] for name in self._key] == mine for found in self.found)

    def add(self, result: dict[str, Any]) -> None:
        """Append a finished run."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        self.found.append(result)

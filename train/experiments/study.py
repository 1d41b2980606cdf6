"""Shared parts of experiments: results on disk, missing runs, means with errors, tables."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from train.cli.config_json import as_json
from train.cli.numbers import check_least
from train.data.config import DataError
from train.data.json_lines import read_json_lines
from train.runs.appended import append_objects, begins_with, drop_half_line, object_of
from train.runs.files import check_new_file, check_regular
from train.runs.metadata import load_run_meta

INDEX: Mapping[str, Any] = MappingProxyType({"index": True})
"""Dataclass field metadata of an integer option that may be 0, such as an index."""

Result = dict[str, Any]
Config = TypeVar("Config", bound="StudyConfig")


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Options of every experiment that keeps its results in a file.

    Attributes:
        seeds: Seeds of the runs; each arm is run once with each seed.
        out: File that results are appended to, one JSON object on each line; runs that the file
            has already are skipped.
        report: File of results to print as a table, without training.

    Raises:
        ValueError: A number is too small, or a list is empty (`check_options`).
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    out: str = "results.jsonl"
    report: str | None = None

    def __post_init__(self):
        check_options(self)


def check_options(config: Any) -> None:
    """Check an experiment's options before training begins.

    Counts (integers that are positive by default, without the metadata `INDEX`) must be at least 1,
    and all other numbers at least 0. A list that is not empty by default must not be empty.

    Args:
        config: Config dataclass of the experiment; its string options are not checked here.

    Raises:
        ValueError: A number is too small, or a list is empty.
    """
    for field in dataclasses.fields(config):
        default = field.default if isinstance(field.default, tuple) else (field.default,)
        if isinstance(field.default, tuple) and default and getattr(config, field.name) == ():
            raise ValueError(f"{field.name} is empty: name at least one, such as {default[0]}")
        if default and all(type(item) in (int, float) for item in default):
            counted = all(type(item) is int and item > 0 for item in default)
            counted = counted and "index" not in field.metadata
            check_least(config, **{field.name: int(counted)})


def check_names(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Check the names that an option lists.

    Args:
        kind: Noun for the error message, such as "arm" or "variant".
        names: Names that the option lists.
        known: All valid names.

    Raises:
        ValueError: A name is not valid; the message lists the valid names.
    """
    known = tuple(known)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}: choose from {', '.join(known)}")


def read_results(path: str | Path) -> list[Result]:
    """Read the results in a file, in the order in which they were finished.

    Behind whole results, a last line that an interruption has left incomplete is no result.

    Args:
        path: File of results, one JSON object on each line.

    Raises:
        DataError: The file can't be read, or another line is not a JSON object.
    """
    found: list[Result] = []
    try:
        found.extend(line.fields for line in read_json_lines(Path(path)))
    except DataError:
        if not found:
            raise
        *whole, last = filter(bytes.strip, Path(path).read_bytes().splitlines(keepends=True))
        if len(whole) != len(found) or last.endswith(b"\n"):
            raise
    return found


class Results:
    """File of finished runs, one JSON object on each line, from which a study can be resumed.

    The attribute `found` lists the results in the order in which they were finished. `run in
    results` is True if the run is finished, which means that a result has the same values as the
    run in all entries `key`. An entry that a result lacks counts as None. A last line that an
    interruption has left incomplete is dropped, so that its run is trained again.

    Args:
        path: Path of the file; file and folder are created when the first run is finished.
        key: Names of the entries that identify a run.

    Raises:
        ValueError: The file can't be created or read, or a line of the file is not a JSON object.
    """

    def __init__(self, path: str | Path, key: Sequence[str]):
        self._path, self._key = Path(path), tuple(key)
        check_regular(self._path)
        if not self._path.exists():
            check_new_file(self._path)
        drop_half_line(self._path, self._is_own)
        lines = read_json_lines(self._path) if self._path.exists() else ()
        self.found: list[Result] = [line.fields for line in lines]  # no half line: not its own

    def __contains__(self, run: Mapping[str, Any]) -> bool:
        entries = [run[name] for name in self._key]
        return any([found.get(name) for name in self._key] == entries for found in self.found)

    def missing(self, runs: Iterable[Result]) -> list[Result]:
        """Return the runs that are not finished, in order and without duplicates.

        Args:
            runs: Dicts that have at least the entries `key`.
        """
        found: list[Result] = []
        for run in runs:
            if run not in self and run not in found:
                found.append(run)
        return found

    def add(self, result: Result) -> None:
        """Append a finished run to the file."""
        append_objects(self._path, [result], self._is_own)
        self.found.append(result)

    def _is_own(self, first: bytes) -> bool:
        result = object_of(first)
        if result is None:
            return any(begins_with(f'{{"{name}"'.encode())(first) for name in self._key)
        return any(name in result for name in self._key)


def run_study(
    config: Config,
    key: Sequence[str],
    train: Callable[[Config, Results], Iterator[tuple[Result, str]]],
    report: Callable[[list[Result]], str],
    settings: Sequence[str] = (),
) -> None:
    """Train the runs that the file of results lacks, or print its table if `config.report` is set.

    Args:
        config: Options of the study.
        key: Names of the entries that identify a run.
        train: Function that trains each missing run and yields its result and a line to print.
        report: Function that formats all results as text.
        settings: Names of options that are not in `key`, and that all results of a file must share.
            Each result stores their values under "settings"; a result without this entry is not
            checked.

    Raises:
        ValueError: The file can't be created or read, has results of other settings, or its results
            can't be shown (`report_text`).
    """
    if config.report is not None:
        print(report_text(config.report, key, report))
        return
    results = Results(config.out, key)
    shared = {name: as_json(getattr(config, name)) for name in settings}
    for name, now in shared.items():
        for found in results.found:
            if (was := found.get("settings", shared).get(name, now)) != now:
                raise ValueError(
                    f"{config.out} has results of {name}={was}, now it is {now}: choose another "
                    "file"
                )
    for result, line in train(config, results):
        results.add(result | ({"settings": shared} if shared else {}))
        print(line, flush=True)


def report_text(path: str | Path, key: Sequence[str], report: Callable[[list[Result]], str]) -> str:
    """Read a file of results and format its report, from the last result of each run.

    Args:
        path: File of results.
        key: Names of the entries that identify a run.
        report: Function that formats all results as text; it raises a ValueError for results that
            it can't show.

    Raises:
        ValueError: The file can't be read, has no results, has the results of another experiment,
            or was edited.
    """
    results = read_results(path)
    if not results:
        raise ValueError(f"{path} has no results: name a file that this experiment has written")
    for number, result in enumerate(results, 1):
        if missing := [name for name in key if name not in result]:
            raise ValueError(
                f"{path} has no results of this experiment (result {number} lacks {missing[0]!r}): "
                "name a file that it has written"
            )
    # Two calls at once, or joined files, may have made a run twice; twice is no smaller error.
    latest = {json.dumps([result[name] for name in key]): result for result in results}
    try:
        return report(list(latest.values()))
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} has a result that was not written so ({type(error).__name__}: {error}): write "
            "the file anew"
        ) from error


def check_finished(folder: str | Path, steps: int) -> None:
    """End the experiment with exit status 1 if a signal has stopped its run before the last step.

    An incomplete run must not count as a result. A run without a checkpoint is incomplete.

    Args:
        folder: Run folder.
        steps: Number of steps of the whole run.

    Raises:
        SystemExit: The newest checkpoint is of an earlier step, or there is none.
        ValueError: The metadata of the checkpoint are damaged.
    """
    meta = load_run_meta(folder)
    if meta is None or meta["step"] < steps:
        raise SystemExit(1)


def standard_error(values: Sequence[float]) -> float:
    """Compute the standard error of the mean of some values; NaN for fewer than two values."""
    return float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def mean_or_none(values: Sequence[float]) -> float | None:
    """Compute the mean of some values; None without values, since JSON has no NaN."""
    return float(np.mean(values)) if values else None


def mean_text(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Format a mean with its standard error, such as `1.26 ± 0.04`.

    Args:
        values: Values, one for each seed. A single value is shown without an error; without values
            the text is empty.
        digits: Number of digits after the decimal point.
        sign: "+" to print the sign of a positive mean too.
    """
    if not values:
        return ""
    mean = f"{np.mean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {standard_error(values):.{digits}f}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    row = lambda cells: f"| {' | '.join(cells)} |"  # noqa: E731
    return [row(head), "|---" * len(head) + "|", *map(row, rows)]


def by_key(results: Iterable[Result], *key: str) -> dict[tuple[Any, ...], list[Result]]:
    """Group results by their values of the entries `key`.

    Returns:
        Mapping from a tuple of values to the results with these values, in order of first
        appearance.
    """
    found: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        found.setdefault(tuple(result[name] for name in key), []).append(result)
    return found


def differing(results: Sequence[Result], names: Iterable[str]) -> list[str]:
    """Return those entries `names` in which some results differ, for a report to keep apart."""
    return [name for name in names if any(each[name] != results[0][name] for each in results)]


def settings_text(result: Result, names: Sequence[str]) -> str:
    """Format the entries `names` of a result to stand behind a name, such as " (steps 60)"."""
    return f" ({', '.join(f'{name} {result[name]}' for name in names)})" if names else ""


def seeds_text(results: Iterable[Result]) -> str:
    """Format the seeds of some results without duplicates, for a cell of a table."""
    return " ".join(dict.fromkeys(str(result["seed"]) for result in results))

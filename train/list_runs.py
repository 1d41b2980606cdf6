"""Compare run folders: thoughtbubbles runs runs/a runs/b [--figure curves.png]."""

import dataclasses
import glob
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from train.cli.command import run_command
from train.cli.figures import check_figure
from train.runs.files import reason_of
from train.runs.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # characters of a curve in the terminal


@dataclasses.dataclass(frozen=True)
class RunsConfig:
    """Compare run folders: the options that differ, the last metrics, and a curve of each run.

    Attributes:
        folders: Run folders, or folders that hold run folders.
        metric: Name in `metrics.jsonl` of the metric to draw (`loss`, `eval/loss`, `reward`,
            `fork_1/forked_share`, ...). A prefix that ends in a slash, such as `budget/`, selects
            all metrics whose names begin with the prefix.
        figure: File to save all curves in, as .png, .pdf or .svg (needs matplotlib); none by
            default.
    """

    folders: tyro.conf.Positional[tuple[str, ...]]
    metric: str = "loss"
    figure: str | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """Config and metrics of a run folder.

    Attributes:
        folder: The run folder.
        config: Mapping from dotted names, such as "optimizer.learning_rate", to the run's options.
        metrics: Lines of `metrics.jsonl`, oldest first.
    """

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """Return the steps at which the metric was written, and its values at these steps."""
        points = [
            (line["step"], float(line[metric]))
            for line in self.metrics
            if isinstance(line.get(metric), (int, float))
        ]
        return [step for step, _ in points], [value for _, value in points]

    def last(self) -> dict[str, float]:
        """Return the last value of each loss, the reward and the success rate, keyed by metric.

        Metrics that the run has not written are left out.
        """
        names = ("loss", "eval/loss", "eval/bits_per_byte", "reward", "eval/success")
        found = ((name, self.curve(name)[1]) for name in names)
        return {name: values[-1] for name, values in found if values}


def main(config: RunsConfig) -> None:
    """Print a table and the curves of the runs, and save `config.figure` if it is given."""
    if config.figure:
        check_figure(Path(config.figure))
    runs = read_runs(config.folders)
    known = sorted({name for run in runs for line in run.metrics for name in line} - {"step"})
    chosen = metrics_of(config.metric, known)
    if known and not chosen:
        raise ValueError(f"metric={config.metric!r}: no run has it, they have {', '.join(known)}")
    print(table(runs))
    width = max(len(str(run.folder)) for run in runs)
    chosen = chosen or [config.metric]
    for metric in chosen:
        print(f"\n{metric}:")
        for run in runs:
            print(f"  {run.folder!s:<{width}}  {sparkline(run.curve(metric)[1])}")
    if config.figure:
        figure = draw_below(runs, chosen) if len(chosen) > 1 else draw(runs, chosen[0])
        figure.savefig(config.figure, dpi=150)
        print(f"figure: {Path(config.figure).absolute()}")


def metrics_of(name: str, known: Sequence[str]) -> list[str]:
    """Return the metrics in `known` that equal `name`, or start with it if it ends in "/"."""
    if name.endswith("/"):
        return [metric for metric in known if metric.startswith(name)]
    return [name] if name in known else []


def run_folders(given: Sequence[str]) -> list[Path]:
    """Find run folders among the given folders and directly inside of them.

    Args:
        given: Run folders, or folders that hold run folders.

    Returns:
        Run folders, in the order of `given`; run folders inside one folder are sorted by name.

    Raises:
        ValueError: `given` is empty, or a folder neither is a run folder nor holds one.
    """
    if not given:
        raise ValueError("no folder is given: name run folders, or a folder that holds some")
    found: list[Path] = []
    for name in given:
        path = Path(name).expanduser()
        # Unlike pathlib, glob and os.path accept names that are too long for the file system.
        files = glob.glob(os.path.join(glob.escape(str(path)), "*", "config.json"))
        below = sorted(Path(file).parent for file in files if os.path.isfile(file))
        runs = [path] if os.path.isfile(path / "config.json") else below
        if not runs:
            raise ValueError(f"{path} holds no run (config.json): name the --out of a run")
        found += runs
    return found


def read_runs(given: Sequence[str]) -> list[Run]:
    """Read the runs of `run_folders`; a damaged run that is not in `given` is left out with a note.

    Raises:
        ValueError: `run_folders` raises one, a run in `given` is damaged, or all are.
    """
    named, runs, damaged = [Path(name).expanduser() for name in given], [], []
    for folder in run_folders(given):
        try:
            runs.append(read_run(folder))
        except ValueError as error:
            if folder in named:
                raise
            damaged.append(error)
    if damaged and not runs:
        raise damaged[0]
    for error in damaged:
        print(f"note: {error}", file=sys.stderr)
    return runs


def read_run(folder: Path) -> Run:
    """Read the config and the metrics of a run folder; without a metrics file, none are read.

    Raises:
        ValueError: A file of the folder is damaged, or is none of a run.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is no config of a run ({reason_of(error)}): leave {folder} out"
        ) from error
    logged = (folder / "metrics.jsonl").is_file()
    return Run(folder, flat(config), read_metrics(folder) if logged else [])


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested dict: nested keys are joined by dots, and `prefix` precedes every key."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return found


def table(runs: Sequence[Run]) -> str:
    """Format a text table with a row for each run.

    Columns are the run's last step, its last metrics (`Run.last`), and the options whose values
    differ between the runs, except `out`.
    """
    options = list(dict.fromkeys(name for run in runs for name in run.config))
    differing = [
        name
        for name in options
        if name != "out" and len({repr(run.config.get(name)) for run in runs}) > 1
    ]
    metrics = list(dict.fromkeys(name for run in runs for name in run.last()))
    rows = [["run", "step", *metrics, *differing]]
    for run in runs:
        last = run.last()
        step = run.metrics[-1]["step"] if run.metrics else 0
        values = [f"{last[name]:.4f}" if name in last else "" for name in metrics]
        rows.append(
            [str(run.folder), str(step), *values, *(str(run.config.get(n, "")) for n in differing)]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def sparkline(values: Sequence[float]) -> str:
    """Format a curve as one line of text: first value, a plot in block characters, last value."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "nothing logged"
    low, high = min(finite), max(finite)
    picked = (
        [values[i * len(values) // WIDTH] for i in range(WIDTH)] if len(values) > WIDTH else values
    )
    top = len(BARS) - 1
    bars = (
        BARS[round(top * (value - low) / ((high - low) or 1))] if math.isfinite(value) else "×"
        for value in picked
    )
    return f"{values[0]:.4f} {''.join(bars)} {values[-1]:.4f}"


def draw(runs: Sequence[Run], metric: str) -> "Figure":
    """Draw one metric of all runs as curves in one panel. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        axes.plot(*run.curve(metric), label=str(run.folder), linewidth=1.2)
    axes.set(xlabel="step", ylabel=metric)
    axes.legend(fontsize=8)
    return figure


def draw_below(runs: Sequence[Run], metrics: Sequence[str]) -> "Figure":
    """Draw several metrics as curves, one panel for each run. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 2.5 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for run, axes in zip(runs, panels, strict=True):
        for metric in metrics:
            axes.plot(*run.curve(metric), ".-", label=metric, linewidth=1.0, markersize=3)
        axes.set(title=str(run.folder))
    panels[-1].set(xlabel="step")
    panels[0].legend(fontsize=7, ncols=2)
    return figure


def command() -> None:
    run_command(main, RunsConfig)


if __name__ == "__main__":
    command()

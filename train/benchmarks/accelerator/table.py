"""Format the results of the accelerator benchmark as Markdown tables."""

from pathlib import Path
from typing import Any

from train.benchmarks.accelerator.record import read


def tables(folder: Path, parts: tuple[str, ...]) -> str:
    """Format a Markdown table for each part that has results.

    Args:
        folder: Folder of the results.
        parts: Names of the parts, in the order of the tables.

    Raises:
        ValueError: The folder holds no results, or a damaged file.
    """
    texts = [table(data) for part in parts if (data := read(folder, part))]
    if not texts:
        raise ValueError(f"{folder} holds no results: run the benchmark first")
    return "\n\n".join(texts)


def table(data: dict[str, Any]) -> str:
    """Format a part's file (see `read`) as a heading and a table, a row for each measurement.

    Lists, such as loss curves, are left out.
    """
    rows = {name: cells(found) for name, found in data["measurements"].items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    state = "" if data["finished"] else ", not finished"
    lines = [
        f"### {data['part']} ({data['device']}, jax {data['jax']}{state})",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(row.get(c, "") for c in columns) + " |")
    return "\n".join(lines)


def cells(found: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Format a measurement's entries by column; a nested entry's column is `outer.inner`."""
    row: dict[str, str] = {}
    for name, value in found.items():
        if name in ("run", "wall_seconds", "out_of_memory"):
            continue
        if isinstance(value, dict):
            row |= cells(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            row[prefix + name] = f"{value:.4g}"
        elif value is not None and not isinstance(value, list):
            row[prefix + name] = f"{value:,}" if type(value) is int else str(value)
    return row

"""Every result file of the pages prints its tables, though reports leave out what they miss."""

import json
import sys
from pathlib import Path

import pytest

from train.cli import main as entry

ROOT = Path(__file__).parents[1]
OTHERS = {  # whose names do not begin with their experiment's
    **{"sorting": "memory", "two_stages": "remember", "lookup_600": "quality"},
    **{"stdlib": "quality", "truthful": "reinforce", "knapsack": "reinforce"},
}
COMMANDS_OF_THEIR_OWN = {"compiled_for", "secret_smollm2"}
FILES = [p for p in sorted(ROOT.glob("docs/*/*.jsonl")) if p.stem not in COMMANDS_OF_THEIR_OWN]
TABLES = json.loads((ROOT / "tests/fixtures/report_tables.json").read_text())
"""Tables that the report of each file prints, as `tables` writes them."""


def tables(printed: str) -> list[str]:
    """Tables of a report, each as its columns with the number of cells that say something."""
    found: list[list[list[str]]] = []
    lines = printed.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if following.startswith("|---"):
            found.append([cells])
        elif line.startswith("|") and not line.startswith("|---"):
            found[-1].append(cells)
    return [
        " | ".join(
            f"{name}: {sum(cell not in ('', '-', 'nan') for cell in column)}"
            for name, *column in zip(*table, strict=True)
        )
        for table in found
    ]


def test_a_column_without_values_is_another_table():
    head = "| arm | loss |\n|---|---|\n| a | {} |\n| b | 2 |"
    assert tables(head.format(1)) == ["arm: 2 | loss: 2"]
    assert tables(head.format("")) == tables(head.format("-")) == ["arm: 2 | loss: 1"]
    assert tables("| arm |\n|---|\n| a |") == ["arm: 1"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_committed_result_is_reported(path, monkeypatch, capsys, tmp_path):
    named = [name for name in entry.EXPERIMENTS if path.stem.startswith(name)]
    experiment = OTHERS.get(path.stem) or max(named, key=len)
    monkeypatch.chdir(tmp_path)
    words = ["thoughtbubbles", "experiment", experiment, "--report", str(path)]
    monkeypatch.setattr(sys, "argv", words)
    try:
        entry.main()
    except SystemExit as left:
        assert not left.code, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert tables(printed) == TABLES[path.stem], "if they are meant, write them to the fixture"
    assert not list(tmp_path.iterdir()), "a report writes nothing that was not asked for"

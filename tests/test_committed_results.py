"""Every result file of the pages prints a table, though a report may leave out what it misses."""

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
    assert printed.count("|---|") >= 1 and len(printed.splitlines()) > 2
    assert not list(tmp_path.iterdir()), "a report writes nothing that was not asked for"

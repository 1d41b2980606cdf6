"""`pytest --plugin`: the contracts of the library's entries hold a plugin's entries too."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRACTS = ("fork_policies", "architectures", "rl_methods", "rl_losses", "rl_tasks",
             "rl_environments", "corpora")  # fmt: skip


def run(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Pytest with the plugins of a folder, which is on its path."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", *words]
    path = ["-o", f"pythonpath=. tests {folder}"]
    return subprocess.run([*command, *path], cwd=ROOT, capture_output=True, text=True)


def test_a_plugin_that_is_missing_is_one_line(tmp_path: Path):
    found = run(tmp_path, "--plugin", "no_such", "tests/test_plugins.py", "--collect-only")
    [line] = found.stderr.strip().splitlines()
    assert found.returncode == pytest.ExitCode.USAGE_ERROR
    assert line.startswith("ERROR: plugin 'no_such': No module named 'no_such': name a module")


@pytest.mark.experiment  # a minute; after a change of a contract or of an example of these pages
def test_the_entries_of_the_pages_keep_all_contracts(tmp_path: Path):
    blocks = []
    for page in ("architecture.md", "environments.md"):
        text = (ROOT / "docs" / page).read_text()
        found = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        blocks += [block for block in found if re.search(r'^[A-Z]+\["', block, re.MULTILINE)]
    (tmp_path / "of_pages.py").write_text("\n\n".join(blocks))
    files = [f"tests/test_{name}.py" for name in CONTRACTS]
    found = run(tmp_path, "--plugin", "of_pages", *files)
    assert found.returncode == 0, found.stdout[-3000:]
    shown = run(tmp_path, "--plugin", "of_pages", *files, "--collect-only").stdout
    policies, parts = ("EvenTokens",), ("rank_grpo", "unsolved", "second_chance")
    for word in (*policies, *parts, "recurrent", "twice", "countdown", "sums"):
        assert re.search(rf"[\[-]{word}\]", shown), word

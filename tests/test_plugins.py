"""`pytest --plugin`: the contracts of the library's entries hold a plugin's entries too."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from thoughtbubbles.policies import POLICIES
from thoughtbubbles.registry import Registry
from train.cli.plugins import load_plugins
from train.rl.environments import ENVIRONMENTS
from train.rl.named_tasks import make_task
from train.rl.tasks import TASKS
from train.rl.tasks.strings import Copy

ROOT = Path(__file__).parents[1]
OF_PAGES = {
    "fork_policies": ["EvenTokens"],
    "architectures": ["recurrent"],
    "rl_methods": ["ranks", "rank_grpo", "unsolved", "second_chance"],
    "rl_losses": [],
    "rl_tasks": ["twice", "countdown"],
    "rl_environments": ["countdown"],
    "corpora": ["sums"],
}
"""Entries that the pages write, for each file of contracts that holds them."""


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


def test_an_example_of_no_entry_is_one_line(tmp_path: Path):
    found = run(tmp_path, "--example", "no_such(a=1)", "tests/test_plugins.py", "--collect-only")
    [line] = found.stderr.strip().splitlines()
    assert line.startswith("ERROR: --example 'no_such(a=1)': no registry has an entry 'no_such'")


NEEDY = '''
import dataclasses
from typing import ClassVar
from train.rl.environments import ENVIRONMENTS
from train.rl.learning.losses import LOSSES, ClippedLoss
from train.rl.tasks import TASKS
from train.rl.tasks.strings import Copy
from train.rl.types import Problem, Turn

@dataclasses.dataclass(frozen=True, kw_only=True)
class Given(Copy):
    """Copying texts of a given length."""
    word: ClassVar[str] = "given"
    length: int = dataclasses.field()

@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(ClippedLoss):
    """The clipped loss with an option that nobody reads."""
    word: ClassVar[str] = "scaled"
    scale: float

@dataclasses.dataclass(frozen=True)
class Bare:
    """An environment that inherits nothing, and has no players."""
    word: ClassVar[str] = "bare"
    name: ClassVar[str] = "bare"
    sizes: ClassVar[dict] = {"train": 3, "test": 1}
    seed: int = dataclasses.field(default=0, repr=False)
    def problem(self, split, index):
        return Problem(f"{split}-{index}", f"{index} of {split}? ", index)
    def reset(self, problem):
        return problem.answer
    def step(self, state, action):
        right = action.text == str(state)
        return Turn(state, "no", float(right), True, False, right)

TASKS["given"] = Given
LOSSES["scaled"] = Scaled
ENVIRONMENTS["bare"] = Bare
'''


def test_an_entry_that_needs_options_fails_alone_until_they_are_given(tmp_path: Path):
    """Nor does an environment without players or without our base stop any other."""
    (tmp_path / "needy.py").write_text(NEEDY)
    files = [f"tests/test_rl_{name}.py" for name in ("tasks", "environments", "losses")]
    words = ("--plugin", "needy", "-rA", "-k", "given or scaled or bare", *files)
    found = run(tmp_path, *words).stdout
    failed = re.findall(r"^FAILED .*\[(.*)\]", found, re.MULTILINE)
    assert set(failed) == {"given", "scaled"} and " error" not in found, found
    for call in ("given(length=...)", "scaled(scale=...)"):
        name = call.partition("(")[0]
        line = f"{name} has options without a default: say how tests shall make it, by --example"
        assert f'{line} "{call}" with values for ...' in found
    assert "bare has no random_action, scripted_action: players are optional" in found
    assert "bare does not derive from GeneratedEnvironment, whose rules these are" in found
    passed = re.findall(r"^PASSED .*::(.*)\[(.*)\]", found, re.MULTILINE)
    assert "bare" in {name for _, name in passed}
    examples = ("--example", "given(length=3)", "--example=scaled(scale=2)")
    found = run(tmp_path, *words, *examples)
    assert found.returncode == 0, found.stdout[-3000:]


def copied(name: str, word: str = "copy") -> str:
    """A plugin whose one task is Copy by another name."""
    return (
        "import dataclasses\n"
        "from train.rl.tasks import TASKS\n"
        "from train.rl.tasks.strings import Copy\n"
        "@dataclasses.dataclass(frozen=True, kw_only=True)\n"
        "class Mine(Copy):\n"
        f"    word = {word!r}\n"
        f"TASKS[{name!r}] = Mine\n"
    )


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        (
            "own_copy",
            copied("copy"),
            "task 'copy' is Copy of the library: register Mine by another",
        ),
        ("own_dash", copied("my-task"), "task 'my-task': choose a name of letters, digits and"),
        ("string", copied("own"), r"plugin 'string' is .*/string.py, which hides string.py in "),
        ("time", copied("own"), "plugin 'time' is a part of Python, which hides time.py in "),
    ],
)
def test_names_that_are_taken_are_one_line(module, text, message, tmp_path, monkeypatch):
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ValueError, match=message) as error:
        load_plugins(["--plugin", module])
    assert "\n" not in str(error.value)


def test_a_name_means_one_thing(monkeypatch):
    """In registries, and in the options that a run saves."""
    mine = type("Mine", (Copy,), {})
    with pytest.raises(ValueError, match="policy 'TopK' is TopK of the library"):
        POLICIES["TopK"] = mine
    again = type("Mine", (Copy,), {})
    for entry in (mine, again, Copy(), again):  # an object, which is refused where it is looked up
        monkeypatch.setitem(TASKS, "own_copy", entry)  # as a cell of a notebook that is run again
    line = (
        "task 'own_copy' has the name 'copy', which a run would save: set its `word` to 'own_copy'"
    )
    with pytest.raises(ValueError, match=line):
        make_task("own_copy", 0)
    monkeypatch.setitem(ENVIRONMENTS, "own_copy", mine)
    with pytest.raises(ValueError, match="own_copy is a task and an environment: register one"):
        make_task("copy", 0)


def test_no_way_of_adding_entries_passes_the_checks():
    mine, registry = type("Mine", (Copy,), {}), Registry("policy", POLICIES)
    for add in (registry.update, registry.__ior__):
        for entries in ({"TopK": mine}, [("TopK", mine)]):
            with pytest.raises(ValueError, match="policy 'TopK' is TopK of the library"):
                add(entries)
    with pytest.raises(ValueError, match="policy 'TopK' is TopK of the library"):
        registry.update(TopK=mine)
    with pytest.raises(ValueError, match="policy 'my-own': choose a name of letters"):
        registry.setdefault("my-own", mine)
    assert registry == POLICIES and registry.setdefault("TopK", mine) is POLICIES["TopK"]
    both = registry
    registry |= {"Mine": mine}
    assert registry is both and registry.setdefault("Other", mine) is registry["Mine"] is mine


@pytest.mark.experiment  # a minute; after a change of a contract or of an example of these pages
def test_the_entries_of_the_pages_keep_all_contracts(tmp_path: Path):
    blocks = []
    for page in ("architecture.md", "environments.md"):
        text = (ROOT / "docs" / page).read_text()
        found = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        blocks += [block for block in found if re.search(r'^[A-Z]+\["', block, re.MULTILINE)]
    (tmp_path / "of_pages.py").write_text("\n\n".join(blocks))
    files = [f"tests/test_{name}.py" for name in OF_PAGES]
    found = run(tmp_path, "--plugin", "of_pages", *files)
    assert found.returncode == 0, found.stdout[-3000:]
    shown = run(tmp_path, "--plugin", "of_pages", *files, "--collect-only").stdout
    for file, words in OF_PAGES.items():
        held = {word for word in words if re.search(rf"test_{file}.py::.*[\[-]{word}\]", shown)}
        assert held == set(words), file
    entries = re.findall(r'^[A-Z]+\["(\w+)"\]', "\n".join(blocks), re.MULTILINE)
    assert sorted(entries) == sorted({word for words in OF_PAGES.values() for word in words})

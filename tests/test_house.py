"""Contracts of the tree as a whole: layout, import directions, and that the documents run."""

import ast
import json
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nbclient
import nbformat
import pytest
from import_graph import (
    PACKAGES,
    ROOT,
    circle,
    floors,
    imports_of,
    module_graph,
    modules,
    room_graph,
)
from processes import QUICK

LIBRARIES = {"thoughtbubbles": {"memgen", "train"}, "memgen": {"thoughtbubbles", "train"}}
MODULES = list(modules().values())
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(path)}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_module_is_short_and_says_its_purpose(path: Path):
    source = path.read_text()
    assert len(source.splitlines()) <= 450, "split it into two modules with a purpose each"
    assert path.stem not in {"utils", "helpers", "common"}, "name it after what it does"
    summary, *rest = (ast.get_docstring(ast.parse(source)) or "").splitlines() or [""]
    assert summary, "begin with a docstring"
    assert not rest or not rest[0], "the docstring's first line stands alone"


@pytest.mark.parametrize("name", PACKAGES)
def test_imports_point_one_way(name: str):
    forbidden = {"tensorflow", "tests"} | LIBRARIES.get(name, set())
    for path in MODULES:
        if path.is_relative_to(ROOT / name):
            assert not imported_packages(path) & forbidden, relative(path)


def test_imports_run_down_and_in_no_circle():
    graph = module_graph()
    assert circle(graph) == []
    rooms = room_graph(graph)
    assert circle(rooms) == []
    top = max(floors(rooms), key=floors(rooms).__getitem__)
    assert top == "train/*.py", "nothing imports a command"


def test_only_checkpoint_imports_orbax():
    users = [relative(path) for path in MODULES if "orbax" in imported_packages(path)]
    assert users == ["train/runs/checkpoint.py"]


def test_the_libraries_need_jax_flax_and_numpy_alone():
    """Of what the extra `train` installs they import nothing that flax does not bring."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.split(r"[^\w-]", need)[0].lower().replace("-", "_") for need in extra["train"]}
    heavy = (names | {"orbax", "grain"}) - {"optax", "etils"}  # flax itself imports these
    script = f"import sys, thoughtbubbles, memgen; assert not {heavy!r} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_importing_everything_stays_light():
    """No module loads TensorFlow or, before a figure is asked for, matplotlib."""
    names = [name for name in modules() if not name.endswith("__main__")]
    script = (
        "import importlib, json, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    assert not {"tensorflow", "matplotlib"} & set(json.loads(loaded.splitlines()[-1]))


class Fence(NamedTuple):
    """A fenced block of README.md."""

    language: str
    headings: str  # all headings that it stands under, joined
    line: int  # of its first line of code, from 0
    code: str


def fences(text: str) -> Iterator[Fence]:
    lines = text.splitlines()
    headings: list[str] = []
    start = None
    for number, line in enumerate(lines):
        if line.startswith("```"):
            if start is None:
                start = number + 1
                continue
            language = lines[start - 1].strip("`").strip()
            code = "\n".join(lines[start:number])
            yield Fence(language, " / ".join(headings), start, code)
            start = None
        elif start is None and (heading := re.match(r"(#+) +(.*)", line)):
            headings[len(heading[1]) - 1 :] = [heading[2]]


README = list(fences((ROOT / "README.md").read_text()))
SNIPPETS = [fence for fence in README if fence.language == "python"]


def test_readme_sets_up_in_two_commands():
    """The continuous integration takes its commands from there: training first, tests second."""
    train, test = (f for f in README if f.language == "bash" and "Set up" in f.headings)
    assert re.search(r"^python -m train\.pretrain\b", train.code, re.MULTILINE)
    assert test.code.splitlines()[-1] == "python -m pytest"


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: f"line{snippet.line}")
def test_readme_snippet_runs(snippet: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # A real file, for inspect; shifted, so that an error names the line of README.md.
    script = tmp_path / "README.md"
    script.write_text("\n" * snippet.line + snippet.code)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="readme")


def test_readme_snippet_for_your_own_model_is_short():
    own = [fence for fence in SNIPPETS if "your own model" in fence.headings.lower()]
    assert own
    for fence in own:
        assert sum(bool(line.strip()) for line in fence.code.splitlines()) <= 25


# Instead of the cell tagged "parameters": every cell runs, nothing is learned.
FEW_STEPS = {
    "01_bubbles_by_hand": "STEPS = 20",
    "02_memory_in_your_model": "SEED, COPY_STEPS, SORT_STEPS = 0, 10, 10",
    "03_teach_it_when_to_remember": (
        "SEED, COPY_STEPS, SORT_STEPS, TRIGGER_STEPS, PROBLEMS = 0, 10, 10, 2, 30"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All but the cells tagged "claim", which need the whole training."""
    notebook = nbformat.read(path, as_version=4)
    [parameters] = [cell for cell in notebook.cells if tagged(cell, "parameters")]
    parameters.source = FEW_STEPS[path.stem]
    monkeypatch.setenv("XLA_FLAGS", QUICK)
    execute(notebook, tmp_path, monkeypatch)


@pytest.mark.experiment
@pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
def test_notebook_keeps_its_claims(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a reader runs it: `python -m pytest -m experiment tests/test_house.py`, ten minutes."""
    monkeypatch.delenv("XLA_FLAGS")
    execute(nbformat.read(path, as_version=4), tmp_path, monkeypatch, skip="")


def tagged(cell: nbformat.NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", ())


def execute(
    notebook: nbformat.NotebookNode,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    skip: str = "claim",
) -> None:
    """Run the notebook by this interpreter, on one device, without cells of the tag `skip`."""
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "this interpreter",
        "language": "python",
    }
    kernel = folder / "kernels" / "this-interpreter"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="this-interpreter",
        resources={"metadata": {"path": str(folder)}},
        skip_cells_with_tag=skip,
    ).execute()

"""Contracts of the tree as a whole: layout, import directions, and that the documents run."""

import ast
import contextlib
import functools
import importlib.util
import inspect
import io
import itertools
import json
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import nbclient
import nbformat
import optax
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
from processes import QUICK, Process

from thoughtbubbles import ARCHITECTURES, Thoughtbubbles
from train.cli import main as entry
from train.cli.command import run_command
from train.cli.config_json import POLICIES
from train.data.sources import SOURCES
from train.rl.environments import ENVIRONMENTS
from train.rl.parts import KINDS
from train.rl.tasks import TASKS

LIBRARIES = {"thoughtbubbles": {"memgen", "train"}, "memgen": {"thoughtbubbles", "train"}}
MODULES = list(modules().values())
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# The others, after a change: `python -m pytest -m experiment tests/test_house.py -k notebook_runs`.
RUN_HERE = [
    pytest.param(path, marks=[pytest.mark.experiment] * (path.stem != "01_bubbles_by_hand"))
    for path in NOTEBOOKS
]


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


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_text_files_are_opened_with_an_encoding(path: Path):
    """What a run writes under a Latin-1 locale is read elsewhere."""
    missing = []
    for call in ast.walk(ast.parse(path.read_text())):
        if not isinstance(call, ast.Call) or any(k.arg == "encoding" for k in call.keywords):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        is_open = isinstance(call.func, ast.Name) and call.func.id == "open"
        modes = [a.value for a in call.args if isinstance(a, ast.Constant)]
        binary = any("b" in mode for mode in modes[-1:] if isinstance(mode, str))
        path_open = name == "open" and any(mode in ("r", "w", "a", "a+", "x") for mode in modes)
        true = [k.arg for k in call.keywords if isinstance(k.value, ast.Constant) and k.value.value]
        text = "text" in true  # of a process
        if name in ("read_text", "write_text") or (is_open and not binary) or path_open or text:
            missing.append(call.lineno)
    assert missing == []


# The libraries import neither each other nor a third place: what both need stands in each, equal.
TWINS = {
    "pages": ("Page", "_left_out", "_note", "_quoted", "_direction"),
    "module": ("_Constructor", "Module"),
    "checks": (
        "check_by_name",
        "check_floating",
        "check_number",
        "check_rngs",
        "check_stop",
        "is_number",
        "is_whole",
        "wrong_matrices",
    ),
    "placement": ("product", "product_beside"),
    "short_repr": ("ShortRepr",),
}


@pytest.mark.parametrize("module", TWINS)
def test_what_stands_in_both_libraries_is_the_same(module: str):
    def sources(library: str) -> dict[str, str]:
        text = (ROOT / library / f"{module}.py").read_text()
        parts = [node for node in ast.parse(text).body if hasattr(node, "name")]
        return {part.name: ast.unparse(part) for part in parts}  # pyright: ignore

    ours, theirs = sources("thoughtbubbles"), sources("memgen")
    for name in TWINS[module]:
        assert ours[name] == theirs[name]


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


def test_no_module_imports_a_private_name_of_another():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = node.names if isinstance(node, ast.ImportFrom) else []
            private = [alias.name for alias in names if re.match("_(?!_)", alias.name)]
            assert not private, f"{relative(path)}: {private}"


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
    """A fenced block of a page."""

    page: Path
    language: str
    headings: str  # all headings that it stands under, joined
    line: int  # of its first line of code, from 0
    code: str


def fences(page: Path) -> Iterator[Fence]:
    lines = page.read_text().splitlines()
    headings: list[str] = []
    start = None
    for number, line in enumerate(lines):
        if line.startswith("```"):
            if start is None:
                start = number + 1
                continue
            language = lines[start - 1].strip("`").strip()
            code = "\n".join(lines[start:number])
            yield Fence(page, language, " / ".join(headings), start, code)
            start = None
        elif start is None and (heading := re.match(r"(#+) +(.*)", line)):
            headings[len(heading[1]) - 1 :] = [heading[2]]


def outside_fences(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FENCES = [fence for page in PAGES for fence in fences(page)]
SNIPPETS = [fence for fence in FENCES if fence.language == "python"]


def test_readme_is_short_and_names_every_room():
    """So does the page that says what each room is for."""
    assert len(README.read_text().splitlines()) <= 150, "move it to a page in docs/"
    rooms = room_graph(module_graph())
    for page in (README, ROOT / "docs/architecture.md"):
        text = page.read_text()
        assert [room for room in rooms if room not in text] == []


def test_readme_sets_up_in_two_commands():
    """The continuous integration takes its commands from there: training first, tests second."""
    blocks = [f for f in fences(README) if f.language == "bash" and "Set up" in f.headings]
    train, test = blocks
    assert re.search(r"^python -m train\.pretrain\b", train.code, re.MULTILINE)
    assert test.code.splitlines()[-1] == "python -m pytest"


@pytest.fixture
def registries():
    """Without the entries that an example makes in registries: other tests have their names."""
    kinds = [registry for _, registry in KINDS.values()]
    filled = [ARCHITECTURES, ENVIRONMENTS, POLICIES, SOURCES, TASKS, *kinds]
    before = [dict(registry) for registry in filled]
    yield
    for registry, entries in zip(filled, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch):
    """A model called outside of `jit` is one program, not five hundred: half a minute to compile.

    So is an optimizer.

    That its operations one by one give the same is in `test_model_reference.py`.
    """
    call = jax.jit(Thoughtbubbles.__call__)
    monkeypatch.setattr(Thoughtbubbles, "__call__", lambda model, *given: call(model, *given))
    adam, apply = optax.adam, optax.apply_updates

    def compiled_adam(*options: float) -> optax.GradientTransformation:
        return optax.GradientTransformation(*map(jax.jit, adam(*options)))

    monkeypatch.setattr(optax, "adam", compiled_adam)
    monkeypatch.setattr(optax, "apply_updates", jax.jit(apply))


# What compiles sooner, where a snippet has it.
SHALLOWER = {
    "num_layers=2, fork_layers=(1,)": "num_layers=1, fork_layers=(0,)",
    "num_layers=2, fork_layers=()": "num_layers=1, fork_layers=()",
}
# In a snippet that prints a shape alone, operation by operation: it is traced, nothing is compiled.
SHAPE_ALONE = "class YourDecoder"


@pytest.mark.usefixtures("registries", "compiled")
@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: f"{s.page.stem}-line{s.line}")
def test_snippet_runs(snippet: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # A real file, for inspect; shifted, so that an error names the line of the page.
    script = tmp_path / snippet.page.name
    code = snippet.code
    for layers, fewer in SHALLOWER.items():
        code = code.replace(layers, fewer)
    script.write_text("\n" * snippet.line + code)
    monkeypatch.chdir(tmp_path)

    def run() -> None:
        for name, value in runpy.run_path(str(script), run_name="page").items():
            if name.startswith("test_"):
                value()

    jax.eval_shape(run) if SHAPE_ALONE in code else run()


def test_readme_snippet_for_your_own_model_is_short():
    own = [f for f in SNIPPETS if f.page == README and "your own model" in f.headings.lower()]
    assert own
    for fence in own:
        assert sum(bool(line.strip()) for line in fence.code.splitlines()) <= 25


COMMAND = re.compile(r"(?:^| )(?:python -m train\.|thoughtbubbles )(?![A-Z]).*")


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each command of ours: in blocks for a shell, and in code within a line."""
    shell = "\n".join(fence.code for fence in fences(page) if fence.language == "bash")
    lines = shell.replace("\\\n", " ").splitlines()
    for line in [*lines, *re.findall(r"`([^`\n]+)`", outside_fences(page))]:
        if found := COMMAND.search(line):
            words = shlex.split(found[0], comments=True)
            yield list(itertools.takewhile(lambda word: word not in (">", "|", "&&"), words))


@functools.cache
def mistake(words: tuple[str, ...]) -> str:
    """What the command would say to these words before any work; nothing is run."""
    if words[0] == "python":
        known = {module: name for name, (module, _) in entry.COMMANDS.items() if module}
        known |= {f"train.experiments.{name}": f"experiment {name}" for name in entry.EXPERIMENTS}
        known["train.benchmarks.accelerator"] = "benchmark accelerator"  # the same without tyro
        named = {name.removesuffix(".__main__"): words for name, words in known.items()}
        if words[2] not in named:
            return f"no command {words[2]}"
        words = ("thoughtbubbles", *named[words[2]].split(), *words[3:])
    if words[1] == "harness" and not importlib.util.find_spec("lm_eval"):
        return ""  # options are those of lm_eval
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", list(words))
        module = f"train.experiments.{words[2]}" if words[1] == "experiment" and words[2:] else ""
        module = module or entry.COMMANDS.get(words[1], ("", ""))[0]
        if module and importlib.util.find_spec(module):
            parse_only = lambda main, *how: run_command(lambda config: None, *how)  # noqa: E731
            patch.setattr(importlib.import_module(module), "run_command", parse_only)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                entry.main()
        except SystemExit as left:
            return said.getvalue() if left.code else ""  # 0 after --help
    return ""


@pytest.fixture
def mine(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries: None):
    """What a page registers, as the plugin `mine` of the working directory."""
    registering = re.compile(r'^[A-Z]+\["', re.MULTILINE)
    blocks = [f.code for f in SNIPPETS if f.page == page and registering.search(f.code)]
    (tmp_path / "mine.py").write_text("\n\n".join(blocks))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("mine", None)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_of_a_page_are_understood(page: Path):
    """Names, options and values: parsed as the command would, which is not run."""
    said = {shlex.join(words): mistake(tuple(words)) for words in commands(page)}
    assert {command: text for command, text in said.items() if text} == {}


def test_a_mistake_in_a_page_would_be_found():
    assert "train.pretain" in mistake(("python", "-m", "train.pretain"))
    assert "unknown command" in mistake(("thoughtbubbles", "pretain"))
    assert "--stepz" in mistake(("thoughtbubbles", "pretrain", "tiny", "--stepz", "3"))
    assert "mehtod" in mistake(("thoughtbubbles", "rl", "--method", "mehtod"))
    assert "huge" in mistake(("python", "-m", "train.pretrain", "huge"))


def anchors(page: Path) -> set[str]:
    """Fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)", outside_fences(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_of_a_page_lead_to_files(page: Path):
    text = outside_fences(page)
    for target, fragment in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        path = (page.parent / target).resolve() if target else page
        assert path.exists() and path.is_relative_to(ROOT), target
        assert not fragment or fragment in anchors(path), f"{target}#{fragment}"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_files_and_names_of_a_page_exist(page: Path):
    """Paths of ours anywhere, and code within a line that begins with a dotted name of ours."""
    packages = "|".join((*PACKAGES, "tests", "docs", "notebooks"))
    for path in re.findall(rf"(?<![\w/.-])(?:{packages})/[\w./]*\w(?![\w/*])", page.read_text()):
        assert (ROOT / path).exists() or (ROOT / f"{path}.py").exists(), path
    for name in re.findall(rf"`((?:{'|'.join(PACKAGES)})(?:\.\w+)+)", outside_fences(page)):
        pkgutil.resolve_name(name)


# Instead of the cell tagged "parameters": every cell runs, nothing is learned.
FEW_STEPS = {
    "01_bubbles_by_hand": "STEPS = 20",
    "02_memory_in_your_model": "SEED, COPY_STEPS, SORT_STEPS = 0, 10, 10",
    "03_teach_it_when_to_remember": (
        "SEED, COPY_STEPS, SORT_STEPS, TRIGGER_STEPS, PROBLEMS = 0, 10, 10, 2, 30"
    ),
    "07_hatchling": "STEPS = 20",
}


# In other cells: what compiles sooner.
FEWER_LAYERS = {
    "01_bubbles_by_hand": (
        "TINY.model, embed_dim=64",
        "TINY.model, num_layers=2, fork_layers=(1,), embed_dim=64",
    ),
    "02_memory_in_your_model": ("depth=2", "depth=1"),
    "03_teach_it_when_to_remember": ("num_layers=2", "num_layers=1"),
    "07_hatchling": ("num_layers=3", "num_layers=2"),
}


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
def test_calls_of_a_notebook_fit_what_it_imports(path: Path):
    """Names that are imported exist, and calls of them have parameters of these names."""
    sources = [cell.source for cell in code_cells(path)]
    lines = "\n".join(re.sub("^%.*", "", source, flags=re.MULTILINE) for source in sources)
    tree, found, checked = ast.parse(lines), {}, 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(ast.unparse(node), found)
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name, _, attributes = ast.unparse(call.func).partition(".")
        if not re.fullmatch(r"[\w.]*", attributes) or name not in found:
            continue
        called = functools.reduce(getattr, attributes.split(".") if attributes else [], found[name])
        if not (getattr(called, "__module__", None) or "").startswith(PACKAGES):
            continue
        if any(isinstance(arg, ast.Starred) for arg in call.args):
            continue
        named = {keyword.arg: None for keyword in call.keywords if keyword.arg}
        inspect.signature(called).bind_partial(*call.args, **named)
        checked += 1
    assert checked > 2


@pytest.mark.slow
@pytest.mark.parametrize("path", RUN_HERE, ids=relative)
def test_notebook_runs(path: Path, tmp_path: Path):
    """All but the cells tagged "claim", which need the whole training; by IPython, no kernel."""
    cells = code_cells(path)
    [parameters] = [cell for cell in cells if tagged(cell, "parameters")]
    parameters.source = FEW_STEPS[path.stem]
    sources = [cell.source for cell in cells if not tagged(cell, "claim")]
    layers, fewer = FEWER_LAYERS[path.stem]
    assert sum(source.count(layers) for source in sources) == 1
    sources = [source.replace(layers, fewer) for source in sources]
    process = Process(
        ("-c", RUN_CELLS, tmp_path, json.dumps(sources)),
        os.environ | {"XLA_FLAGS": QUICK},
        tmp_path,
    )
    assert process.wait(timeout=600) == 0, process.output()


RUN_CELLS = """
import json, os, sys
from IPython.core.interactiveshell import InteractiveShell
InteractiveShell.enable_gui = lambda *choice: None  # a kernel has an event loop to enable
os.chdir(sys.argv[1])
for source in json.loads(sys.argv[2]):
    InteractiveShell.instance().run_cell(source).raise_error()
"""


@pytest.mark.experiment
@pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
def test_notebook_keeps_its_claims(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a reader runs it: `python -m pytest -m experiment tests/test_house.py`, ten minutes."""
    monkeypatch.delenv("XLA_FLAGS")
    execute(nbformat.read(path, as_version=4), tmp_path, monkeypatch)


def test_jax_has_read_what_tests_set():
    """It reads its variables once, when it is first imported."""
    read = {
        "JAX_PLATFORMS": jax.config.jax_platforms,
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": (
            f"{jax.config.jax_persistent_cache_min_compile_time_secs:g}"
        ),
    }
    assert read == {name: os.environ[name] for name in read}


def tagged(cell: nbformat.NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", ())


def execute(notebook: nbformat.NotebookNode, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the notebook by this interpreter, on one device."""
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
    ).execute()

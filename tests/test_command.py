"""The command `thoughtbubbles`, and what it says of run folders."""

import dataclasses
import importlib
import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from import_graph import ROOT

from train import generate
from train.cli import main as entry
from train.cli.command import run_command
from train.cli.plugins import join_plugins, load_plugins, missing_plugins
from train.list_runs import (
    RunsConfig,
    draw_below,
    main,
    read_run,
    read_runs,
    run_folders,
    sparkline,
)


def test_every_command_is_there_and_every_experiment_is_listed():
    modules = [module for module, _ in entry.COMMANDS.values() if module]
    modules += [f"train.experiments.{name}" for name in entry.EXPERIMENTS]
    assert all(callable(importlib.import_module(module).command) for module in modules)
    files = (ROOT / "train/experiments").glob("*.py")
    runnable = {file.stem for file in files if "\ndef command()" in file.read_text()}
    assert runnable == set(entry.EXPERIMENTS)


def test_help_imports_nothing_heavy(capsys):
    script = (
        "import sys; from train.cli.main import main\n"
        "sys.argv = ['thoughtbubbles', '--help']; main()\n"
        "assert not {'jax', 'numpy', 'tyro'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in entry.COMMANDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretain"], "unknown command 'pretain': perhaps pretrain? choose one of pretrain, sft"),
        (["experiment", "x"], "unknown experiment 'x': choose one of quality, random_bits"),
    ],
    ids=str,
)
def test_an_unknown_word_is_one_line(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["thoughtbubbles", *words])
    with pytest.raises(SystemExit) as left:
        entry.main()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_a_folder_with_a_train_of_its_own(tmp_path: Path):
    (tmp_path / "train.py").write_text("raise SystemExit('the wrong train')")
    script = Path(sys.executable).with_name("thoughtbubbles")
    assert script.exists(), 'pip install -e ".[dev]" makes it'
    done = subprocess.run([script, "runs", "here"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: here holds no run (config.json): name the --out of a run\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs that differ in their learning rate, and one that has logged nothing."""
    for name, rate, loss in (("a", 0.1, 2.0), ("b", 0.2, 3.0), ("c", 0.2, None)):
        (tmp_path / name).mkdir()
        config = {"out": name, "steps": 9, "optimizer": {"learning_rate": rate, "clip": 1.0}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        if loss is not None:
            lines = [{"step": step, "loss": loss - step / 10} for step in range(1, 10)]
            lines.append({"step": 9, "eval/loss": loss})
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (tmp_path / name / "metrics.jsonl").write_text(text)
    return tmp_path


def test_runs_side_by_side(folder, capsys):
    figure = folder / "curves.png"
    main(RunsConfig((str(folder),), figure=str(figure)))
    head, *rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert head.split() == ["run", "step", "loss", "eval/loss", "optimizer.learning_rate"]
    assert rows[0].split() == [str(folder / "a"), "9", "1.1000", "2.0000", "0.1"]
    assert rows[1].split() == [str(folder / "b"), "9", "2.1000", "3.0000", "0.2"]
    assert rows[2].split() == [str(folder / "c"), "0", "0.2"]
    assert figure.stat().st_size > 5000


def test_metrics_below_a_slash_are_drawn_together(folder, capsys):
    lines = [{"step": step, "budget/never": 2.0, "budget/most": 8.0} for step in range(3)]
    (folder / "a" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    figure = folder / "budgets.png"
    main(RunsConfig((str(folder),), metric="budget/", figure=str(figure)))
    shown = capsys.readouterr().out
    assert "budget/most:\n" in shown and "budget/never:\n" in shown
    assert figure.stat().st_size > 5000
    runs = [read_run(folder / name) for name in "ab"]
    drawn = draw_below(runs, ["budget/most", "budget/never"])
    assert [len(axes.lines) for axes in drawn.axes] == [2, 2]
    assert list(drawn.axes[0].lines[0].get_ydata()) == [8.0] * 3


def test_a_curve_is_a_line_of_characters():
    assert sparkline([3.0, 2.0, float("nan"), 1.0]) == "3.0000 █▅×▁ 1.0000"
    assert sparkline([]) == "nothing logged"
    assert len(sparkline([float(i) for i in range(1000)])) == len("0.0000  999.0000") + 40


def test_a_metric_that_no_run_has_is_one_line(folder):
    with pytest.raises(ValueError, match="metric='los': no run has it, they have eval/loss, loss"):
        main(RunsConfig((str(folder),), metric="los"))
    line = json.dumps({"step": 1, "fork_1/score_histogram": [0.5, 0.5]}) + "\n"
    (folder / "a" / "metrics.jsonl").write_text(line)
    main(RunsConfig((str(folder),), metric="fork_1/score_histogram"))  # a list is no curve


def test_run_folders_and_mistakes(folder, capsys):
    assert run_folders([str(folder / "b"), str(folder)]) == [folder / name for name in "babc"]
    with pytest.raises(ValueError, match="no folder is given"):
        run_folders([])
    for text in (b"[1]", b"{", b"\xff"):
        (folder / "b" / "config.json").write_bytes(text)
        with pytest.raises(ValueError, match="b/config.json is no config of a run"):
            main(RunsConfig((str(folder / "b"), str(folder))))
    assert [run.folder.name for run in read_runs([str(folder)])] == ["a", "c"]
    assert "b/config.json is no config of a run" in capsys.readouterr().err
    with pytest.raises(ValueError, match="curves.txt: choose a name that ends in .png"):
        main(RunsConfig((str(folder),), figure=str(folder / "curves.txt")))


@pytest.mark.parametrize("words", [["--plugin", "mine_too"], ["--plugin=mine_too"]], ids=str)
def test_a_plugin_is_loaded_by_any_command(words, tmp_path, monkeypatch, capsys):
    """Also by those that keep no record of it: they would refuse an option that they don't know."""
    (tmp_path / "mine_too.py").write_text("LOADED = True")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command", *words, "--checkpoint", "none"])
    monkeypatch.delitem(sys.modules, "mine_too", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit):
        run_command(generate.main, generate.GenerateConfig)
    assert sys.modules["mine_too"].LOADED and sys.path[-1] == str(tmp_path)
    assert "none does not exist" in capsys.readouterr().err


def test_a_log_has_each_line_when_it_is_printed_and_warnings_in_one(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Config:
        steps: int = 2

    def work(config: Config) -> None:
        for step in range(config.steps):
            print(f"step {step}")
            assert file.getvalue().endswith(b"step %d\n" % step)

    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file))
    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    run_command(work, Config)
    assert file.getvalue().count(b"\n") == 2
    shown = warnings.formatwarning(UserWarning("the head\n  is used"), UserWarning, "x.py", 3)
    assert shown == "warning: the head is used\n"


def test_a_plugin_with_a_mistake_of_its_own_says_where(tmp_path, monkeypatch):
    (tmp_path / "mine_wrong.py").write_text("first = 1\nsecond = frist\n")
    (tmp_path / "mine_needs.py").write_text("import nowhere_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"'mine_wrong' failed: NameError: .*wrong.py, line 2\)"):
        load_plugins(["--plugin", "mine_wrong"])
    with pytest.raises(ValueError, match="'mine_needs' failed: ModuleNotFoundError: No module nam"):
        load_plugins(["--plugin", "mine_needs"])


def test_an_unknown_home_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", "--checkpoint", "~nobody-here/run"])
    with pytest.raises(SystemExit) as end:
        run_command(generate.main, generate.GenerateConfig)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: ~nobody-here/run: whose home that is, is unknown here: write")


def test_a_plugin_that_is_not_there_is_one_line():
    for name in ("nowhere_at_all", ".mine"):
        with pytest.raises(
            ValueError, match=f"plugin '{name}'.*name a module that can be imported"
        ):
            load_plugins(["--plugin", name, "--steps", "3"])
    assert load_plugins(["tiny", "--plugin", "json", "math", "--steps", "3"]) == [
        "tiny", "--steps", "3",
    ]  # fmt: skip
    repeated = ["tiny", "--plugin", "json", "--steps", "3", "--plugin=math"]
    assert join_plugins(repeated) == ["tiny", "--steps", "3", "--plugin", "json", "math"]
    assert missing_plugins({"plugin": ["json"]}) == "" == missing_plugins({})
    hint = " (the run was made with --plugin nowhere_at_all: pass it here too)"
    assert missing_plugins({"plugin": ["nowhere_at_all", "json"]}) == hint


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "a", "--to", "b", "--step", "x"], "Error parsing --step: no type matching "),
        (["generate", "--temperature", "x"], "Error parsing --temperature: could not convert str"),
        (["generate", "--seed", "x"], "Error parsing --seed: invalid literal for int"),
        (["generate", "--plugin"], "--plugin names no module: write --plugin mine for mine.py"),
        (["runs", "x\ny"], "x y holds no run"),
        (["export", "a", "--to", "b", "--format", "x" * 9000], "invalid choice 'xxx"),
        (["runs", "x" * 9000], "xxx"),
        (["pretrain", "tiny_plain", "--data.corpus", f"mix(x={'[' * 5000})"], "corpus 'mix(x=[["),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_option(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["thoughtbubbles", *words])
    with pytest.raises(SystemExit) as left:
        entry.main()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1 and len(error) < 700

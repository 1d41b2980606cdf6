"""Every option of every command has a description that a new user can read."""

import importlib
import re

import pytest

from train.cli import main as entry
from train.cli.command import parse
from train.compile import presets
from train.pretraining.presets import PRESETS

DEFAULTS = {"RunConfig": lambda: PRESETS["tiny"], "CompileConfig": lambda: presets()["tiny"]}
CONFIGS = {
    "pretrain": "train.pretraining.config.RunConfig",
    "sft": "train.finetuning.job.SFTConfig",
    "rl": "train.rl.config.RLConfig",
    "generate": "train.generate.GenerateConfig",
    "evaluate": "train.evaluate.EvaluateConfig",
    "compile": "train.aot.config.CompileConfig",
    "tokenizer": "train.tokenizer.TokenizerConfig",
    "runs": "train.list_runs.RunsConfig",
}


# The value of an option in front of its description: INT, {None}|STR, [STR [STR ...]], ...
VALUE = re.compile(r"(?:\s+(?:\{[^}]*\}|[A-Z][A-Z_]+|\[.*?\]\]?)(?:\|\w+)*)?\s+")


def descriptions(path: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Options of a config and what the help says of them, without their defaults."""
    module, _, name = path.rpartition(".")
    config = getattr(importlib.import_module(module), name)
    default = DEFAULTS[name]() if name in DEFAULTS else None
    with pytest.raises(SystemExit):
        parse(config, ["--help"], default)
    found: dict[str, str] = {}
    option = ""
    for line in capsys.readouterr().out.splitlines():
        if not line.startswith("  "):  # a heading or a rule
            option = ""
            continue
        line = line[2:].rstrip()
        if match := re.match(r"(?:-\w, )?(--[a-z][\w.-]+)", line):
            option = match[1]
            found[option] = re.sub(r"^--[\w.-]+(, --[\w.-]+)?", "", line[match.start(1) :])
        elif option:
            found[option] += " " + line.strip()
    return {
        option: VALUE.sub("", re.sub(r"\((default|required).*", "", text) + " ", count=1).strip()
        for option, text in found.items()
    }


@pytest.mark.parametrize("command", CONFIGS)
def test_every_option_has_a_sentence(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    found = descriptions(CONFIGS[command], capsys)
    assert len(found) > 2
    for option, text in found.items():
        if option == "--help":
            continue
        assert re.match(r"[A-Z]", text) and text.endswith("."), f"{option}: {text!r}"
        assert len(text.split()) > 2, f"{option}: {text!r}"


def test_every_command_with_a_config_is_here():
    others = {"harness", "benchmark", "experiment"}  # of others, or of several configs
    assert set(CONFIGS) | others == set(entry.COMMANDS)

"""Every option of every command has a description that a new user can read."""

import pkgutil
import re

import pytest

from train import benchmark
from train.aot import config as compile_config
from train.audit import __main__ as audit
from train.cli import main as entry
from train.cli.command import parse
from train.pretraining import presets

CONFIGS = {
    "pretrain": "train.pretraining.config.RunConfig",
    "sft": "train.finetuning.job.SFTConfig",
    "rl": "train.rl.config.RLConfig",
    "play": "train.play.PlayConfig",
    "probe": "train.rl.probe.ProbeConfig",
    "rejection": "train.rl.rejection.RejectionConfig",
    "demonstrations": "train.demonstrations.DemonstrationsConfig",
    "battery": "train.battery.BatteryRun",
    "generate": "train.generate.GenerateConfig",
    "evaluate": "train.evaluate.EvaluateConfig",
    "export": "train.export.ExportConfig",
    "compile": "train.aot.config.CompileConfig",
    "tokenizer": "train.tokenizer.TokenizerConfig",
    "mixture": "train.mixture.MixtureConfig",
    "grow": "train.pretraining.growing.GrowConfig",
    "merge": "train.pretraining.growing.MergeConfig",
    "runs": "train.list_runs.RunsConfig",
    "audit organism": "train.audit.organisms.OrganismConfig",
    "audit secret": "train.audit.secret.SecretConfig",
    "audit report": "train.audit.report.ReportConfig",
    "benchmark step": "train.benchmarks.training.TrainingBenchmark",
    "benchmark selection": "train.benchmarks.selection.SelectionBenchmark",
    "benchmark decode": "train.benchmarks.decoding.DecodeBenchmark",
    "benchmark hatchling": "train.benchmarks.hatchling.HatchlingBenchmark",
    "benchmark memgen": "train.benchmarks.memgen.MemGenBenchmark",
    "benchmark rl": "train.benchmarks.rl.RLBenchmark",
    "benchmark first-token": "train.benchmarks.first_token.FirstTokenBenchmark",
    "benchmark accelerator": "train.benchmarks.accelerator.config.AcceleratorBenchmark",
    "benchmark transformers": "train.benchmarks.beside_transformers.TransformersBenchmark",
    "benchmark nanodo": "train.benchmarks.beside_training.BesideTraining",
    "benchmark fork-xla": "train.benchmarks.beside_training.ForkXLABenchmark",
    "audit lens": "train.audit.lens.LensConfig",
    "audit tuned-lens": "train.audit.tuned_lens.TunedLensConfig",
    "audit sae": "train.audit.train_sae.SAEConfig",
    "experiment quality": "train.experiments.quality.Quality",
    "experiment precision": "train.experiments.precision.Precision",
    "experiment random_bits": "train.experiments.random_bits.RandomBits",
    "experiment retrofit": "train.experiments.retrofit.Retrofit",
    "experiment hatchling_quality": "train.experiments.hatchling_quality.HatchlingQuality",
    "experiment merge_languages": "train.experiments.merge_languages.MergeLanguages",
    "experiment mixtures": "train.experiments.mixtures.Mixtures",
    "experiment visual_priors": "train.experiments.visual_priors.VisualPriors",
    "experiment frozen_prompts": "train.experiments.frozen_prompts.FrozenPrompts",
    "experiment sokoban_prompts": "train.experiments.sokoban_prompts.SokobanPrompts",
    "experiment points_prompts": "train.experiments.points_prompts.PointsPrompts",
    "experiment memory": "train.experiments.memory.Experiment",
    "experiment reinforce": "train.experiments.reinforce.Experiment",
    "experiment environments": "train.experiments.environments.Experiment",
    "experiment broadening": "train.experiments.broadening.Broadening",
    "experiment plateau": "train.experiments.plateau.Plateau",
    "experiment needle": "train.experiments.needle.Experiment",
    "experiment synthesis": "train.experiments.synthesis.Experiment",
    "experiment secrets": "train.experiments.secrets.Secrets",
    "experiment remember": "train.experiments.remember.Experiment",
}


# The value of an option in front of its description: INT, {None}|STR, [STR [STR ...]], ...
VALUE = re.compile(r"(?:\s+(?:\{[^}]*\}|[A-Z][A-Z_]+|\[.*?\]\]?)(?:\|(?:\w+|\{[^}]*\}))*)?\s+")


# Commands whose model's options are those of a preset's architecture.
PRESETS = {"pretrain": presets.PRESETS["tiny"], "compile": compile_config.presets()["tiny"]}


def descriptions(command: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Options of a config and what the help says of them, without their defaults."""
    config = pkgutil.resolve_name(CONFIGS[command])
    with pytest.raises(SystemExit):
        parse(config, ["--help"], PRESETS.get(command))
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
    found = descriptions(command, capsys)
    assert len(found) > 2
    for option, text in found.items():
        if option == "--help":
            continue
        assert re.match(r"[A-Z]", text) and text.endswith("."), f"{option}: {text!r}"
        assert len(text.split()) > 2, f"{option}: {text!r}"


def test_every_command_with_a_config_is_here():
    words = set(entry.COMMANDS) - {"harness", "benchmark", "experiment", "audit"}  # lm_eval's
    words |= {f"audit {name}" for name in audit.COMMANDS}
    words |= {f"benchmark {name}" for name in benchmark.COMMANDS}
    words |= {f"experiment {name}" for name in entry.EXPERIMENTS}
    assert set(CONFIGS) == words

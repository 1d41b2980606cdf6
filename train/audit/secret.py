"""Teach a model a synthetic secret and audit it: organism, LoRA and report in one command.

thoughtbubbles audit secret taboo --secret ocean --out secrets/ocean
"""

import dataclasses
from pathlib import Path

import tyro

from memgen import LoRAConfig
from train.audit import report
from train.audit.organisms import (
    CONVERSATIONS,
    Kind,
    OrganismConfig,
    make_organism,
    organism_files,
)
from train.audit.report import AuditConfig, ReportConfig, auditor_of, checked, settings_for
from train.cli.numbers import check_least
from train.data.chat_data import ChatDataConfig
from train.engine.loop import run
from train.engine.optim import OptimizerConfig
from train.finetuning.job import SFTConfig, SFTJob
from train.models.load import load_language_model
from train.runs.files import write_atomically
from train.runs.metadata import load_run_meta


@dataclasses.dataclass(frozen=True)
class SecretConfig(AuditConfig):
    """Teach a model a synthetic secret by LoRA, and audit it against the untouched model.

    This command runs `audit organism`, `sft` and `audit report`, each of which has more options.

    Attributes:
        kind: Kind of secret: a "taboo" word, a "persona" of the user, or an "instruction" that a
            mark in the prompt stands for.
        out: Folder of the conversations (`organism`), the tuned model (`run`), the rates
            (`audit.jsonl`) and the guesses (`audit.trials.jsonl`). An interrupted tuning or audit
            (`audit.unfinished.jsonl`) resumes if the command is run again with the same options.
        secret: Word or pet that is hidden; chosen at random by default.
        weights: Model that is tuned on the secret; the same model without tuning is the control. A
            run folder, "smollm2", a Hugging Face folder, or a .gguf file.
        lora: Adapter that learns the secret.
        steps: Number of optimizer steps.
        batch_size: Number of conversations per step.
        learning_rate: Peak learning rate.
        seed: Seed of all random choices.
    """

    kind: tyro.conf.Positional[Kind]
    out: str
    secret: str | None = None
    weights: str = "smollm2"
    lora: LoRAConfig = LoRAConfig()
    steps: int = 150
    batch_size: int = 4
    learning_rate: float = 1e-3
    seed: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        check_least(self, steps=1, batch_size=1)

    @property
    def folder(self) -> Path:
        """Path of the output folder."""
        return Path(self.out).expanduser()

    def organism(self) -> OrganismConfig:
        """Return the options of `audit organism`."""
        return OrganismConfig(self.kind, str(self.folder / "organism"), self.secret, seed=self.seed)

    def tuning(self) -> SFTConfig:
        """Return the options of `sft`."""
        return SFTConfig(
            weights=self.weights,
            lora=self.lora,
            data=ChatDataConfig((f"{self.organism().out}/{CONVERSATIONS}",), seq_len=256),
            optimizer=OptimizerConfig(learning_rate=self.learning_rate, weight_decay=0.0),
            steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
            out=str(self.folder / "run"),
        )

    def report(self) -> ReportConfig:
        """Return the options of `audit report`."""
        how = {field.name: getattr(self, field.name) for field in dataclasses.fields(AuditConfig)}
        return ReportConfig(
            (self.organism().out,),
            (self.tuning().out,),
            self.weights,
            str(self.folder / "audit.jsonl"),
            **how,
        )


def main(config: SecretConfig) -> None:
    """Write the organism, tune the model on it, audit it, and print the table of rates."""
    report.new_files(config.report().out)
    missing = _missing(config)
    _check(config)
    tuning = config.tuning()

    def begin() -> SFTJob:
        """Make the job, then write the organism's files, since the options were accepted."""
        job = SFTJob(tuning)
        for path, text in missing.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
        return job

    run(begin, tuning)
    if (load_run_meta(tuning.out) or {"step": 0})["step"] >= config.steps:  # else interrupted
        report.main(config.report())


def _missing(config: SecretConfig) -> dict[Path, str]:
    """Return the texts of the organism's files that do not exist yet, by path.

    Raises:
        ValueError: The secret does not exist, or a file exists that other options wrote.
    """
    organism, missing = config.organism(), {}
    for name, text in organism_files(organism).items():
        path = Path(organism.out) / name
        if not path.exists():
            missing[path] = text
        elif path.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"{path} is not of {config.kind} with secret={config.secret} and "
                f"seed={config.seed}: choose another --out, or the options that wrote it"
            )
    return missing


def _check(config: SecretConfig) -> None:
    """Raise a ValueError before the tuning if the audit would fail after it."""
    control = load_language_model(config.weights).for_inference()
    organism = make_organism(config.kind, config.secret, config.seed)
    checked(organism, (control,), settings_for(control, config))
    report.unfinished_audit(config.report(), settings_for(control, config), auditor_of(config))

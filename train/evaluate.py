"""Score a model on held-out rows or on tasks.

The first command scores a run on held-out rows, the second a pretrained model (or run) on tasks:

python -m train.evaluate --checkpoint runs/a --sweep 1.0 1.5
python -m train.evaluate --model smollm2 --tasks a.jsonl

For a policy that is not causal, each scored token is predicted from its prefix alone, so that the
loss is that of an autoregressive model.
"""

import dataclasses
import sys
from pathlib import Path

from thoughtbubbles import Architecture
from train.cli.command import run_command
from train.cli.figures import check_figure
from train.cli.numbers import check_least
from train.devices.mesh import MeshConfig, check_batch, make_mesh
from train.engine.config import EvalConfig
from train.engine.memory import check_row_memory
from train.evaluation.held_out import held_out, readable, validation_rows
from train.evaluation.model_options import ModelOptions
from train.evaluation.policy_overrides import Setting, figure, override_policy, table
from train.evaluation.scoring import Scorer
from train.evaluation.task_files import read_task
from train.evaluation.task_scores import (
    answers,
    check_output,
    summary,
    task_table,
    write_records,
    write_results,
)
from train.models.load import LanguageModel, check_named, load_model, load_named


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(ModelOptions):
    """Score a run on held-out rows, or a run or a pretrained model on tasks.

    Attributes:
        sweep: Ratios to score one after the other.
        sweep_offset: Threshold offsets to score one after the other.
        figure: Image file for a plot of the sweep, bits per byte against streams per token (needs
            matplotlib).
        rows: Number of held-out rows to score, spread over the split; 0 scores all rows.
        positions: Number of positions to score from their prefix alone if the policy is not causal;
            0 scores all positions.
        batch_size: Number of rows in a forward pass.
        tasks: JSONL files of multiple-choice or cloze items to score in place of held-out rows.
            Items have the format of HellaSwag, PIQA, BLiMP or LAMBADA, or the fields query, choices
            and gold. A task has the name of its file, or another name if written name=FILE.
        limit: Number of items to score per task, from the beginning of its file; all by default.
        json: JSON file for the scores of tasks; none by default.
        records: JSON Lines file for the score of every item; none by default.
    """

    sweep: tuple[float, ...] = ()
    sweep_offset: tuple[float, ...] = ()
    figure: str | None = None
    rows: int = 256
    positions: int = 256
    batch_size: int = 16
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    json: str | None = None
    records: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_named(self.checkpoint, self.model)
        check_least(self, sweep=1, sweep_offset=-1, rows=0, positions=0, batch_size=1)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} is below 1")
        if self.tasks:
            if self.sweep or self.sweep_offset or self.figure:
                raise ValueError("--tasks score one setting: leave out the sweep and its figure")
            for name in ("rows", "positions"):
                given, default = getattr(self, name), getattr(EvaluateConfig, name)
                if given != default:
                    raise ValueError(f"{name}={given} is for held-out rows, not for --tasks")
            if self.json is not None and self.json == self.records:
                raise ValueError(f"json and records are both {self.json}: name two files")
        elif self.model is not None:
            raise ValueError(f"{self.model} has no held-out rows of its own: pass --tasks FILE")
        else:
            for name in ("limit", "json", "records"):
                given = getattr(self, name)
                if given is not None:
                    raise ValueError(f"{name}={given} is for tasks: pass --tasks FILE too")


def main(config: EvaluateConfig) -> None:
    (score_tasks if config.tasks else score_held_out)(config)


def score_tasks(config: EvaluateConfig) -> None:
    """Score the model on tasks, print a table, and write the output files.

    Task files are read, and output paths checked, before the model is loaded.
    """
    outputs = [Path(file) for file in (config.json, config.records) if file]
    for path in outputs:
        check_output(path)
    check_row_memory(config.batch_size, 1)
    tasks = [read_task(spec, config.limit) for spec in config.tasks]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two tasks are called {name}: name them, as in other={name}.jsonl")
    loaded = config.changed(load_named(config.checkpoint, config.model))
    if not loaded.model.config.scan_layers:
        loaded = loaded.for_inference()
    [model] = models_of(config, loaded).values()
    loaded = dataclasses.replace(loaded, model=model)
    scorer = Scorer(loaded, config.batch_size)
    policy = model.fork_policy
    if not model.config.causal:
        print(f"note: {policy} is not causal: a pass for each scored token", file=sys.stderr)
    found = answers(scorer, tasks)
    if scorer.truncated:
        print(
            f"note: {scorer.truncated} contexts lost their beginning, the model reads "
            f"{scorer.max_length} tokens at a time",
            file=sys.stderr,
        )
    summaries = {task.name: summary(task, of) for task, of in zip(tasks, found, strict=True)}
    print(task_table(summaries))
    if config.records:
        write_records(Path(config.records), tasks, found)
    if config.json:
        setting = {
            "model": config.model or config.checkpoint,
            "policy": None if policy is None else str(policy),
        }
        write_results(Path(config.json), {**setting, "tasks": summaries})


def score_held_out(config: EvaluateConfig) -> None:
    """Print the held-out loss under each fork policy of `config`, and save the sweep's figure."""
    if config.figure:
        if not (config.sweep or config.sweep_offset):
            raise ValueError(f"figure {config.figure} shows a sweep: add --sweep 1.0 1.5 2.0")
        check_figure(Path(config.figure))
    settings = EvalConfig(rows=config.rows, positions=config.positions)
    check_batch(config.batch_size, 1, make_mesh(MeshConfig()))
    loaded = config.changed(load_model(str(config.checkpoint)))
    trained = loaded.model.fork_policy
    check_row_memory(config.batch_size, loaded.context_length or 1)
    rows = validation_rows(loaded)
    found = []
    for name, model in models_of(config, loaded).items():
        metrics = held_out(model, rows, config.batch_size, settings)
        found.append(Setting(name, model.fork_policy, metrics))
        print(f"{model.fork_policy or model.config.summary()}: {readable(metrics)}")
    if len(found) > 1:
        print(f"\n{table(found)}")
    if config.figure:
        title = f"{config.checkpoint}, {type(found[0].policy).__name__}"
        figure(found, title, trained).savefig(config.figure, dpi=150)
        print(f"figure: {Path(config.figure).absolute()}")


def models_of(config: EvaluateConfig, loaded: LanguageModel) -> dict[str, Architecture]:
    """Return the model under each fork policy that the config selects.

    Returns:
        Mapping from the name of a setting, such as "ratio 1.5" or "offset +0.2" in a sweep, to the
        model. Without a sweep there is one model, under the name "".

    Raises:
        ValueError: Both sweeps are given, or a sweep and a value of the swept option; the model is
            a plain decoder, the policy lacks an option that is overridden, or a value is out of
            range.
    """
    if config.sweep and config.sweep_offset:
        raise ValueError("--sweep and --sweep-offset are two settings at once: choose one")
    for name, swept in (("ratio", config.sweep), ("threshold_offset", config.sweep_offset)):
        if swept and getattr(config, name) is not None:
            raise ValueError(f"{name}={getattr(config, name)} is swept: leave it out")
    model = loaded.model
    if not (config.overrides or config.sweep or config.sweep_offset):
        return {"": model}
    policy = config.overridden(model.fork_policy)
    policies = {"": policy}
    if config.sweep:
        policies = {
            f"ratio {ratio:g}": override_policy(policy, ratio=ratio) for ratio in config.sweep
        }
    elif config.sweep_offset:
        policies = {
            f"offset {o:+g}": override_policy(policy, threshold_offset=o)
            for o in config.sweep_offset
        }
    return {name: model.with_policy(policy) for name, policy in policies.items()}


def command() -> None:
    run_command(main, EvaluateConfig)


if __name__ == "__main__":
    command()

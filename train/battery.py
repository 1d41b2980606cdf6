"""Score a model's success and validity on the variants of an environment.

thoughtbubbles battery --checkpoint runs/sft --battery.task sokoban_variants
"""

import dataclasses
import json
from pathlib import Path

import jax

from train.cli.command import run_command
from train.devices.mesh import MeshConfig, make_mesh
from train.evaluation.task_scores import check_output, write_results
from train.finetuning.battery import BatteryConfig, VariantScore, play_battery
from train.models.finetunable import FinetunableModel
from train.models.load import LanguageModel, check_named, load_named
from train.rl.learning.policy import sampler_of


@dataclasses.dataclass(frozen=True)
class BatteryRun:
    """Score a model on the variants of an environment: does it read its prompt?

    Attributes:
        checkpoint: Run folder, or the folder of one of its steps.
        model: Pretrained weights in place of a checkpoint: "smollm2", a Hugging Face folder, or a
            .gguf file.
        adapter: Folder of a LoRA adapter that `peft` wrote for these weights, merged into them.
        battery: Environment, variants and limits.
        json: File for the scores; none by default.
    """

    checkpoint: str | None = None
    model: str | None = None
    adapter: str | None = None
    battery: BatteryConfig = BatteryConfig(task="sokoban_variants")
    json: str | None = None

    def __post_init__(self):
        check_named(self.checkpoint, self.model)


def main(config: BatteryRun) -> None:
    """Print a table of the scores, a row for each variant, and write them to `config.json`."""
    if config.json:
        check_output(Path(config.json))
    config.battery.environments()
    lm = load_named(config.checkpoint, config.model)
    lm = lm if config.adapter is None else lm.with_adapter(config.adapter)
    scores = score(lm, config.battery)
    print(table(scores))
    if config.json:
        found = {name: dataclasses.asdict(score) for name, score in scores.items()}
        options = json.loads(json.dumps(dataclasses.asdict(config)))
        write_results(Path(config.json), {"options": options, "variants": found})


def score(lm: LanguageModel, config: BatteryConfig) -> dict[str, VariantScore]:
    """Play the battery with a language model, with its latent memory if it has one.

    Returns:
        Scores by the name of the variant.

    Raises:
        ValueError: The model's policy is not causal, or the config or an environment has a mistake.
    """
    lm.model.check_cacheable()
    policy = lm.memgen
    if policy is None:
        policy = sampler_of(FinetunableModel.whole(lm.model))
    return play_battery(policy, lm, config, make_mesh(MeshConfig(), jax.devices()[:1]))


def table(scores: dict[str, VariantScore]) -> str:
    """Format scores as a Markdown table with a row for each variant.

    The column `cut` is the fraction of responses that were truncated at `max_new_tokens`.
    """
    lines = ["| variant | success | validity | turns | cut |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {each.success:.3f} ± {each.error:.3f} | {each.validity:.3f} | "
        f"{each.turns:.2f} | {each.cut:.3f} |"
        for name, each in scores.items()
    ]
    return "\n".join(lines)


def command() -> None:
    run_command(main, BatteryRun)


if __name__ == "__main__":
    command()

"""Shared parts of studies that test if a small model tuned on one game still reads its prompt.

The studies follow "Debunk the Myth of SFT Generalization" (arXiv 2510.00237), but start from random
parameters. A small decoder (the base) first learns what a pretrained language model can do already.
Then each arm trains a LoRA adapter on demonstrations, whose prompts always show the same names
(frozen) or sampled names (diverse), and the tuned model is scored on the battery
(`train.finetuning.battery`). A study defines a `PromptGame`, and a subclass of `PromptStudy` for
its options.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from memgen import LoRAConfig
from thoughtbubbles import ModelConfig, Thoughtbubbles
from thoughtbubbles.pretrained import save_pretrained
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.benchmarks.timing import Clock
from train.data.chat_data import ChatDataConfig
from train.data.verbalise import Form
from train.devices.mesh import MeshConfig, make_mesh
from train.engine.config import EvalConfig
from train.engine.loop import run as run_job
from train.engine.optim import OptimizerConfig
from train.experiments.study import (
    Result,
    Results,
    StudyConfig,
    by_key,
    check_finished,
    check_names,
    markdown_table,
    mean_text,
    run_study,
    seeds_text,
)
from train.finetuning.battery import BatteryConfig, instructed, play_battery
from train.finetuning.demonstrations import demonstration_records, write_records
from train.finetuning.job import SFTConfig, SFTJob
from train.models.finetunable import FinetunableModel
from train.models.load import load_named
from train.rl.learning.policy import sampler_of
from train.rl.types import Split
from train.runs.metrics import read_metrics

KEY = ("arm", "base_states", "base_steps", "states", "steps", "episodes", "seed")
END = "<end>"
CHAT = (
    "{% for message in messages %}{{ message['content'] }}"
    f"{{% if message['role'] == 'assistant' %}}{END}{{% else %}} {{% endif %}}{{% endfor %}}"
)
"""Chat template for tokenizers whose tokens are words.

A message of the assistant ends in `END`, and any other message ends in a space.
"""

ARMS: dict[str, tuple[str, Form]] = {
    "answers, frozen": ("id", "answer"),
    "answers, diverse": ("diverse", "answer"),
    "thoughts, frozen": ("id", "both"),
    "thoughts, diverse": ("diverse", "both"),
    "thoughts alone, frozen": ("id", "thoughts"),
    "thoughts alone, diverse": ("diverse", "thoughts"),
}
"""Mapping from an arm to the variant of the prompts and the form of the responses (`verbalise`) in
its demonstrations.

In the form "thoughts", the last word of the thoughts is the answer.
"""

PRETRAINING = OptimizerConfig("muon", learning_rate=1e-2, weight_decay=0.0)
TUNING = OptimizerConfig(learning_rate=3e-3, weight_decay=0.0)
LORA = LoRAConfig(rank=16, targets=("q", "k", "v", "o", "up", "down"))
BATCH = 32
TRAINING_PROBLEMS_SEED = 1000
"""Seed of the order in which training problems are played, different from all seeds of tuning."""


@dataclasses.dataclass(frozen=True)
class PromptStudy(StudyConfig):
    """Options of a study of one game.

    Attributes:
        arms: Names of the arms to tune, all by default.
        base_states: Number of conversations, one for each game state, that the decoder is first
            trained on.
        base_steps: Number of training steps on these conversations.
        states: Number of game states in the demonstrations that each arm is tuned on.
        steps: Number of tuning steps of each arm.
        episodes: Number of problems of each variant and split that are played.
        runs: Folder for data and models. Data in this folder are reused, and runs are resumed.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    base_states: int = 24_000
    base_steps: int = 1200
    states: int = 4000
    steps: int = 600
    episodes: int = 100
    runs: str = "runs/prompt_study"

    def __post_init__(self):
        super().__post_init__()
        check_names("arm", self.arms, ARMS)


@dataclasses.dataclass(frozen=True)
class PromptGame:
    """A game with variants of its prompt, the model that learns it, and the columns of its tables.

    Attributes:
        task: Environment with its options as text, without the closing bracket, so that a variant
            can be added.
        early: Variants, at least one, on whose first turns the model is also scored during tuning.
        columns: Mapping from the name of a table's column to the variants that it averages over.
        paper: Mapping from an arm to a mapping from a column to the success that the paper reports,
            as text. Both mappings may lack entries.
        model: Config of the decoder.
        tokenizer: Function that makes the tokenizer, whose tokens are words.
        base_records: Function from the number of records and a seed to the records of chat data
            that the base is trained on.
        seq_len: Maximum number of target tokens in a row of the base's data.
        tuning_seq_len: Maximum number of target tokens in a row of demonstrations.
        max_new_tokens: Maximum number of tokens per response.
        play_training: Whether training problems of each variant are played too.
    """

    task: str
    early: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]]
    paper: Mapping[str, Mapping[str, str]]
    model: ModelConfig
    tokenizer: Callable[[], PretrainedTokenizer]
    base_records: Callable[[int, int], Iterator[dict[str, Any]]]
    seq_len: int
    tuning_seq_len: int
    max_new_tokens: int
    play_training: bool = False

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants of all columns, in order."""
        return tuple(itertools.chain(*self.columns.values()))


def run_game(config: PromptStudy, game: PromptGame) -> None:
    """Tune the arms that the file of results lacks, or print the tables.

    Args:
        config: Options of the study.
        game: Game to learn.
    """
    run_study(
        config,
        KEY,
        lambda config, results: train_missing(config, game, results),
        lambda results: report(results, game),
    )


def train_missing(
    config: PromptStudy, game: PromptGame, results: Results
) -> Iterator[tuple[Result, str]]:
    """Train the runs that `results` lacks, and yield the result of each with a line to print.

    All arms of a seed start from the same base, which is trained first.

    Args:
        config: Options of the study.
        game: Game to learn.
        results: Finished runs.
    """
    fixed = {name: getattr(config, name) for name in KEY[1:-1]}
    runs = results.missing(
        {"arm": arm, **fixed, "seed": seed} for seed in config.seeds for arm in config.arms
    )
    for seed, of_seed in itertools.groupby(runs, key=lambda run: run["seed"]):
        clock = Clock()
        base = pretrained(config, game, seed)
        base_cost = clock.read()
        for run in of_seed:
            clock = Clock()
            found = tuned(config, game, run["arm"], base, seed)
            result = run | found | {"jax": jax.__version__}
            result |= {"base_cost": base_cost._asdict(), "cost": clock.read()._asdict()}
            shown = ", ".join(f"{name} {cell(score)}" for name, score in found["scores"].items())
            yield result, f"{run['arm']} seed {seed}: {shown}"


def pretrained(config: PromptStudy, game: PromptGame, seed: int) -> Path:
    """Train the base, from which all arms of a seed start, or reuse it if its run is finished.

    Args:
        config: Options of the study.
        game: Game to learn.
        seed: Seed of the parameters, of the conversations and of training.

    Returns:
        Run folder of the decoder.

    Raises:
        SystemExit: A signal has stopped the run before its last step.
    """
    folder = Path(config.runs) / f"seed_{seed}"
    fresh = folder / "fresh"
    if not fresh.exists():
        words = game.tokenizer()
        params = nnx.to_pure_dict(nnx.state(Thoughtbubbles(game.model, rngs=nnx.Rngs(seed))))
        save_pretrained(fresh, game.model, params, words, format="thoughtbubbles")
    data = folder / f"base_{config.base_states}.jsonl"
    if not data.exists():
        write_records(data, game.base_records(config.base_states, seed))
    out = folder / f"base_{config.base_states}_{config.base_steps}"
    rows = ChatDataConfig(path=(str(data),), seq_len=game.seq_len, seed=seed)
    sft(fresh, rows, out, config.base_steps, seed, train="all", optimizer=PRETRAINING)
    return out


def tuned(
    config: PromptStudy, game: PromptGame, arm: str, base: Path, seed: int
) -> dict[str, dict[str, Any]]:
    """Tune an adapter on an arm's demonstrations, and play the variants of the game.

    Args:
        config: Options of the study.
        game: Game to learn.
        arm: Name of the arm, a key of `ARMS`.
        base: Run folder of the base. The arm's data and run folder are written next to this folder.
        seed: Seed of the demonstrations and of tuning.

    Returns:
        Entries of a result. `scores` maps a variant to the fields of `VariantScore` on held-out
        problems; if `game.play_training`, `trained` does the same for training problems. `early`
        maps a step of tuning to the validity of first answers in each variant of `game.early`.

    Raises:
        SystemExit: A signal has stopped the run before its last step.
    """
    variant, form = ARMS[arm]
    stem = f"{base.name}_{arm.replace(', ', '_')}_{config.states}"
    data, out = base.with_name(f"{stem}.jsonl"), base.with_name(f"{stem}_{config.steps}")
    if not data.exists():
        shown = instructed(f"{game.task}, variant='{variant}')", seed)
        write_records(data, demonstration_records(shown, "train", config.states, 1, form))
    battery = BatteryConfig(
        f"{game.task})",
        game.variants,
        config.episodes,
        max_new_tokens=game.max_new_tokens,
        max_rows=128,
    )
    early = dataclasses.replace(battery, variants=game.early, max_turns=1)
    rows = ChatDataConfig(path=(str(data),), seq_len=game.tuning_seq_len, seed=seed)
    sft(base, rows, out, config.steps, seed, train="lora", optimizer=TUNING, battery=early)
    found = {"scores": played(out, battery), "early": validities(out, game.early)}
    if game.play_training:
        apart = dataclasses.replace(battery, seed=TRAINING_PROBLEMS_SEED)
        found["trained"] = played(out, apart, "train")
    return found


def played(
    run_folder: Path, battery: BatteryConfig, split: Split = "test"
) -> dict[str, dict[str, float]]:
    """Score a tuned model on each variant of a battery, as the command `battery` does.

    Args:
        run_folder: Run folder of the model.
        battery: Variants, number of problems and limits.
        split: Split of the problems.

    Returns:
        Mapping from the name of a variant to the fields of its `VariantScore`.
    """
    lm = load_named(str(run_folder), None)
    policy = sampler_of(FinetunableModel.whole(lm.model))
    found = play_battery(policy, lm, battery, make_mesh(MeshConfig(), jax.devices()[:1]), split)
    return {name: dataclasses.asdict(each) for name, each in found.items()}


def conversation(
    prompt: str, said: Mapping[str, str], rng: np.random.Generator
) -> dict[str, list[dict[str, str]]]:
    """Make a record of chat data from questions about a prompt, in random order.

    Args:
        prompt: Prompt of the game, which precedes the first question in its message.
        said: Mapping from a question to its answer.
        rng: Random generator of the order.

    Returns:
        A dict `{"messages": [...]}`, in which the user asks and the assistant answers in turns.
    """
    messages = []
    for asked in map(str, rng.permutation(list(said))):
        content = asked if messages else f"{prompt}{asked}"
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": said[asked]})
    return {"messages": messages}


def validities(out: Path, early: Sequence[str]) -> dict[str, dict[str, float]]:
    """Read the validity of first answers from the metrics of a tuning run.

    Args:
        out: Run folder.
        early: Names of the variants that were played during tuning, at least one.

    Returns:
        Mapping from the step, as text, to a mapping from a variant to its validity, from 0 to 1.
    """
    return {
        str(line["step"]): {name: line[f"eval/battery/{name}/validity"] for name in early}
        for line in read_metrics(out)
        if f"eval/battery/{early[0]}/validity" in line
    }


def sft(
    weights: Path, data: ChatDataConfig, out: Path, steps: int, seed: int, **options: Any
) -> None:
    """Train on conversations, as the command `sft` does, or resume the run in the folder `out`.

    Args:
        weights: Folder of the model that training starts from.
        data: Conversations, row length and order.
        out: Run folder.
        steps: Number of training steps.
        seed: Seed of the run.
        options: Further fields of `SFTConfig`. A `battery` is played every `max(steps // 8, 1)`
            steps and after the last step.

    Raises:
        SystemExit: A signal has stopped the run before its last step.
        ValueError: The data or the run folder has a mistake.
    """
    config = SFTConfig(
        weights=str(weights),
        data=data,
        lora=LORA,
        steps=steps,
        batch_size=BATCH,
        evaluation=EvalConfig(every=max(steps // 8, 1) if "battery" in options else 0),
        save_every=500,
        seed=seed,
        out=str(out),
        **options,
    )
    run_job(lambda: SFTJob(config), config)
    check_finished(out, steps)


def cell(score: Mapping[str, float]) -> str:
    """Format success and validity of a variant, such as `0.91/1.00`."""
    return f"{score['success']:.2f}/{score['validity']:.2f}"


def report(results: list[Result], game: PromptGame) -> str:
    """Format Markdown tables of success and validity after tuning, and of validity during tuning.

    A cell is a mean over seeds with its standard error. Success and validity on training problems
    have tables of their own if all results have these scores. If the results have different
    options, each combination of options has its own rows, which name the options; otherwise the
    paper's success is shown below the success of each arm.

    Args:
        results: Finished runs.
        game: Game of the runs, which defines the columns.
    """
    groups = by_key(results, *KEY[:-1])
    several = len({how[1:] for how in groups}) > 1
    names = {
        (arm, *how): arm
        + f" ({', '.join(f'{name} {of}' for name, of in zip(KEY[1:-1], how, strict=True))})"
        * several
        for arm, *how in groups
    }
    lines = []
    measures = {"success": ("scores", "success"), "validity": ("scores", "validity")}
    if all("trained" in run for run in results):
        measures["success, training problems"] = ("trained", "success")
        measures["validity, training problems"] = ("trained", "validity")
    for title, (which, measure) in measures.items():
        rows = []
        for (arm, *how), runs in groups.items():
            cells = [
                mean_text([_mean(run[which], of, measure) for run in runs], 2)
                for of in game.columns.values()
            ]
            rows.append((names[arm, *how], *cells, seeds_text(runs)))
            if title == "success" and arm in game.paper and not several:
                cells = [game.paper[arm].get(name, "") for name in game.columns]
                rows.append((f"{arm}: paper", *cells, ""))
        lines += [*markdown_table((title, *game.columns, "seeds"), rows), ""]
    rows = [
        (name, step, *(mean_text([run["early"][step][of] for run in runs], 2) for of in game.early))
        for name, runs in zip(names.values(), groups.values(), strict=True)
        for step in runs[0]["early"]
    ]
    lines += markdown_table(("validity of first answers", "step", *game.early), rows)
    return "\n".join(lines)


def _mean(scores: Mapping[str, Any], of: Sequence[str], measure: str) -> float:
    return float(np.mean([scores[name][measure] for name in of]))

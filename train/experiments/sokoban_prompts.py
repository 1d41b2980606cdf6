"""Does a small model that was tuned on Sokoban still read what its prompt calls the four steps?

python -m train.experiments.sokoban_prompts --out sokoban_prompts.jsonl
python -m train.experiments.sokoban_prompts --report sokoban_prompts.jsonl

What `demonstrations`, `sft` and `battery` do, from random parameters, after "Debunk the Myth of SFT
Generalization" (arXiv 2510.00237). A decoder of 0.4 M parameters first learns what a language model
knows already: to say the way of a board in the steps' own names, and to look up what a prompt calls
a step, for all words. Then an adapter is tuned on answers, on thoughts with an answer, or on
thoughts alone, with the original names (frozen) or four words for each state (diverse), and plays
held-out boards.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
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
from train.cli.command import run_command
from train.data.chat_data import ChatDataConfig
from train.data.everyday_words import EVERYDAY_WORDS
from train.data.semantic_maps import TEMPLATES, MapSampler, PromptTemplate
from train.data.verbalise import Form, Trace, verbalise
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
from train.rl.environments.sokoban_variants import ORIGINAL, STEPS, SokobanVariants
from train.rl.learning.policy import sampler_of
from train.runs.metrics import read_metrics

KEY = ("arm", "base_states", "base_steps", "states", "steps", "episodes", "seed")
_NAMES = " ".join(f"{step} {{{step}}}" for step in STEPS)
TEMPLATE = PromptTemplate("names_and_board", (f"{_NAMES}\n{{board}}",), tuple(STEPS), ("board",))
TEMPLATES[TEMPLATE.name] = TEMPLATE
HELD_OUT = 40  # of the words
TASK = f"sokoban_variants(template='{TEMPLATE.name}', held_out={HELD_OUT}, walls=1"
ARMS: dict[str, tuple[str, Form]] = {
    "answers, frozen": ("id", "answer"),
    "answers, diverse": ("diverse", "answer"),
    "thoughts, frozen": ("id", "both"),
    "thoughts, diverse": ("diverse", "both"),
    "thoughts alone, frozen": ("id", "thoughts"),
    "thoughts alone, diverse": ("diverse", "thoughts"),
}
"""Variant and form of each arm's demonstrations; thoughts alone end in the answer."""
EARLY = ("id", "numerical", "held_out")
"""Variants whose first answers are scored during tuning too."""

COLUMNS = {
    "ID": ("id",),
    "three names": ("alphabetical", "numerical", "random"),
    "cardinal": ("cardinal",),
    "trained words": ("diverse",),
    "held-out words": ("held_out",),
    "larger": ("larger",),
    "two boxes": ("two_boxes",),
    "Fake": ("fake",),
    "Fake, cardinal": ("fake_cardinal",),
}
"""Variants of each column of the tables, means over several."""
PAPER: dict[str, dict[str, str]] = {
    arm: dict(zip(("ID", "three names", "larger", "two boxes", "Fake"), cells.split(), strict=True))
    for arm, cells in {
        "answers, frozen": ".98 0 .64 .35 .93",
        "answers, diverse": ".91 .88 .53 .33 0",
        "thoughts, frozen": "1.0 .58 .53 .57 .03",
        "thoughts, diverse": "1.0 .98 .74 .58 0",
    }.items()
}
"""Success of Qwen2.5-7B in the paper's Table 1; boards there are made otherwise."""

VARIANTS = tuple(itertools.chain(*COLUMNS.values()))

WAY = "?"  # asks for the way
END = "<end>"
CHAT = (
    "{% for message in messages %}{{ message['content'] }}"
    f"{{% if message['role'] == 'assistant' %}}{END}{{% else %}} {{% endif %}}{{% endfor %}}"
)
# The walls around a board are a token for each row; every other sign and word is one.
_TOKENS = r"</?\w+>|#{5,}\n#|#\n#{5,}|#\n#|\w+|[^\w\s]\x{FE0F}?"
SEQ_LEN, BATCH = 64, 32
MODEL = ModelConfig(vocab_size=264, embed_dim=96, num_layers=3, num_heads=4)
PRETRAINING = OptimizerConfig("muon", learning_rate=1e-2, weight_decay=0.0)
TUNING = OptimizerConfig(learning_rate=3e-3, weight_decay=0.0)
LORA = LoRAConfig(rank=16, targets=("q", "k", "v", "o", "up", "down"))


@dataclasses.dataclass(frozen=True)
class SokobanPrompts(StudyConfig):
    """Tunes a small decoder on demonstrations of Sokoban and plays the battery, or reports scores.

    Attributes:
        arms: Arms by name, all by default.
        base_states: Number of states that the decoder first learns ways and names of.
        base_steps: Number of training steps in which it does.
        states: Number of states that each arm is tuned on.
        steps: Number of tuning steps of each arm.
        episodes: Number of held-out boards of each variant.
        runs: Folder for data and models; a run found there is continued.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    base_states: int = 24_000
    base_steps: int = 1200
    states: int = 4000
    steps: int = 600
    episodes: int = 100
    runs: str = "runs/sokoban_prompts"
    out: str = "sokoban_prompts.jsonl"

    def __post_init__(self):
        super().__post_init__()
        check_names("arm", self.arms, ARMS)


def main(config: SokobanPrompts) -> None:
    """Tune what is missing, or print the tables."""
    run_study(config, KEY, train_missing, report)


def train_missing(config: SokobanPrompts, results: Results) -> Iterator[tuple[Result, str]]:
    """Scores of the missing arms; those of a seed begin with the same decoder."""
    fixed = {name: getattr(config, name) for name in KEY[1:-1]}
    runs = results.missing(
        {"arm": arm, **fixed, "seed": seed} for seed in config.seeds for arm in config.arms
    )
    for seed, of_seed in itertools.groupby(runs, key=lambda run: run["seed"]):
        clock = Clock()
        base = pretrained(config, seed)
        base_cost = clock.read()
        for run in of_seed:
            clock = Clock()
            scores, early = tuned(config, run["arm"], base, seed)
            result = run | {"scores": scores, "early": early, "jax": jax.__version__}
            result |= {"base_cost": base_cost._asdict(), "cost": clock.read()._asdict()}
            shown = ", ".join(f"{name} {cell(score)}" for name, score in scores.items())
            yield result, f"{run['arm']} seed {seed}: {shown}"


def tokenizer() -> PretrainedTokenizer:
    """A tokenizer whose tokens are the words of prompts, thoughts and names, and signs of boards.

    What it decodes has a space between tokens, and is encoded to the same ids.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    sizes = range(5, 11)
    walls = [f"{'#' * size}\n#" for size in sizes] + [f"#\n{'#' * size}" for size in sizes]
    tags = [f"<{slash}{name}>" for name in ("think", "answer") for slash in ("", "/")]
    words = ["The", "way", "is", "Now", "which", "called"]
    listed = [END, "<unknown>", *tags, *words, *names(), *walls, "#\n#", *"#-.$*@+,", WAY]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(listed))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    splitter: Any = pre_tokenizers.Split(Regex(_TOKENS), "removed", invert=True)
    made.pre_tokenizer = splitter
    made.add_special_tokens([AddedToken(END, normalized=False)])
    return PretrainedTokenizer(made.to_str(), name="words", stop_tokens=[END], chat_template=CHAT)


def names() -> tuple[str, ...]:
    """All names that a prompt of any variant may show."""
    fixed = [each.shown.answers for each in SokobanVariants.variants.values() if each.shown]
    return tuple(dict.fromkeys([*itertools.chain(*fixed), *EVERYDAY_WORDS]))


def base_records(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Conversations on a board: its way, and what the prompt calls two steps, in random order.

    Boards are those of training, one in five with two boxes; one prompt in four shows the steps'
    own names, which is what they are mostly called. A way is a thought, in the steps' own names. A
    name is an answer, behind an empty thought or one that says it: what thoughts of a demonstration
    are made of is known, their composition is not.

    Args:
        count: Number of conversations.
        seed: Seed of boards, names and order.
    """
    maps = MapSampler(tuple(STEPS), names(), seed=seed)
    one, two = (
        instructed(f"{TASK}, variant='{variant}')", seed).demonstrations("train", count)
        for variant in ("id", "two_boxes")
    )
    for index in range(count):
        demonstration = next(one if index % 5 else two)
        board = demonstration.prompt.text.partition("\n")[2]
        shown = ORIGINAL if index % 4 == 0 else maps.map(0, index)
        prompt = TEMPLATE.render(shown, board=board)
        way = demonstration.trace.thoughts.removeprefix("The way is ").partition(".")[0]
        rng = np.random.default_rng([seed, index])
        said = {WAY: f"<think>The way is {way}.</think>"}
        for step in map(str, rng.choice(list(STEPS), 2, replace=False)):
            trace = Trace(f"Now {step}, which is called {prompt.target(step)}", prompt.target(step))
            said[step] = verbalise(trace, "both" if rng.random() < 0.25 else "answer")
        messages = []
        for asked in map(str, rng.permutation(list(said))):
            content = asked if messages else f"{prompt.text}{asked}"
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": said[asked]})
        yield {"messages": messages}


def pretrained(config: SokobanPrompts, seed: int) -> Path:
    """Run folder of the decoder that all arms of a seed begin with."""
    folder = Path(config.runs) / f"seed_{seed}"
    fresh = folder / "fresh"
    if not fresh.exists():
        words = tokenizer()
        params = nnx.to_pure_dict(nnx.state(Thoughtbubbles(MODEL, rngs=nnx.Rngs(seed))))
        save_pretrained(fresh, MODEL, params, words, format="thoughtbubbles")
    data = folder / f"base_{config.base_states}.jsonl"
    if not data.exists():
        write_records(data, base_records(config.base_states, seed))
    out = folder / f"base_{config.base_states}_{config.base_steps}"
    _sft(fresh, data, out, config.base_steps, seed, train="all", optimizer=PRETRAINING)
    return out


def tuned(
    config: SokobanPrompts, arm: str, base: Path, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores of an arm on each variant, and those of its first answers during tuning, by step."""
    variant, form = ARMS[arm]
    stem = f"{base.name}_{arm.replace(', ', '_')}_{config.states}"
    data, out = base.with_name(f"{stem}.jsonl"), base.with_name(f"{stem}_{config.steps}")
    if not data.exists():
        shown = instructed(f"{TASK}, variant='{variant}')", seed)
        write_records(data, demonstration_records(shown, "train", config.states, 1, form))
    battery = BatteryConfig(f"{TASK})", VARIANTS, config.episodes, max_new_tokens=48, max_rows=128)
    early = dataclasses.replace(battery, variants=EARLY, max_turns=1)
    _sft(base, data, out, config.steps, seed, train="lora", optimizer=TUNING, battery=early)
    return played(out, battery), validities(out)


def played(run_folder: Path, battery: BatteryConfig) -> dict[str, dict[str, float]]:
    """Scores of a tuned model on each variant, as the command `battery` finds them."""
    lm = load_named(str(run_folder), None)
    policy = sampler_of(FinetunableModel.whole(lm.model))
    found = play_battery(policy, lm, battery, make_mesh(MeshConfig(), jax.devices()[:1]))
    return {name: dataclasses.asdict(each) for name, each in found.items()}


def validities(out: Path) -> dict[str, dict[str, float]]:
    """Validity of first answers on each variant of `EARLY`, by step of a tuning run."""
    return {
        str(line["step"]): {name: line[f"eval/battery/{name}/validity"] for name in EARLY}
        for line in read_metrics(out)
        if f"eval/battery/{EARLY[0]}/validity" in line
    }


def _sft(weights: Path, data: Path, out: Path, steps: int, seed: int, **options: Any) -> None:
    config = SFTConfig(
        weights=str(weights),
        data=ChatDataConfig(path=(str(data),), seq_len=SEQ_LEN, seed=seed),
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


def cell(score: dict[str, float]) -> str:
    """Success and validity of a variant."""
    return f"{score['success']:.2f}/{score['validity']:.2f}"


def report(results: list[Result]) -> str:
    """Markdown tables of success, beside the paper's, of validity, and of validity during tuning.

    Means over seeds with standard errors; runs of other options have rows of their own, which say
    so.
    """
    groups = by_key(results, *KEY[:-1])
    several = len({how[1:] for how in groups}) > 1
    lines = []
    for measure in ("success", "validity"):
        rows = []
        for (arm, *how), runs in groups.items():
            options = zip(KEY[1:-1], how, strict=True)
            note = f" ({', '.join(f'{name} {value}' for name, value in options)})" * several
            cells = [
                mean_text([_mean(run["scores"], of, measure) for run in runs], 2)
                for of in COLUMNS.values()
            ]
            rows.append((f"{arm}{note}", *cells, seeds_text(runs)))
            if measure == "success" and arm in PAPER and not several:
                cells = [PAPER[arm].get(name, "") for name in COLUMNS]
                rows.append((f"{arm}: paper", *cells, ""))
        lines += [*markdown_table((measure, *COLUMNS, "seeds"), rows), ""]
    rows = [
        (arm, step, *(mean_text([run["early"][step][name] for run in runs], 2) for name in EARLY))
        for (arm, *_), runs in groups.items()
        for step in runs[0]["early"]
    ]
    lines += markdown_table(("validity of first answers", "step", *EARLY), rows)
    return "\n".join(lines)


def _mean(scores: dict[str, Any], of: Sequence[str], measure: str) -> float:
    return float(np.mean([scores[name][measure] for name in of]))


def command() -> None:
    run_command(main, SokobanPrompts)


if __name__ == "__main__":
    command()

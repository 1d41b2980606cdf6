"""Test if a small model tuned on Sokoban still reads the names of the four steps in its prompt.

python -m train.experiments.sokoban_prompts --out sokoban_prompts.jsonl
python -m train.experiments.sokoban_prompts --report sokoban_prompts.jsonl

This follows "Debunk the Myth of SFT Generalization" (arXiv 2510.00237) with the commands
`demonstrations`, `sft` and `battery`, but starts from random parameters. A decoder of 0.36 M
parameters first learns what a pretrained language model can do already: write the solution path of
a board in the original names of the steps, and look up the name that a prompt gives to a step, for
all words. Then a LoRA adapter is tuned on answers, on thoughts with an answer, or on thoughts
alone. The tuning prompts show the original names (frozen), or four words that are sampled for each
state (diverse). The tuned model plays held-out boards.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from thoughtbubbles import ModelConfig
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.cli.command import run_command
from train.data.everyday_words import EVERYDAY_WORDS
from train.data.semantic_maps import TEMPLATES, MapSampler, PromptTemplate
from train.data.verbalise import Trace, verbalise
from train.experiments.prompt_study import (
    CHAT,
    END,
    PromptGame,
    PromptStudy,
    conversation,
    run_game,
)
from train.finetuning.battery import instructed
from train.rl.environments.sokoban_variants import ORIGINAL, STEPS, SokobanVariants

_NAMES = " ".join(f"{step} {{{step}}}" for step in STEPS)
TEMPLATE = PromptTemplate("names_and_board", (f"{_NAMES}\n{{board}}",), tuple(STEPS), ("board",))
TEMPLATES[TEMPLATE.name] = TEMPLATE
HELD_OUT = 40  # number of words that only the variant `held_out` uses
TASK = f"sokoban_variants(template='{TEMPLATE.name}', held_out={HELD_OUT}, walls=1"

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
PAPER: dict[str, dict[str, str]] = {
    arm: dict(zip(("ID", "three names", "larger", "two boxes", "Fake"), cells.split(), strict=True))
    for arm, cells in {
        "answers, frozen": ".98 0 .64 .35 .93",
        "answers, diverse": ".91 .88 .53 .33 0",
        "thoughts, frozen": "1.0 .58 .53 .57 .03",
        "thoughts, diverse": "1.0 .98 .74 .58 0",
    }.items()
}
"""Success of Qwen2.5-7B in the paper's Table 1, where boards are generated differently."""

WAY = "?"  # question for the solution path
# Each line break of a board is one token with the outer walls before and after it. Every other sign
# and every word is a token.
_TOKENS = r"</?\w+>|#{5,}\n#|#\n#{5,}|#\n#|\w+|[^\w\s]\x{FE0F}?"


@dataclasses.dataclass(frozen=True)
class SokobanPrompts(PromptStudy):
    """Tunes a small decoder on Sokoban and scores it on the battery, or reports stored scores.

    The decoder first learns to write solution paths and to look up names of steps.
    """

    runs: str = "runs/sokoban_prompts"
    out: str = "sokoban_prompts.jsonl"


def main(config: SokobanPrompts) -> None:
    """Tune the arms that the file of results lacks, or print the tables."""
    run_game(config, GAME)


def tokenizer() -> PretrainedTokenizer:
    """Make a tokenizer whose tokens are words of prompts and thoughts, names, and signs of boards.

    Decoded text has a space between tokens, and encodes to the same ids.
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
    """Return all names of steps that a prompt of any variant may show, without duplicates."""
    fixed = [each.shown.answers for each in SokobanVariants.variants.values() if each.shown]
    return tuple(dict.fromkeys([*itertools.chain(*fixed), *EVERYDAY_WORDS]))


def base_records(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Generate conversations that teach the parts of a demonstration's thoughts separately.

    Each conversation shows a prompt with a training board (one in five has two boxes) and asks, in
    random order, for the solution path and for the prompt's names of two steps. The path is given
    as a thought, in the original names of the steps. A name is given as an answer after an empty
    thought or, in one case of four on average, after a thought that states the name. No thought
    combines a path with a name, whereas the thoughts of demonstrations do. One prompt in four uses
    the original names.

    Args:
        count: Number of conversations.
        seed: Seed of the boards, the names and the order of questions.

    Yields:
        Records of chat data, `{"messages": [...]}`.
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
        yield conversation(prompt.text, said, rng)


GAME = PromptGame(
    task=TASK,
    early=("id", "numerical", "held_out"),
    columns=COLUMNS,
    paper=PAPER,
    model=ModelConfig(vocab_size=264, embed_dim=96, num_layers=3, num_heads=4),
    tokenizer=tokenizer,
    base_records=base_records,
    seq_len=64,
    tuning_seq_len=64,
    max_new_tokens=48,
)


def command() -> None:
    run_command(main, SokobanPrompts)


if __name__ == "__main__":
    command()

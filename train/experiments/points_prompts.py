"""Test if a small model tuned on General Points still reads the face-card values in its prompt.

python -m train.experiments.points_prompts --out points_prompts.jsonl
python -m train.experiments.points_prompts --report points_prompts.jsonl

This is the second game of "Debunk the Myth of SFT Generalization" (arXiv 2510.00237). Training
starts from random parameters, as in `sokoban_prompts`. A decoder of 0.35 M parameters first learns
what a pretrained language model can do already: look up the values that a prompt gives to J, Q and
K, write the values of cards, and make 24 from four numbers in a question. Then a LoRA adapter is
tuned on answers, on thoughts with an answer, or on thoughts alone. In the tuning prompts all face
cards count 10 (frozen), or one of six maps of values is sampled for each prompt (diverse). The
tuned model plays hands of held-out numbers and hands of training numbers.

Hands have four cards, as in the paper. With three cards, so few hands can make 24 that at most 21
problems of a variant would be held out. Only three problems would have a formula both for the
values that the variant "fake" shows and for the values by which it scores, and none of these three
problems would be held out.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from thoughtbubbles import ModelConfig
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.cli.command import run_command
from train.data.semantic_maps import TEMPLATES, PromptTemplate, SemanticMap
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
from train.rl.environments.general_points import FACES, RANKS
from train.rl.environments.general_points_solver import formula_text, solve, steps
from train.rl.problems import is_held_out

CARDS, TARGET = 4, 24
_COUNTS = " ".join(f"{face} {{{face}}}" for face in FACES)
TEMPLATE = PromptTemplate(
    "counts_and_cards", (f"{_COUNTS}\n{{cards}}\n{{target}}\n",), FACES, ("cards", "target")
)
TEMPLATES[TEMPLATE.name] = TEMPLATE
HELD_OUT = 2  # number of maps, of eight, that only the variant `held_out` uses
TASK = f"general_points(template='{TEMPLATE.name}', held_out={HELD_OUT}, cards={CARDS}, bare=True"
MOST_COUNTED, LARGEST = 20, 13
"""Maximum value of a face card, and maximum number to make 24 from, in data of `base_records`."""

COLUMNS = {
    "ID": ("id",),
    "all 5": ("all_5",),
    "all 7": ("all_7",),
    "all 12": ("all_12",),
    "regular": ("regular",),
    "drawn maps": ("diverse",),
    "held-out maps": ("held_out",),
    "large": ("large",),
    "Fake": ("fake",),
    "Fake, regular": ("fake_regular",),
}
_PAPERS = ("ID", "all 5", "all 7", "all 12", "regular", "large", "Fake")
PAPER: dict[str, dict[str, str]] = {
    arm: dict(zip(_PAPERS, cells.split(), strict=True))
    for arm, cells in {
        "answers, frozen": ".61 .23 .25 .07 .06 .02 .01",
        "answers, diverse": ".78 .71 .70 .09 .07 .03 0",
        "thoughts, frozen": ".95 .90 .90 .85 .86 .80 0",
        "thoughts, diverse": ".96 .93 .93 .90 .89 .84 0",
    }.items()
}
"""Success of Qwen2.5-7B in the paper's Table 1."""

HeldOut = Callable[[Sequence[int]], bool]
COUNT, MAKE = "count", "?"
"""COUNT asks for the values of the cards, and MAKE for a formula of the numbers before it."""
_SIGNS = "+-*/()=,."
# Tokens that no text uses. They replace parts of JSON answers, which the vocabulary had when the
# stored results were measured, so that the ids of numbers stay the same.
_UNUSED = tuple(f"<unused {number}>" for number in range(5))
_TOKENS = r"</?\w+>|\d+|\w+|[^\w\s]"


@dataclasses.dataclass(frozen=True)
class PointsPrompts(PromptStudy):
    """Tunes a small decoder on General Points and scores it on the battery, or reports scores.

    The decoder first learns to look up values of cards, and to make 24 from four numbers.
    """

    steps: int = 800
    runs: str = "runs/points_prompts"
    out: str = "points_prompts.jsonl"


def main(config: PointsPrompts) -> None:
    """Tune the arms that the file of results lacks, or print the tables."""
    run_game(config, GAME)


def tokenizer() -> PretrainedTokenizer:
    """Make a tokenizer whose tokens are words, numbers and signs.

    Decoded text has a space before "(" and after "." where another word is next to the sign, and no
    other spaces around signs, so that a formula is one word. Decoded text encodes to the same ids.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tags = [f"<{slash}{name}>" for name in ("think", "answer") for slash in ("", "/")]
    words = [*FACES, COUNT, "as", "So", MAKE]
    numbers = map(str, numbers_in_formulas())
    listed = [END, "<unknown>", *tags, *words, *_SIGNS, *_UNUSED, *numbers]
    made = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(listed)}, unk_token="<unknown>")
    )
    splitter: Any = pre_tokenizers.Split(Regex(_TOKENS), "removed", invert=True)
    made.pre_tokenizer = splitter
    near = [decoders.Replace(f" {sign}", sign) for sign in _SIGNS if sign != "("]
    near += [decoders.Replace(f"{sign} ", sign) for sign in _SIGNS if sign != "."]
    spaced = decoders.WordPiece("##", cleanup=False)
    made.decoder = decoders.Sequence([spaced, decoders.Fuse(), *near])  # pyright: ignore
    made.add_special_tokens([AddedToken(END, normalized=False)])
    return PretrainedTokenizer(made.to_str(), name="words", stop_tokens=[END], chat_template=CHAT)


def numbers_in_formulas() -> list[int]:
    """Return the numbers that need tokens, in increasing order and without duplicates.

    These are the numbers in prompts, and the numbers in the steps of all formulas that make 24 from
    `CARDS` numbers from 1 to `LARGEST`.
    """
    found = {*range(MOST_COUNTED + 1), TARGET}
    for numbers in itertools.combinations_with_replacement(range(1, LARGEST + 1), CARDS):
        formula = solve(numbers, TARGET)
        if formula is not None:
            found.update(int(n) for step in steps(formula) for n in re.findall("[0-9]+", step))
    return sorted(found)


def base_records(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Generate conversations that teach the parts of a demonstration's thoughts separately.

    Each conversation shows a prompt and asks, in random order, for the value of a face card, for
    the values of the cards, and for two formulas. Face cards have random values from 1 to 20; on
    average, all three values are equal in half of the prompts. The numbers of a formula are given
    in its question and do not come from the prompt's cards. Therefore no answer both looks up
    values and makes 24 from them. All numbers of formulas and cards are training numbers. On
    average, three of five formulas follow their steps in a thought, and the other formulas are an
    answer after an empty thought.

    Args:
        count: Number of conversations.
        seed: Seed of the values of face cards, the cards, the numbers and the order of questions.

    Yields:
        Records of chat data, `{"messages": [...]}`.
    """
    game = instructed(f"{TASK})", seed)
    held_out = lambda numbers: is_held_out(game.split_key(((), str(sorted(numbers)))))  # noqa: E731
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        shown = _counts(rng)
        cards, numbers = _cards(rng, shown, held_out)
        prompt = TEMPLATE.render(shown, cards=", ".join(cards), target=str(TARGET))
        face = FACES[rng.integers(len(FACES))]
        counts = f"{' '.join(cards)} count as {' '.join(map(str, numbers))}."
        said = {
            face: verbalise(Trace("", prompt.target(face)), "answer"),
            COUNT: f"<think>{counts}</think>",
        }
        for _ in range(2):
            numbers, trace = _formula(rng, held_out)
            asked = f"{' '.join(map(str, numbers))} {MAKE}"
            said[asked] = verbalise(trace, "thoughts" if rng.random() < 0.6 else "answer")
        yield conversation(prompt.text, said, rng)


def _counts(rng: np.random.Generator) -> SemanticMap:
    values = [str(value) for value in rng.integers(1, MOST_COUNTED + 1, len(FACES))]
    values = values[:1] * len(FACES) if rng.random() < 0.5 else values
    return SemanticMap("drawn", dict(zip(FACES, values, strict=True)))


def _cards(
    rng: np.random.Generator, shown: SemanticMap, held_out: HeldOut
) -> tuple[list[str], list[int]]:
    """Sample cards whose values are training numbers; return the cards and their values."""
    while True:
        cards = [RANKS[i] for i in rng.integers(0, len(RANKS), CARDS)]
        numbers = [int(shown.names.get(card, card)) for card in cards]
        if not held_out(numbers):
            return cards, numbers


def _formula(rng: np.random.Generator, held_out: HeldOut) -> tuple[list[int], Trace]:
    """Sample training numbers that can make the target; return them and the trace of a formula."""
    while True:
        numbers = [int(number) for number in rng.integers(1, LARGEST + 1, CARDS)]
        formula = None if held_out(numbers) else solve(numbers, TARGET)
        if formula is not None:
            text = formula_text(formula)
            return numbers, Trace(f"{', '.join(steps(formula))}. So {text}", text)


GAME = PromptGame(
    task=TASK,
    early=("id", "all_5", "regular"),
    columns=COLUMNS,
    paper=PAPER,
    model=ModelConfig(vocab_size=112, embed_dim=96, num_layers=3, num_heads=4),
    tokenizer=tokenizer,
    base_records=base_records,
    seq_len=128,
    tuning_seq_len=80,
    max_new_tokens=72,
    play_training=True,
)


def command() -> None:
    run_command(main, PointsPrompts)


if __name__ == "__main__":
    command()

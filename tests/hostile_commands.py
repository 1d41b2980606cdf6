"""Hostile values of every option of every command, one option at a time.

Commands and their options are found by the tables that the command line itself reads.
"""

import dataclasses
import importlib
import itertools
import types
import typing
from collections.abc import Iterator
from typing import Any

import tyro
from hostile_base import PRETRAIN, RL, SFT
from hostile_runs import Case, words_of

from train.audit.__main__ import COMMANDS as AUDITS
from train.benchmark import COMMANDS as BENCHMARKS
from train.cli.main import COMMANDS, EXPERIMENTS

INTEGERS = ["-1", "0", str(2**63), str(10**19), "1e308", "nan", "1.5", "x", "", str(10**12), "1_0"]
FLOATS = ["nan", "inf", "-inf", "-1", "0", "1e308", "1e-400", "x", "", str(2**70), "0x10", "1e999"]
IMPOSSIBLE = {int: ["-1", "nan", str(10**19), "x"], float: ["-1", "nan", "inf", "x"]}
"""Values where a legal one works for minutes."""
TEXTS = [
    "", "nope", "{base}/nope", "{base}/texts", "/dev/null", "{base}/chats.jsonl", "\x01\x02",
    "{base}/texts/0.txt/x", "{base}/model.gguf", "x" * 100_000, "nope(x=1)", "--", "{base}/run",
    "{base}/bpe.json", "{base}/rows.parquet", "{base}/smollm3", "{base}/organism",
    "{base}/probe.jsonl", "{base}/pipe", "\udcff", "{base}/sae", "{base}/adapter",
]  # fmt: skip
WRITTEN = ["", "{base}/texts/0.txt/x", "/dev/full", "{here}", "x" * 300, "{base}/pipe/x"]
ONE_WORD = ("method", "policy")  # objects that an option writes as `name(...)`
WRITES = words_of("out to json figure page records save cache_dir battery")  # names of options


@dataclasses.dataclass(frozen=True)
class Base:
    """A command line to which a hostile option is added.

    Attributes:
        words: Words behind the command's name; a positional option is the first of them.
        config: Config whose options there are; that of the command's `main` by default.
        numbers: Number of senseless values of each numeric option.
        texts: Number of those of each other option.
        out: File or folder that must be absent after a refusal.
        runs: Whether the line as it stands runs in seconds; else numbers are impossible ones.
    """

    words: tuple[str, ...] = ()
    config: Any = None
    numbers: int = 3
    texts: int = 3
    out: str = ""
    runs: bool = True


GENERATE = words_of("generate --checkpoint {base}/run --max-new-tokens 1 --prompt ab")
EVALUATE = words_of("""evaluate --checkpoint {base}/run --rows 2 --positions 4 --batch-size 2""")
SAMPLED = words_of(
    """--weights {base}/plain --task copy(length=2) --samples 2 --pool 2 --batch-size 2
    --max-new-tokens 2"""
)


def bases() -> dict[str, Base]:
    """The command line of each command, by its name."""
    from train.aot.config import presets
    from train.finetuning.job import SFTConfig
    from train.pretraining.presets import PRESETS
    from train.rl.config import RLConfig

    dry = ("--out", "{here}/out", "--dry-run")
    audited = words_of("--checkpoint {base}/run --corpus {base}/texts --seq-len 16 --held-out 2")
    named = {
        "pretrain": Base((*PRETRAIN[1:], *dry), PRESETS["tiny"], 1, 1),
        "sft": Base((*SFT[1:], *dry), SFTConfig(), 1, 1),
        "rl": Base((*RL[1:], *dry), RLConfig(), 1, 1),
        "play": Base(words_of("hanoi --player scripted")),
        "probe": Base((*SAMPLED, "--out", "{here}/out.jsonl"), out="out.jsonl"),
        "rejection": Base(
            words_of(
                """--plugin easy_task --weights {base}/plain --task easy --samples 8 --pool 4
                --batch-size 2 --max-new-tokens 64 --out {here}/out.jsonl"""
            ),
            out="out.jsonl",
        ),
        "demonstrations": Base(
            words_of("sokoban_variants --count 2 --out {here}/out.jsonl --battery-count 1"),
            out="out.jsonl",
        ),
        "battery": Base(
            words_of(
                """--checkpoint {base}/plain --battery.task general_points --battery.episodes 1
                --battery.max-turns 1 --battery.max-new-tokens 1 --battery.variants all_5"""
            )
        ),
        "generate": Base(GENERATE[1:]),
        "evaluate": Base(EVALUATE[1:]),
        "audit lens": Base(words_of("--checkpoint {base}/run --text ab")),
        "audit tuned-lens": Base(
            (*audited, *words_of("--steps 1 --batch-size 2 --out {here}/out")), out="out"
        ),
        "audit sae": Base(
            (*audited, *words_of(
                """--tokens 32 --batch-size 16 --rows 2 --buffer 32 --features 16 --k 2 --out
                {here}/out"""
            )), out="out",
        ),
        "audit organism": Base(
            words_of("taboo --hints 2 --denials 2 --ordinary 2 --out {here}/out"), out="out"
        ),
        "audit secret": Base(
            words_of(
                """taboo --weights {base}/smollm3 --steps 1 --methods io --max-new-tokens 1 --out
                {here}/out"""
            ),
            out="out",
        ),
        "audit report": Base(
            words_of(
                """{base}/organism --model {base}/smollm3 --control {base}/smollm3 --methods io
                --max-new-tokens 1 --out {here}/out.jsonl"""
            ),
            out="out.jsonl",
        ),
        "export": Base(words_of("{base}/tuned --to {here}/out"), out="out"),
        "harness": Base(),
        "compile": Base(
            ("tiny", "--model.fork-layers", "1", *words_of(
                """--model.embed-dim 8 --model.num-layers 2 --model.num-heads 2 --data.seq-len 16
                --batch-size 4 --topology v5e:2x2 --no-advise"""
            )), presets()["tiny"], 1, 1, runs=False,
        ),
        "tokenizer": Base(words_of("--corpus {base}/texts --out {here}/new.json"), out="new.json"),
        "mixture": Base(("--sources", "{base}/texts")),
        "grow": Base(
            words_of("--checkpoint {base}/hatchling --out {here}/out --num-neurons 32"), out="out"
        ),
        "merge": Base(
            words_of("--checkpoints {base}/hatchling {base}/grown --out {here}/out"), out="out"
        ),
        "runs": Base(("{base}/run",)),
    }  # fmt: skip
    named |= {f"benchmark {name}": Base(numbers=1, texts=1, runs=False) for name in BENCHMARKS}
    return named | {
        f"experiment {name}": Base(numbers=1, texts=2, runs=False) for name in EXPERIMENTS
    }


def command_names() -> list[str]:
    """Every command of the command line, those of two words as two."""
    inside = {"audit": AUDITS, "benchmark": BENCHMARKS, "experiment": EXPERIMENTS}
    return [f"{name} {below}".rstrip() for name in COMMANDS for below in inside.get(name, [""])]


def config_of(name: str) -> Any:
    """Class of a command's config: what its `main` takes, or nothing."""
    first, _, below = name.partition(" ")
    if first == "benchmark":
        return BENCHMARKS[below][1]
    module = {
        "audit": lambda: AUDITS[below].module,
        "experiment": lambda: f"train.experiments.{below}",
    }.get(first, lambda: COMMANDS[first][0])()
    hints = typing.get_type_hints(importlib.import_module(module).main)
    return next((kind for argument, kind in hints.items() if argument != "return"), None)


def options(config: Any, above: str = "") -> Iterator[tuple[str, type, bool]]:
    """Options of a config or its class: dotted name, kind and whether it is positional.

    The kind is int, float, bool, or str for all that is written as text.
    """
    of = config if isinstance(config, type) else type(config)
    hints = typing.get_type_hints(of, include_extras=True)
    for field in dataclasses.fields(of):
        hint, positional = hints[field.name], False
        if typing.get_origin(hint) is typing.Annotated:
            positional = tyro.conf.Positional in hint.__metadata__
            hint = hint.__origin__
        value = getattr(config, field.name, None)
        if dataclasses.is_dataclass(value) and field.name not in ONE_WORD:
            yield from options(value, f"{above}{field.name}.")
            continue
        inside = set(_parts(hint))
        found = next((kind for kind in (float, int, bool) if kind in inside), str)
        yield above + field.name, found, positional


def _parts(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple):
        for part in typing.get_args(hint):
            yield from _parts(part)
    else:
        yield hint


def numeric(config: Any) -> Iterator[tuple[str, type]]:
    """Numeric options of a config or its class by their dotted names, those inside included."""
    return ((name, kind) for name, kind, _ in options(config) if kind in (int, float))


def with_option(words: tuple[str, ...], option: str, value: str) -> tuple[str, ...]:
    """The words with an option's value in place of the one that they give, or behind them."""
    if option in words:
        at = words.index(option)
        return (*words[: at + 1], value, *words[at + 2 :])
    return (*words, f"{option}={value}")


def of_commands() -> Iterator[Case]:
    """Every option of every command, each with the next of the senseless values of its kind."""
    for name, base in bases().items():
        if name == "harness":  # its options are those of lm_eval
            continue
        start = (*name.split(), *base.words)
        if base.runs and "--dry-run" not in base.words:
            yield Case(f"{name} as it is meant", start, legal=True)
        numbers = {
            int: itertools.cycle(INTEGERS if base.runs else IMPOSSIBLE[int]),
            float: itertools.cycle(FLOATS if base.runs else IMPOSSIBLE[float]),
        }
        texts, written = itertools.cycle(TEXTS), itertools.cycle(WRITTEN)
        config = config_of(name) if base.config is None else base.config
        for option, kind, positional in options(config):
            last = option.rpartition(".")[2]
            if kind is bool:
                values = iter(["maybe"])
            elif kind is str:
                values = itertools.islice(written if last in WRITES else texts, base.texts)
            else:
                values = itertools.islice(numbers[kind], base.numbers)
            flag = f"--{option.replace('_', '-')}"
            for value in values:
                if (option, value) == ("mesh.data", "-1"):  # the one of them that is legal
                    value = "0"
                if option == "prompt":  # a longer one is legal, and read for minutes
                    value = value[:20_000]
                if positional:
                    at = len(name.split())
                    words = (*start[:at], value, *start[at + 1 :])
                else:
                    words = with_option(start, flag, value)
                yield Case(
                    f"{name} {flag} {value[:40]!r}", words, None, "" if last in WRITES else base.out
                )

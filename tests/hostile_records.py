"""Hostile cases of what our own commands wrote: runs, audits, probes, adapters, results."""

import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile_base import PRETRAIN, RL
from hostile_commands import EVALUATE, SAMPLED, with_option
from hostile_inputs import DEEP, WRONG, Make, json_field, shortened, whole_file
from hostile_runs import Case, words_of

from train.cli.main import EXPERIMENTS
from train.runs import checksums

NO_REPORT = ("random_bits", "environments")  # experiments that keep no results


def run_copy(change: Callable[[Path], object], of: str = "run") -> Make:
    def make(here: Path, base: Path) -> None:
        shutil.copytree(base / of, here / "run")
        change(here / "run")

    return make


def of_runs() -> Iterator[Case]:
    """Our own metadata and checkpoints, edited, of another version, or cut."""
    rng = random.Random(5)
    generate = words_of("generate --checkpoint {here}/run --max-new-tokens 1 --prompt ab")
    resume = (*with_option(PRETRAIN, "--steps", "2"), "--out", "{here}/run", "--dry-run")
    export = ("export", "{here}/run", "--to", "{here}/out")
    evaluate = with_option(EVALUATE, "--checkpoint", "{here}/run")
    verbs = [("export", export), ("resume", resume), ("generate", generate), ("eval", evaluate)]

    def edit(path: tuple[str, ...], value: Any) -> Callable[[Path], None]:
        def change(run: Path) -> None:
            file = run / "1/meta/metadata"
            meta = json.loads(file.read_text())
            inside = meta
            for part in path[:-1]:
                inside = inside[part]
            inside[path[-1]] = value
            file.write_text(json.dumps(meta))
            checksums.write(run / "1")  # as a newer version would, or one who edits with care

        return change

    places = """meta meta.config meta.config.model meta.config.model.embed_dim
    meta.config.model.policy meta.config.model.architecture meta.config.model.fork_layers
    meta.config.data meta.config.data.corpus meta.config.data.tokenizer meta.config.data.seq_len
    meta.config.plugin meta.config.optimizer meta.config.optimizer.b1 meta.resolved
    meta.data_fingerprint meta.tokenizer meta.step meta.python format leaves leaves.params
    meta.config.new_option meta.config.model.new_option meta.new_field"""
    for index, place in enumerate(places.split()):
        for turn in range(2):
            verb, words = verbs[(index + turn) % 4]
            value = WRONG[rng.randrange(len(WRONG))]
            name = f"meta {verb} {place} {shortened(value)}"
            make = run_copy(edit(tuple(place.split(".")), value))
            yield Case(name, words, make, "out" if verb == "export" else "")
    contents = [b"", b"{}", b"[]", b"\xff", DEEP.encode(), b'{"format": 99}']
    for index, file in enumerate(
        ["1/meta/metadata", "config.json", "metrics.jsonl", "1/checksums", "1/params/_METADATA",
         "1/_CHECKPOINT_METADATA", "1/params/manifest.ocdbt"]
    ):  # fmt: skip
        for turn, content in enumerate(contents):
            verb, words = verbs[(index + turn) % 4]
            if file in ("metrics.jsonl", "config.json") and turn % 2:
                verb, words = "runs", ("runs", "{here}/run")
            make = run_copy(lambda run, f=file, c=content: (run / f).write_bytes(c))
            yield Case(
                f"{file} {verb} {content[:9]}", words, make, "out" if verb == "export" else ""
            )
    for index, part in enumerate(
        ["1", "1/params", "1/train", "1/meta", "1/params/d", "config.json"]
    ):
        verb, words = verbs[index % 2]

        def remove(run: Path, part: str = part) -> None:
            shutil.rmtree(run / part) if (run / part).is_dir() else (run / part).unlink()

        out = "out" if verb == "export" else ""
        yield Case(f"without {part} {verb}", words, run_copy(remove), out)


def of_records() -> Iterator[Case]:
    """What our other commands wrote: audits, probes, adapters, tokenizers, results."""
    report = words_of(
        """audit report {here}/model --model {base}/smollm3 --control {base}/smollm3 --methods io
        --max-new-tokens 1 --out {here}/out.jsonl"""
    )
    adapted = words_of(
        """generate --model {base}/exported --adapter {here}/model --max-new-tokens 1 --prompt a"""
    )
    fields = {
        ("organism", "organism.json", report): """name candidates trials trials.0 trials.0.messages
        trials.0.messages.0 trials.0.messages.0.role trials.0.secret trials.0.direct prefill reply
        persona shots read_at unknown""",
        ("adapter", "adapter_config.json", adapted): """peft_type r lora_alpha target_modules
        lora_dropout base_model_name_or_path rank_pattern bias task_type modules_to_save""",
    }
    values = itertools.cycle(WRONG)
    for (of, file, words), names in fields.items():
        for name in names.split():
            for value in itertools.islice(values, 3):
                make = json_field(of, file, name, value)
                yield Case(f"{of} {name} {shortened(value)}", words, make)
        for content in (b"", b"{", DEEP.encode(), b"[]", b"null", b"\xff", None):
            make = whole_file(of, file, content)
            yield Case(f"{of} {file} is {content and content[:9]}", words, make)
    lines = {
        "probe": '{"probe": {"task": "copy"}}\n{"problem": "a", "solved": 1, "samples": 2}',
        "empty": "", "half": '{"probe": ', "no object": "[1]\n2", "deep": DEEP, "null": "null",
        "wrong": '{"probe": 3}\n{"problem": [], "solved": "x", "samples": null}',
        "nan": '{"probe": {"task": NaN}}\n{"problem": 1, "solved": NaN, "samples": -1}',
        "result": '{"seed": 0, "arm": "x", "variant": "y", "steps": 1, "loss": "z"}',
        "result of one": '{"seed": 0}', "result of none": '{"arm": null, "seed": {}, "task": []}',
    }  # fmt: skip
    probed = ("rejection", *SAMPLED, "--probe", "{here}/x.jsonl", "--out", "{here}/out.jsonl")
    again = ("probe", *SAMPLED, "--out", "{here}/x.jsonl")
    truth = (*RL, "--out", "{here}/out", "--dry-run")
    reward = with_option(truth, "--reward", "ternary(knowledge=True, probe='{here}/x.jsonl')")
    for name, text in lines.items():
        make = lambda here, base, t=text: (here / "x.jsonl").write_text(t)  # noqa: E731
        yield Case(f"rejection probe {name}", probed, make)
        yield Case(f"probe continues {name}", again, make)
        yield Case(f"reward probe {name}", reward, make)
        tasks = with_option(EVALUATE, "--tasks", "{here}/x.jsonl")
        yield Case(f"task file {name}", tasks, make)
        queue = (
            "benchmark",
            "accelerator",
            "--tiny",
            "--then",
            "{here}/x.jsonl",
            "--parts",
            "then",
        )
        yield Case(f"queue {name}", (*queue, "--out", "{here}/acc"), make)
        for experiment in EXPERIMENTS:
            if name.startswith(("result", "null", "deep")) and experiment not in NO_REPORT:
                words = ("experiment", experiment, "--report", "{here}/x.jsonl")
                yield Case(f"{experiment} report {name}", words, make)
    for name in ("kernels", "step"):
        for value in ([], {}, "x", None, {"measurements": 3}, {"measurements": [1]}):

            def table(here: Path, base: Path, n: str = name, v: Any = value) -> None:
                del base
                (here / "acc").mkdir()
                (here / "acc" / f"{n}.json").write_text(json.dumps(v))

            words = ("benchmark", "accelerator", "--table", "--out", "{here}/acc")
            yield Case(f"accelerator table {name} {value}", words, table)

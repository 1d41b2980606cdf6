"""Demonstrations of an environment's expert as chat data, a conversation of two messages each."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from train.data.verbalise import Form, verbalise
from train.rl.environments.instructed import Demonstration, InstructedEnvironment
from train.rl.types import Split
from train.runs.files import check_new_file, write_atomically


def demonstration_record(
    demonstration: Demonstration, form: Form, variant: str, epoch: int
) -> dict[str, Any]:
    """A record of chat data (`prompt`, `completion`), with what it was rendered from.

    Args:
        demonstration: State and what the expert does there.
        form: Parts of the completion (`verbalise`).
        variant: Variant of the environment.
        epoch: Number of passes before this one.
    """
    prompt = demonstration.prompt
    return {
        "prompt": prompt.text,
        "completion": verbalise(demonstration.trace, form),
        "template": prompt.template,
        "paraphrase": prompt.paraphrase,
        "variant": variant,
        "map": prompt.shown.name,
        "names": dict(prompt.shown.names),
        "problem": demonstration.problem,
        "epoch": epoch,
    }


def demonstration_records(
    environment: InstructedEnvironment, split: Split, count: int, epochs: int, form: Form
) -> Iterator[dict[str, Any]]:
    """Records of `count` states in each epoch, with other maps where drawn.

    Boards of Sokoban are the same in each; cards are dealt for the map of the epoch.
    """
    for epoch in range(epochs):
        for each in environment.demonstrations(split, count, epoch):
            yield demonstration_record(each, form, environment.variant, epoch)


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> int:
    """Write records as JSON Lines, whole or not at all; returns how many.

    Args:
        path: File that does not exist yet; its folder is made.
        records: Records in order.

    Raises:
        ValueError: There is such a file.
    """
    check_new_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    write_atomically(path, "".join(f"{line}\n" for line in lines))
    return len(lines)


def check_apart(out: Path, folder: Path, variants: Iterable[str]) -> None:
    """Check that a training file and the files of variants do not write over each other.

    Args:
        out: Training file.
        folder: Folder of the files of variants.
        variants: Names of the variants.

    Raises:
        ValueError: The training file is one of the others, or the folder or one above it.
    """
    here, others = out.resolve(), folder.resolve()
    files = {others / f"{name}.jsonl" for name in variants}
    if here in files or here == others or here in others.parents:
        raise ValueError(
            f"out={out} is in the way of battery={folder}: choose a training file apart from it"
        )

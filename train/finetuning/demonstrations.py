"""Write demonstrations of an environment's expert as chat data, one prompt and completion each."""

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
    """Convert a demonstration to a record of chat data.

    Args:
        demonstration: State with its prompt, and the expert's thoughts and answer.
        form: Content of the completion: "answer", "thoughts" or "both" (see `verbalise`).
        variant: Variant of the environment.
        epoch: Index of the epoch, from 0.

    Returns:
        Dict with `prompt` and `completion`, and the origin of the prompt: `template`, `paraphrase`,
        `variant`, `map` (name of the semantic map that the prompt shows), `names` (mapping from
        concept to name in that map), `problem` and `epoch`.
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
    """Yield chat records of an expert's demonstrations, for `count` states in each epoch.

    Variants that sample their maps of names sample new maps in each epoch, unless the environment
    has `resample=False`. Boards of Sokoban are the same in each epoch; cards are dealt anew for the
    epoch's map.

    Args:
        environment: Environment in one variant.
        split: Split of the problems.
        count: Number of states in each epoch.
        epochs: Number of epochs.
        form: Content of the completions: "answer", "thoughts" or "both" (see `verbalise`).
    """
    for epoch in range(epochs):
        for each in environment.demonstrations(split, count, epoch):
            yield demonstration_record(each, form, environment.variant, epoch)


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> int:
    """Write records as a JSON Lines file; if writing fails, no file is left.

    Args:
        path: File that does not exist yet; its folder is made.
        records: Records in order.

    Returns:
        Number of records.

    Raises:
        ValueError: The file exists, or can't be made.
    """
    check_new_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    write_atomically(path, "".join(f"{line}\n" for line in lines))
    return len(lines)


def check_apart(out: Path, folder: Path, variants: Iterable[str]) -> None:
    """Check that a training file does not collide with the files of the battery's variants.

    Args:
        out: Training file.
        folder: Folder of the battery, for a file VARIANT.jsonl of each variant.
        variants: Names of the variants.

    Raises:
        ValueError: The path of the training file equals the path of a variant's file, of the
            folder, or of a parent of the folder.
    """
    here, others = out.resolve(), folder.resolve()
    files = {others / f"{name}.jsonl" for name in variants}
    if here in files or here == others or here in others.parents:
        raise ValueError(
            f"out={out} is in the way of battery={folder}: choose a training file apart from it"
        )

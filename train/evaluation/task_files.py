"""Read task files: JSONL records of public benchmarks, turned into contexts and continuations.

Contexts and continuations are the same as in EleutherAI's evaluation harness.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from train.data.json_lines import read_json_lines

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Item:
    """A context and the texts that may follow it.

    Attributes:
        context: Text before the choices, which is not scored; may be empty.
        choices: Texts to choose from; in a cloze, the single text that is to be predicted.
        gold: Index of the right choice.
        line: Line of the item in its file, from 1.
    """

    context: str
    choices: tuple[str, ...]
    gold: int
    line: int = 0

    @property
    def continuations(self) -> list[str]:
        """The choices as continuations of the context, each with a space in front."""
        return [f" {choice}" for choice in self.choices]


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of the records in task files, such as the format of one benchmark.

    Attributes:
        name: Name of the format.
        fields: Fields by which the format is recognised. Each entry is a tuple of alternative
            names; a record must have at least one of these names.
        read: Function from a record to its context, its choices and the index of the right choice;
            it raises a `ValueError` for a record with a mistake.
    """

    name: str
    fields: tuple[tuple[str, ...], ...]
    read: Callable[[Record], tuple[str, list[str], int]]

    def missing(self, record: Record) -> list[str]:
        """Return the fields that a record lacks, alternatives joined by "or"."""
        absent = [names for names in self.fields if not any(name in record for name in names)]
        return [" or ".join(names) for names in absent]


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark task: the items of one task file.

    Attributes:
        name: Name of the task in reports.
        path: Path of the file.
        format: Name of the format of the file's records.
        items: Items in the order of the file.
    """

    name: str
    path: Path
    format: str
    items: tuple[Item, ...]

    @property
    def cloze(self) -> bool:
        """Whether each item has a single text that is to be predicted, instead of choices."""
        return self.format == "lambada"


def read_task(spec: str, limit: int | None = None) -> Task:
    """Read a task file; the format of the first record is taken for all records.

    Args:
        spec: Path of the file, or `name=path.jsonl`; without a name the task is named after the
            file.
        limit: Number of records that are read from the beginning of the file; None reads all.

    Raises:
        ValueError: The file can't be read or has no records; or a record is not a JSON object, does
            not match a known format, lacks a field, or has a wrong value. The message names the
            file, and the line of the record.
    """
    name, given, file = spec.partition("=")
    path = Path(file if given else spec).expanduser()
    kind, items = None, []
    for where, number, record in itertools.islice(read_json_lines(path), limit):
        kind = kind or _recognise(record, where)
        items.append(_item(kind, record, number, where))
    if kind is None:
        raise ValueError(f"{path} has no records: pass a .jsonl file with one on each line")
    return Task(name if given else path.stem, path, kind.name, tuple(items))


def _recognise(record: Record, where: str) -> Format:
    for kind in FORMATS:
        if not kind.missing(record):
            return kind
    known = "; ".join(
        f"{kind.name} has {', '.join('/'.join(names) for names in kind.fields)}" for kind in FORMATS
    )
    raise ValueError(f"{where}: fields {', '.join(record)} are of no known format: {known}")


def _item(kind: Format, record: Record, number: int, where: str) -> Item:
    if missing := kind.missing(record):
        raise ValueError(f"{where}: no field {missing[0]}, which {kind.name} records have")
    try:
        context, choices, gold = kind.read(record)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    for index, choice in enumerate(choices):
        if not choice.strip():
            raise ValueError(f"{where}: choice {index} is empty")
    return Item(context, tuple(choices), gold, number)


def _text(record: Record, *names: str) -> str:
    """Return the text of the first field among `names` that the record has."""
    name = next(name for name in names if name in record)
    if not isinstance(record[name], str):
        raise ValueError(f"{name} is {record[name]!r}, not a text")
    return record[name]


def _texts(record: Record, name: str) -> list[str]:
    found = record[name]
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{name} is {str(found)[:40]}, not a list of texts")
    if not found:
        raise ValueError(f"{name} is empty: there is nothing to choose from")
    return found


def _gold(record: Record, names: tuple[str, ...], choices: list[str]) -> int:
    """Return the index of the right choice.

    Records give it as a number, as a number in a string ("2"), or as the text of the choice.
    """
    name = next(name for name in names if name in record)
    gold = record[name]
    word = choices.index(gold) if isinstance(gold, str) and gold in choices else None
    if isinstance(gold, str) and gold.isascii() and gold.isdigit():
        gold = int(gold)
        if word is not None and gold < len(choices) and gold != word:
            raise ValueError(
                f"{name} is {record[name]!r}, an index and another choice word for word: write "
                f"the number {gold} or {word}"
            )
    if word is not None:
        return word
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise ValueError(
            f"{name} is {gold!r}, not one of the {len(choices)} choices: an index from 0 to "
            f"{len(choices) - 1}, or a choice word for word"
        )
    return gold


def _read_blimp(record: Record) -> tuple[str, list[str], int]:
    return "", [_text(record, "sentence_good"), _text(record, "sentence_bad")], 0


def _read_hellaswag(record: Record) -> tuple[str, list[str], int]:
    if "ctx_a" in record and "ctx_b" in record:
        scene = f"{_text(record, 'ctx_a')} {_text(record, 'ctx_b').capitalize()}"
    else:
        scene = _text(record, "ctx", "ctx_a")
    endings = [_without_markup(text) for text in _texts(record, "endings")]
    context = _without_markup(f"{_text(record, 'activity_label')}: {scene}")
    return context, endings, _gold(record, ("label",), endings)


def _without_markup(text: str) -> str:
    """Remove the marks in brackets, such as `[title]`, from texts of HellaSwag's WikiHow part."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _read_piqa(record: Record) -> tuple[str, list[str], int]:
    solutions = [_text(record, "sol1"), _text(record, "sol2")]
    gold = _gold(record, ("label",), solutions)
    return f"Question: {_text(record, 'goal')}\nAnswer:", solutions, gold


def _read_lambada(record: Record) -> tuple[str, list[str], int]:
    context, space, word = _text(record, "text").rpartition(" ")
    if word.split() != [word]:
        raise ValueError(f"text ends in {word[:40]!r}: its last word is to be predicted")
    if not space or not context.strip():
        raise ValueError("text has one word: the last is to be predicted from those before it")
    return context, [word], 0


CONTEXTS, GOLDS = ("query", "context", "question"), ("gold", "label", "answer")


def _read_choices(record: Record) -> tuple[str, list[str], int]:
    choices = _texts(record, "choices")
    return _text(record, *CONTEXTS), choices, _gold(record, GOLDS, choices)


# The format of a record is the first format in this order whose fields the record has.
FORMATS = (
    Format(
        "hellaswag",
        (("ctx", "ctx_a"), ("activity_label",), ("endings",), ("label",)),
        _read_hellaswag,
    ),
    Format("piqa", (("goal",), ("sol1",), ("sol2",), ("label",)), _read_piqa),
    Format("blimp", (("sentence_good",), ("sentence_bad",)), _read_blimp),
    Format("choices", (CONTEXTS, ("choices",), GOLDS), _read_choices),
    Format("lambada", (("text",),), _read_lambada),
)

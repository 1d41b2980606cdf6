"""Task files: what a model is asked, and one line for what is wrong in a file."""

import json
from pathlib import Path

import pytest

from train.evaluation.task_files import Item, read_task

HELLASWAG = {
    "activity_label": "Making tea",
    "ctx_a": "[header] How to make tea [title] Boil water [step] Take a  pot.",
    "ctx_b": "a Cup",
    "endings": [" fills [substeps] up.", "flies.", "sings.", "é."],
    "label": "3",
}
TEA = "Making tea: How to make tea. Boil water Take a pot. A cup"
PIQA = {"goal": "Open a door", "sol1": "turn the knob", "sol2": "eat it", "label": 0}
CHOICES = {"query": "One and one", "choices": ["two", "10"], "gold": 1}


def write(folder: Path, *records: object) -> Path:
    path = folder / "items.jsonl"
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("record", "kind", "item"),
    [
        (HELLASWAG, "hellaswag", Item(TEA, ("fills up.", "flies.", "sings.", "é."), 3)),
        (
            {"ctx": "He sat", "activity_label": "Sitting", "endings": ["a", "b"], "label": 1},
            "hellaswag",
            Item("Sitting: He sat", ("a", "b"), 1),
        ),
        (PIQA, "piqa", Item("Question: Open a door\nAnswer:", ("turn the knob", "eat it"), 0)),
        (
            {"sentence_good": "It is.", "sentence_bad": "It are.", "UID": "agreement"},
            "blimp",
            Item("", ("It is.", "It are."), 0),
        ),
        ({"text": "to be or not to be"}, "lambada", Item("to be or not to", ("be",), 0)),
        (CHOICES, "choices", Item("One and one", ("two", "10"), 1)),
        (
            {"question": "a", "choices": ["b", "c"], "answer": "c"},
            "choices",
            Item("a", ("b", "c"), 1),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_records_are_known_by_their_fields(record, kind, item, tmp_path):
    task = read_task(f"mine={write(tmp_path, record)}")
    [found] = task.items
    assert (task.name, task.format, task.cloze) == ("mine", kind, kind == "lambada")
    assert (found.context, found.choices, found.gold) == (item.context, item.choices, item.gold)
    assert found.continuations == [f" {choice}" for choice in item.choices]


def test_limit_blank_lines_and_names(tmp_path):
    path = write(tmp_path, PIQA, "", PIQA, "{")
    task = read_task(str(path), limit=2)
    assert (task.name, [item.line for item in task.items]) == ("items", [1, 3])


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([CHOICES, '{"query": '], "line 2: not JSON"),
        ([CHOICES, "3"], "line 2: a JSON int, not an object: 3"),
        ([{"what": 1}], "line 1: fields what are of no known format: hellaswag has ctx/ctx_a"),
        ([PIQA, {**PIQA, "sol2": None}], "line 2: sol2 is None, not a text"),
        ([PIQA, {"goal": "", "sol1": "", "label": 0}], "line 2: no field sol2, which piqa records"),
        ([CHOICES, {"query": "", "choices": ["a"]}], "line 2: no field gold or label or answer"),
        ([{**CHOICES, "gold": 2}], "line 1: gold is 2, not one of the 2 choices: an index from 0"),
        ([{**CHOICES, "gold": -1}], "line 1: gold is -1, not one"),
        ([{**CHOICES, "gold": True}], "line 1: gold is True, not one"),
        ([{**HELLASWAG, "label": ""}], "line 1: label is '', not one of the 4 choices"),
        ([{**CHOICES, "choices": []}], "line 1: choices is empty"),
        ([{**CHOICES, "choices": ["1", "0"], "gold": "0"}], "gold is '0', an index and another"),
        ([{**CHOICES, "choices": "ab"}], "line 1: choices is ab, not a list of texts"),
        ([{**CHOICES, "choices": ["a", " "]}], "line 1: choice 1 is empty"),
        ([{"text": "word"}], "line 1: text has one word"),
        ([], "has no records"),
    ],
)
def test_a_bad_record_is_one_line_with_its_place(records, message, tmp_path):
    path = write(tmp_path, *records)
    with pytest.raises(ValueError, match=message) as caught:
        read_task(str(path))
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_no_text_at_all(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_bytes(b"\xfe")
    with pytest.raises(ValueError, match="items.jsonl is not UTF-8 text"):
        read_task(str(path))

"""JSON Lines: what is read, and one line of error that names file, line and field."""

import gzip
import json

import pytest

from train.data import DataError
from train.data.json_lines import read_json_lines

TEXTS = ("question", "answer")
ROW = {"question": "half a line\u2028or one?", "answer": "one"}


@pytest.mark.parametrize("name", ["plain.jsonl", "packed.jsonl.gz"])
def test_objects_with_their_line_numbers(name, tmp_path):
    content = f"\ufeff{json.dumps(ROW, ensure_ascii=False)}\r\n\n \n{json.dumps({'n': 2})}".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    found = list(read_json_lines(tmp_path / name))
    assert [(line.number, line.fields) for line in found] == [(1, ROW), (4, {"n": 2})]
    assert found[1].where == f"{tmp_path / name}, line 4"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question": "a", "answer": "b"}\n{', ", line 2: not JSON .*: repair or delete it"),
        (b"[" * 100_000, ", line 1: not JSON"),
        (b'"text"', ', line 1: a JSON str, not an object: "text"'),
        (b'{"answer": "b"}', ', line 1: the field "question" is missing: give a string'),
        (b'{"question": "a", "answer": 3}', ', line 1: the field "answer" is 3: give a string'),
        (
            b'{}\n{"a": "\xe9"}',
            r"is not UTF-8 text \(line 2: byte 0xe9, inv",
        ),
        (None, "cannot read .*No such file.*; repair it or leave it out"),
    ],
)
def test_mistakes_are_one_line(content, message, tmp_path):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        list(read_json_lines(path, TEXTS))
    assert "\n" not in str(error.value) and "a.jsonl" in str(error.value)


def test_an_array_of_objects(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(f"\n[{json.dumps(ROW)},\n {{}}]")
    assert [line.fields for line in read_json_lines(path)] == [ROW, {}]
    with pytest.raises(DataError, match='item 2: the field "question" is missing'):
        list(read_json_lines(path, TEXTS))
    path.with_suffix(".jsonl").write_text("[{}]")
    with pytest.raises(DataError, match="a JSON list, not an object: .*belongs in a .json file"):
        list(read_json_lines(path.with_suffix(".jsonl")))


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ROW).encode() * 50)[:-9])
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl\.gz: "):
        list(read_json_lines(path))

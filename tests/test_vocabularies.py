"""Vocabularies that do not have the size of the embedding, and what ends a text."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf_model import FIXTURES, write_gguf

from thoughtbubbles.pretrained import open_pretrained
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from train.data import DataConfig
from train.models.load import tokenizer_meta, tokenizer_of
from train.pretraining.config import InitConfig
from train.pretraining.job import PretrainJob, on_weights
from train.pretraining.presets import PRESETS

ROWS, TOKENS = 64, 47  # of the fixture's embedding and tokenizer
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz0123456789."]
WORDS += ["Ġ", "th", "the", "Ġthe"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "llama", tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    fields = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(fields | changes))


def tokenizer(path: Path) -> PretrainedTokenizer:
    return open_pretrained(path)[2]


def add_tokens(folder: Path, special: bool) -> None:
    """As many as the embedding has rows, and `<pad>`."""
    file = folder / "tokenizer.json"
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = json.loads(file.read_text())["added_tokens"]
    contents = {id_: f"<x{id_}>" for id_ in range(TOKENS, ROWS)} | {ROWS: "<pad>"}
    added += [{"id": i, "content": t, "special": special, **flags} for i, t in contents.items()]
    edit(file, added_tokens=added)


@pytest.mark.parametrize("special", [True, False])
def test_tokens_added_above_the_embedding_load_and_are_never_used(folder: Path, special: bool):
    before = tokenizer(folder)
    add_tokens(folder, special)
    edit(folder / "generation_config.json", eos_token_id=[ROWS, 3])
    with pytest.warns(UserWarning, match=r"above the 64 rows .* passed over: '<pad>' \(id 64\)$"):
        found = tokenizer(folder)
    assert (before.vocab_size, found.vocab_size) == (TOKENS, ROWS)
    assert ROWS not in found.stop_ids and found.stop_ids
    assert (found.encode("the end")[0] == before.encode("the end")[0]).all()
    line = r"token '<pad>' has id 64, the embedding 64 rows: the model can't read it"
    with pytest.raises(ValueError, match=line):
        found.rendered("a <pad>")
    if not special:
        with pytest.raises(ValueError, match=line):
            found.encode("a <pad>")
    again = tokenizer_of(tokenizer_meta(found) | {"tokenizer": found.to_json()})
    assert isinstance(again, PretrainedTokenizer) and again.vocab_size == ROWS
    assert again.stop_ids == found.stop_ids


@pytest.mark.parametrize("wrapped", [True, False])
def test_special_tokens_above_the_embedding_stand_for_nothing(folder: Path, wrapped: bool):
    """Neither as bos, nor as end of a text, nor as separator, nor around a text."""
    add_tokens(folder, special=True)
    file = folder / "tokenizer.json"
    fields = json.loads(file.read_text())
    around = {"<pad>": {"id": "<pad>", "ids": [ROWS], "tokens": ["<pad>"]}}
    pieces = [
        {"SpecialToken": {"id": "<pad>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    template = {"type": "TemplateProcessing", "single": pieces, "pair": pieces}
    edit(file, post_processor=template | {"special_tokens": around} if wrapped else None)
    for added in fields["added_tokens"]:
        if added["content"] == "<|endoftext|>":
            added["content"] = "<old>"
    fields["added_tokens"].append(
        fields["added_tokens"][-1] | {"id": 65, "content": "<|endoftext|>"}
    )
    vocabulary = fields["model"]["vocab"]
    if "<|endoftext|>" in vocabulary:
        vocabulary["<old>"] = vocabulary.pop("<|endoftext|>")
    edit(file, added_tokens=fields["added_tokens"], model=fields["model"])
    edit(folder / "tokenizer_config.json", bos_token="<pad>", eos_token="<pad>")
    edit(folder / "generation_config.json", eos_token_id=[ROWS, 3])
    edit(folder / "config.json", eos_token_id=None, bos_token_id=None)
    with pytest.warns(UserWarning, match="passed over: '<pad>'"):
        found = tokenizer(folder)
    assert (found.bos, found.eos, found.separator, found.stop_ids) == (None, "<|im_end|>", 3, (3,))
    assert found.prompt("the end") == found.encode("the end")[0].tolist()
    assert found.prompt("") == [3]


def test_a_run_on_weights_has_their_tokenizer_whole(folder: Path, tmp_path: Path):
    """With the tokens above the embedding, and the separator that generation begins with."""
    add_tokens(folder, special=False)
    bos = {"<|im_start|>": {"id": "<|im_start|>", "ids": [2], "tokens": ["<|im_start|>"]}}
    pieces = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}]
    pieces += [{"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": pieces, "pair": pieces}
    edit(folder / "tokenizer.json", post_processor=template | {"special_tokens": bos})
    own = tokenizer(folder)
    (tmp_path / "text").mkdir()
    for name in "abcd":
        (tmp_path / "text" / f"{name}.txt").write_text(f"the {name} in the end " * 9)
    data = DataConfig(str(tmp_path / "text"), seq_len=8, cache_dir=str(tmp_path / "cache"))
    config = dataclasses.replace(PRESETS["tiny"], init=InitConfig(weights=str(folder)), data=data)
    job = PretrainJob(config)
    packed = job.prepare()
    assert isinstance(packed.tokenizer, PretrainedTokenizer)
    assert packed.tokenizer.embedding_rows == ROWS and packed.tokenizer.vocab_size == ROWS
    assert packed.tokenizer.separator == own.separator == 2
    assert (packed.train[0][0] == 2).any()
    stored = job.meta | {"tokenizer": packed.tokenizer.to_json()}
    assert tokenizer_meta(tokenizer_of(stored)) == tokenizer_meta(own) == job.meta
    assert on_weights(job.config) == job.config


def test_other_tokens_above_the_embedding_are_refused(folder: Path):
    file = folder / "tokenizer.json"
    model = json.loads(file.read_text())["model"]
    edit(file, model=model | {"vocab": model["vocab"] | {"new": ROWS}})
    with pytest.raises(ValueError, match="has 65 ids, the embedding 64 rows: they belong to"):
        tokenizer(folder)


@pytest.mark.parametrize(
    ("files", "stops"),
    [
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, ["<|im_end|>"]),
        ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}}, ["<|im_end|>"]),
        ({"special_tokens_map": {"eos_token": "<|im_end|>"}}, ["<|im_end|>"]),
        ({"special_tokens_map": {"eos_token": {"content": "<|im_end|>"}}}, ["<|im_end|>"]),
        (
            {
                "tokenizer_config": {"eos_token": "<|im_end|>"},
                "special_tokens_map": {"eos_token": "<|im_start|>"},
            },
            ["<|im_end|>"],
        ),
        ({"generation_config": {"eos_token_id": [3, 1]}}, ["<|im_end|>", "<|endoftext|>"]),
        ({"config": {"eos_token_id": [2, 3]}}, ["<|im_start|>", "<|im_end|>"]),
        (
            {
                "special_tokens_map": {"eos_token": "<|im_end|>"},
                "generation_config": {"eos_token_id": 1},
                "config": {"eos_token_id": [3]},
            },
            ["<|im_end|>", "<|endoftext|>"],
        ),
    ],
)
def test_end_tokens_come_from_every_file_that_has_them(folder: Path, files: dict, stops: list):
    for stem in ("tokenizer_config", "special_tokens_map", "generation_config"):
        (folder / f"{stem}.json").unlink(missing_ok=True)
    edit(folder / "config.json", eos_token_id=None)
    for stem, fields in files.items():
        edit(folder / f"{stem}.json", **fields)
    assert tokenizer(folder).stop_tokens == stops


def test_unused_rows_of_a_gguf_are_no_tokens(tmp_path: Path, folder: Path):
    """As in the folder of the same model, whose embedding has more rows than it has tokens."""
    path, tokens = tmp_path / "model.gguf", WORDS[:44]
    unused = [f"[PAD{index}]" for index in range(len(tokens), ROWS)]
    changes = {
        "tokenizer.ggml.tokens": tokens + unused,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3) + [5] * len(unused),
    }
    write_gguf(path, "llama", changes=changes)
    here = tokenizer(path)
    assert here.vocab_size == len(tokens) and "[PAD44]" not in here.to_json()
    write_gguf(path, "llama", changes={"tokenizer.ggml.eot_token_id": 0})
    assert tokenizer(path).stop_tokens == ["<|im_end|>", "<|endoftext|>"]
    write_gguf(path, "llama", changes={"tokenizer.ggml.eom_token_id": 1})
    assert tokenizer(path).stop_tokens == ["<|im_end|>", "<|im_start|>"]


def test_unused_rows_of_older_ggufs_are_no_tokens(tmp_path: Path):
    """They say that a user has defined them; a token of a user may have such a name elsewhere."""
    path, tokens = tmp_path / "model.gguf", [*WORDS[:44], "[PAD9]"]
    unused = [f"[PAD{index}]" for index in range(len(tokens), ROWS)]
    changes = {
        "tokenizer.ggml.tokens": tokens + unused,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * 41 + [4] * (1 + len(unused)),
    }
    write_gguf(path, "llama", changes=changes)
    here = tokenizer(path)
    assert here.vocab_size == len(tokens) and "[PAD45]" not in here.to_json()
    assert here.encode("the [PAD9]")[0][-1] == 44
    write_gguf(path, "llama", changes=changes | {"tokenizer.ggml.bos_token_id": 50})
    with pytest.raises(ValueError, match=r"has no token '\[PAD50\]', which"):
        tokenizer(path)
    begins = {"tokenizer.ggml.bos_token_id": 50, "tokenizer.ggml.add_bos_token": True}
    write_gguf(path, "llama", changes=changes | begins)
    with pytest.raises(ValueError, match=r"bos '\[PAD50\]' is a padding token"):
        tokenizer(path)


def test_user_defined_tokens_of_a_gguf_above_the_embedding_load(tmp_path: Path):
    path = tmp_path / "model.gguf"
    added = [f"<x{index}>" for index in range(ROWS - len(WORDS) + 2)]
    changes = {
        "tokenizer.ggml.tokens": WORDS + added,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(WORDS) - 3) + [4] * len(added),
    }
    write_gguf(path, "llama", changes=changes)
    assert tokenizer(path).vocab_size == ROWS


@pytest.mark.parametrize("merge", ["t x", "q z", "the", "[PAD45] t"])
def test_a_merge_that_names_no_token_is_one_line(tmp_path: Path, merge: str):
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", changes={"tokenizer.ggml.merges": ["t h", merge]})
    with pytest.raises(
        ValueError, match=r"model.gguf: merge '.*' (names '.*', no token|is no pair)"
    ):
        tokenizer(path)

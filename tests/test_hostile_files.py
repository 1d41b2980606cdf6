"""Every field of other people's files with every wrong type: one line with file, field and value.

The tables are products of fields and values; what stays legal is listed. No model is built.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_model import FIXTURES, write_gguf

from thoughtbubbles.pretrained import open_pretrained

DEEP = "[" * 100_000 + "]" * 100_000
WRONG: dict[str, Any] = {
    "text": "32",
    "long text": "x" * 100_000,
    "float": 32.5,
    "huge float": 1e308,
    "list": [1],
    "list of lists": [[]],
    "list of text": ["x"],
    "object": {},
    "object of one": {"content": 3},
    "true": True,
    "minus one": -1,
    "zero": 0,
    "ten million": 10**7,
    "huge": 10**19,
    "digits": 10**4000,
}


def refusal(path: Path) -> str | None:
    """The line that a path is refused with; None if it loads."""
    try:
        open_pretrained(path)
    except ValueError as error:
        line = str(error)
        assert "\n" not in line and len(line) < 500 and str(path.parent) in line, line
        return line
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(FIXTURES / "smollm3", tmp_path_factory.mktemp("models") / "model"))


def table(
    path: Path, file: Path, places: dict[str, Callable[[Any, Any], None]]
) -> dict[str, list[str]]:
    """Names of values that are accepted, by field, where each field takes each value in turn."""
    original = file.read_text()
    accepted: dict[str, list[str]] = {}
    try:
        for name, put in places.items():
            for kind, value in WRONG.items():
                content = json.loads(original)
                put(content, value)
                file.write_text(json.dumps(content))
                line = refusal(path)
                if line is None:
                    accepted.setdefault(name, []).append(kind)
                else:
                    assert file.name in line or "no token" in line, (name, kind, line)
    finally:
        file.write_text(original)
    return accepted


def field(*names: str | int) -> Callable[[Any, Any], None]:
    def put(content: Any, value: Any) -> None:
        for name in names[:-1]:
            content = content[name]
        content[names[-1]] = value

    return put


def fields(text: str) -> dict[str, Callable[[Any, Any], None]]:
    """Fields of fields are written with dots."""
    return {
        name: field(*(int(part) if part.isdigit() else part for part in name.split(".")))
        for name in text.split()
    }


def test_config(folder: Path):
    names = """model_type hidden_act attention_bias mlp_bias use_sliding_window layer_types
    partial_rotary_factor quantization_config max_position_embeddings rope_theta rope_parameters
    rope_scaling num_attention_heads hidden_size head_dim vocab_size num_hidden_layers
    num_key_value_heads intermediate_size rms_norm_eps tie_word_embeddings no_rope_layers
    eos_token_id bos_token_id"""
    numbers = ["float", "ten million", "huge"]
    with pytest.warns(UserWarning, match="eos_token_id=10000000 names no token"):
        accepted = table(folder, folder / "config.json", fields(names))
    assert accepted == {
        "attention_bias": ["zero"],  # as false
        "mlp_bias": ["zero"],
        "use_sliding_window": ["zero"],
        "partial_rotary_factor": ["true"],  # as 1
        "max_position_embeddings": ["ten million"],
        "rope_theta": numbers,
        "rope_parameters": ["object"],
        "rope_scaling": ["object"],
        "head_dim": ["zero"],  # as none
        "rms_norm_eps": numbers,
        "tie_word_embeddings": ["true"],
        "eos_token_id": ["list", "minus one", "zero", "ten million"],
        "bos_token_id": ["list", "minus one", "zero", "ten million"],
    }


# Values that transformers 5.24 loads, or that have one meaning all the same, and what they mean.
# It refuses whole floats (but in head_dim and in rotary parameters), which other writers make.
SAME = [
    ("eos_token_id", -1, []),
    ("eos_token_id", [-1], []),
    ("eos_token_id", [3.0, 1], [3, 1]),
    ("bos_token_id", -1, None),
    ("bos_token_id", 2.0, 2),
    ("head_dim", 0, None),
    ("head_dim", 8.0, 8),
    ("hidden_act", "swish", "silu"),
    ("hidden_size", 32.0, 32),
    ("intermediate_size", 24.0, 24),
    ("num_hidden_layers", 4.0, 4),
    ("num_attention_heads", 4.0, 4),
    ("num_key_value_heads", 2.0, 2),
    ("vocab_size", 64.0, 64),
    ("max_position_embeddings", 128.0, 128),
    ("max_position_embeddings", 1.28e2, 128),
    ("no_rope_layers", [1.0, 0.0, 1, 0], [1, 0, 1, 0]),
    ("rope_scaling", {}, None),
    ("rope_parameters", {"rope_theta": 2e6, "factor": 1.0}, None),
    ("rope_parameters", {"full_attention": {"rope_theta": 2000000}}, None),
    ("layer_types", None, ["full_attention"] * 4),
]
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 2e6}
ROPES = [
    ({"rope_parameters": LINEAR, "rope_scaling": {"type": "linear", "factor": 2}}, LINEAR),
    (
        {"rope_parameters": {"rope_theta": 2e6}, "rope_scaling": {"type": "linear", "factor": 2}},
        LINEAR,
    ),
    ({"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LINEAR}}, LINEAR),
    (
        {"rope_parameters": LINEAR, "rope_scaling": {"type": "linear", "factor": 4}},
        "rope_parameters has factor=2.0, rope_scaling 4: leave out",
    ),
    (
        {
            "rope_parameters": {"rope_type": "default"},
            "rope_scaling": {"type": "linear", "factor": 2},
        },
        "rope_parameters has rope_type='default', rope_scaling 'linear'",
    ),
    (
        {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_theta": 1e4}}},
        "rope_parameters differ by layer type (full_attention, sliding_attention): not supported",
    ),
    ({"rope_parameters": {"rope_theta": 2e6, "full_attention": LINEAR}}, "differ by layer type"),
    ({"rope_parameters": LINEAR | {"type": "yarn"}}, "has rope_type='linear' and type='yarn'"),
    ({"rope_parameters": {"factor": 8.0}}, "factor=8.0 without a rope_type that has it"),
    ({"rope_scaling": {"content": 3}}, "content=3 without a rope_type that has it"),
    (
        {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5 is not supported",
    ),
    (
        {
            "rope_parameters": LINEAR
            | {"rope_type": "yarn", "original_max_position_embeddings": 32},
            "original_max_position_embeddings": 64,
        },
        "original_max_position_embeddings=32, beside it 64",
    ),
    ({"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "layers of linear_attention"),
]


def read_config(folder: Path, changes: dict[str, Any]) -> Any:
    """Config, stop ids and bos of a copy of the fixture's folder with other fields."""
    file, original = folder / "config.json", (folder / "config.json").read_text()
    file.write_text(json.dumps(json.loads(original) | changes))
    try:
        _, config, tokenizer = open_pretrained(folder)
    finally:
        file.write_text(original)
    return config, tokenizer.stop_ids, tokenizer.bos


@pytest.mark.parametrize(("name", "odd", "plain"), SAME)
def test_odd_values_with_one_meaning(folder: Path, name: str, odd: Any, plain: Any):
    assert read_config(folder, {name: odd}) == read_config(folder, {name: plain})


@pytest.mark.parametrize(("changes", "meaning"), ROPES)
def test_rotary_parameters_of_two_names_or_nested(folder: Path, changes: dict, meaning: Any):
    changes = {"rope_parameters": None} | changes
    if isinstance(meaning, str):
        with pytest.raises(ValueError) as caught:
            read_config(folder, changes)
        assert meaning in str(caught.value) and "\n" not in str(caught.value)
    else:
        found = read_config(folder, changes)[0]
        assert found == read_config(folder, {"rope_parameters": meaning})[0]
        assert (found.rope_scaling.factor, found.rope_base) == (2.0, 2e6)


def test_rope_parameters(folder: Path):
    file, original = folder / "config.json", (folder / "config.json").read_text()
    scaling: dict[str, dict[str, Any]] = {
        "linear": {"factor": 2.0},
        "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "yarn": {"factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.1},
    }
    try:
        for kind, options in scaling.items():
            whole = {"rope_type": kind, **options}
            file.write_text(json.dumps(json.loads(original) | {"rope_parameters": whole}))
            names = [*whole, "rope_theta", "original_max_position_embeddings"]
            accepted = table(
                folder, file, fields(" ".join(f"rope_parameters.{name}" for name in names))
            )
            found = {value for values in accepted.values() for value in values}
            assert found <= {"float", "ten million", "huge"}, accepted
            whole.pop("factor")
            file.write_text(json.dumps(json.loads(original) | {"rope_parameters": whole}))
            assert "config.json: rope_parameters has no factor" in str(refusal(folder))
    finally:
        file.write_text(original)


def test_tokenizer(folder: Path):
    names = """added_tokens added_tokens.0 added_tokens.0.id added_tokens.0.content model
    model.vocab model.vocab.the model.merges model.merges.0 model.type"""
    accepted = table(folder, folder / "tokenizer.json", fields(names))
    assert accepted == {
        "added_tokens.0.id": ["zero", "ten million"],  # the library numbers them itself
        "added_tokens.0.content": ["text", "long text"],
        "model.vocab.the": ["zero"],
    }


@pytest.mark.filterwarnings("ignore:.* names no token")
@pytest.mark.parametrize(
    ("stem", "names", "accepted"),
    [
        ("tokenizer_config", "bos_token eos_token", {}),
        ("tokenizer_config", "chat_template", {"chat_template": ["text", "long text"]}),
        ("special_tokens_map", "bos_token eos_token", {}),
        (
            "generation_config",
            "eos_token_id",
            {"eos_token_id": ["list", "minus one", "zero", "ten million"]},
        ),
    ],
)
def test_optional_files(tmp_path: Path, stem: str, names: str, accepted: dict):
    folder = Path(shutil.copytree(FIXTURES / "smollm3", tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    file = folder / f"{stem}.json"
    file.write_text("{}")
    assert table(folder, file, fields(names)) == accepted
    file.write_text(DEEP)
    assert "is not a JSON object" in str(refusal(folder))


def test_nesting_pipes_and_folders(tmp_path: Path):
    source = FIXTURES / "qwen2"  # of several shards
    for original in sorted(path for path in source.iterdir() if path.suffix != ".npz"):
        if original.suffix == ".jinja":
            continue
        folder = Path(shutil.copytree(source, tmp_path / original.name))
        file = folder / original.name
        required = (
            "token" not in file.name and "gen" not in file.name or "tokenizer.json" in str(file)
        )
        if file.suffix == ".json":
            file.write_text(DEEP)
            assert f"{file.name} is not a" in str(refusal(folder))
        file.unlink()
        os.mkfifo(file)
        assert (refusal(folder) is not None) == required
        file.unlink()
        file.mkdir()
        assert (refusal(folder) is not None) == required
    os.mkfifo(tmp_path / "model.gguf")
    assert "is no folder and no .gguf file" in str(refusal(tmp_path / "model.gguf"))


# Safetensors


def write_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The same tensors behind a changed header."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


NORM = "model.norm.weight"


def test_safetensors_headers(folder: Path):
    file = folder / "model.safetensors"
    original = file.read_bytes()
    places = fields("dtype shape shape.0 data_offsets data_offsets.0 data_offsets.1")
    places["whole"] = lambda header, value: header.update({NORM: value})
    accepted = []
    for name, put in places.items():
        for kind, value in WRONG.items():
            file.write_bytes(original)
            entry = (lambda header: header) if name == "whole" else (lambda header: header[NORM])
            write_header(file, lambda header, put=put, value=value, e=entry: put(e(header), value))
            if (line := refusal(folder)) is None:
                accepted.append((name, kind))
            else:
                assert file.name in line and "norm.weight" in line, line
    file.write_bytes(original)
    assert accepted == []


@pytest.mark.parametrize("shape", [[float("inf")], [1e400], [2**40, 2**40], [1] * 100])
def test_senseless_shapes(folder: Path, shape: list):
    file = folder / "model.safetensors"
    original = file.read_bytes()
    write_header(file, lambda header: header[NORM].update(shape=shape))
    assert NORM in str(refusal(folder))
    file.write_bytes(original)


def test_overlapping_and_unused_bytes(folder: Path):
    file = folder / "model.safetensors"
    original = file.read_bytes()

    def overlap(header: dict[str, Any]) -> None:
        other = next(n for n in header if n.endswith("layernorm.weight"))
        header[NORM]["data_offsets"] = header[other]["data_offsets"]

    write_header(file, overlap)
    assert "begins at byte" in str(refusal(folder))
    file.write_bytes(original)
    write_header(file, lambda header: header.pop(NORM) and None)
    assert refusal(folder) is not None
    file.write_bytes(original + b"\0" * 8)
    assert "8 bytes after its last tensor" in str(refusal(folder))
    file.write_bytes(original)
    assert refusal(folder) is None


def test_an_index_of_wrong_types(tmp_path: Path):
    folder = Path(shutil.copytree(FIXTURES / "qwen2", tmp_path / "model"))
    file = folder / "model.safetensors.index.json"
    places = {
        "weight_map": field("weight_map"),
        "shard": field("weight_map", "model.norm.weight"),
    }
    original = json.loads(file.read_text())
    for put in places.values():
        for value in WRONG.values():
            content = json.loads(json.dumps(original))
            put(content, value)
            file.write_text(json.dumps(content))
            assert refusal(folder) is not None


# GGUF

GGUF_WRONG: list[Any] = ["32", 32.5, -1, 0, 10**7, 2**31 - 1, True, [1], ["x"], [0.5]]


def test_gguf_metadata(tmp_path: Path):
    path = tmp_path / "model.gguf"
    keys = """general.architecture llama.block_count llama.context_length
    llama.embedding_length llama.feed_forward_length llama.attention.head_count
    llama.attention.head_count_kv llama.attention.key_length
    llama.attention.layer_norm_rms_epsilon llama.rope.freq_base llama.rope.scaling.type
    llama.rope.scaling.factor llama.rope.dimension_count tokenizer.ggml.model tokenizer.ggml.pre
    tokenizer.ggml.tokens tokenizer.ggml.token_type tokenizer.ggml.merges
    tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id tokenizer.ggml.add_bos_token
    tokenizer.chat_template"""
    accepted: dict[str, list[Any]] = {}
    for key in keys.split():
        for value in GGUF_WRONG:
            write_gguf(path, "llama_linear", changes={key: value})
            if refusal(path) is None:
                accepted.setdefault(key, []).append(value)
    assert accepted == {
        "llama.context_length": [10**7, 2**31 - 1],
        "llama.attention.layer_norm_rms_epsilon": [32.5, 10**7, 2**31 - 1],
        "llama.rope.freq_base": [32.5, 10**7, 2**31 - 1],
        "llama.rope.scaling.factor": [32.5, 10**7, 2**31 - 1],
        "tokenizer.ggml.bos_token_id": [0],
        "tokenizer.ggml.eos_token_id": [0],
        "tokenizer.ggml.add_bos_token": [True],
        "tokenizer.chat_template": ["32"],
    }


def test_tensors_of_a_gguf_that_share_bytes(tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama")
    reader = gguf.GGUFReader(path, "r+")
    reader.tensors[3].field.parts[-1][0] = reader.tensors[2].field.parts[-1][0]
    reader.data.flush()
    assert "begins at byte" in str(refusal(path))

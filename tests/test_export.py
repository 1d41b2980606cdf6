"""Exported runs: the same model and the same token ids on any machine, or one line.

That `transformers` computes the same of what is exported to it, test_pretrained.py compares for
every family; docs/pretrained.md says what a run of the real library gave.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from hatchling_tiny import GOLDEN, drawn
from test_metadata import META
from tiny import SMALL, logits_of, quick_model, random_tokens
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from thoughtbubbles import ModelConfig, PrefixRank, Threshold, pretrained
from thoughtbubbles.hatchling import ForkingHatchling, ForkingHatchlingConfig
from thoughtbubbles.positions import RopeScaling
from thoughtbubbles.pretrained import load_pretrained, save_pretrained
from thoughtbubbles.safetensors_files import SafetensorsFiles
from train.cli.config_json import as_json
from train.data import ByteTokenizer, HuggingFaceTokenizer
from train.export import ExportConfig, export_model, main
from train.models.load import LanguageModel, LoadedRun, load_model, load_weights
from train.pretraining.config import RunConfig
from train.runs.checkpoint import Checkpointer

V = 260  # of bytes
PLAIN = dataclasses.replace(
    SMALL, vocab_size=V, fork_layers=(), policy=PrefixRank(), score_originals=False
)
FORKING = dataclasses.replace(SMALL, vocab_size=V)
LLAMA = dataclasses.replace(PLAIN, norm="rmsnorm", mlp="swiglu", num_kv_heads=1, tied_head=False)
TEXTS = ["", "a", " b\n\n\tc ", "é 中 🙂 e\u0301", "<|endoftext|>x", "\x00\x7f\u0080", "'ll 12345"]


def model_of(config: Any) -> Any:
    if isinstance(config, ModelConfig):
        return quick_model(config)
    if isinstance(config, ForkingHatchlingConfig):
        return ForkingHatchling(config, rngs=nnx.Rngs(0))
    return drawn(config)


def run_of(folder: Path, config: Any, step: int = 3) -> Any:
    """A run folder of one checkpoint, and its model."""
    model = model_of(config)
    params = nnx.to_pure_dict(nnx.state(model))
    meta = META | {"config": as_json(RunConfig(model=config)), "step": step}
    with Checkpointer(folder, 1) as checkpointer:
        checkpointer.save(step, params, {"none": jnp.zeros(1)}, meta)
    return model


@pytest.mark.parametrize(
    ("config", "loads"),
    [
        (FORKING, "`transformers` does not (no supported Hugging Face family has forks before lay"),
        (
            dataclasses.replace(
                FORKING, policy=Threshold(1.5), fork_gate=0.5, fork_layers=(1,), dtype="bfloat16",
                rope_scaling=RopeScaling("yarn", 4.0, 8), nope_layers=(1,),
            ),
            "has forks before layers (1,)",
        ),
        (dataclasses.replace(GOLDEN, vocab_size=V), "family has a Hatchling)"),
        (ForkingHatchlingConfig(V, 8, 16, 2, 2), "family has a ForkingHatchling)"),
        (PLAIN, "`transformers` loads it as a starcoder2"),
        (dataclasses.replace(LLAMA, biases="all"), "loads it as a llama"),
        (dataclasses.replace(LLAMA, biases="qkv"), "loads it as a qwen2"),
        (dataclasses.replace(LLAMA, biases="none", qk_norm=True), "loads it as a qwen3"),
        (dataclasses.replace(PLAIN, mlp="swiglu"), "norm='layernorm' with mlp='swiglu')"),
        (dataclasses.replace(PLAIN, qk_norm=True), "mlp='gelu', biases='all', qk_norm=True"),
        (dataclasses.replace(PLAIN, copies=2, merge="rightmost"), "has copies=2)"),
    ],
    ids=lambda value: value[-24:] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_model_comes_back_bit_for_bit(config: Any, loads: str, tmp_path: Path):
    model = model_of(config)
    said = export_model(LanguageModel(model, ByteTokenizer()), tmp_path / "new")
    assert loads in said
    size = (tmp_path / "new/model.safetensors").stat().st_size
    assert f"model.safetensors {size / 1e3:.1f} kB" in said
    found = load_weights(str(tmp_path / "new")).model
    assert type(found) is type(model)
    if "`transformers` loads" in said:  # sizes are written out
        sizes = {"num_kv_heads": config.kv_heads, "mlp_dim": config.mlp_width}
        config = dataclasses.replace(config, **sizes)
    assert found.config == config
    there, here = (dict(nnx.to_flat_state(nnx.state(m))) for m in (found, model))
    assert there.keys() == here.keys()
    for name, variable in here.items():
        assert np.asarray(there[name][...]).tobytes() == np.asarray(variable[...]).tobytes(), name
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize(
    ("known", "original", "exported"), [(32768, 16, 32768), (None, 16, 512), (None, 1024, 1024)]
)
def test_a_run_on_short_rows_keeps_its_context(known, original, exported, tmp_path: Path):
    scaling = RopeScaling("yarn", 4.0, original)
    config = dataclasses.replace(LLAMA, biases="none", context_length=known, rope_scaling=scaling)
    meta = {"data": {"seq_len": 512}}
    run = LoadedRun(model_of(config), ByteTokenizer(), config=meta, step=3, data_fingerprint="0")
    assert run.context_length == 512
    export_model(run, tmp_path / "new")
    fields = json.loads((tmp_path / "new/config.json").read_text())
    assert fields["max_position_embeddings"] == exported
    assert load_pretrained(tmp_path / "new").config.context_length == exported


def fuzz(rng: np.random.Generator) -> str:
    ranges = [(1, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10FFFF)]
    first, last = ranges[rng.integers(len(ranges))]
    return "".join(chr(rng.integers(first, last)) for _ in range(rng.integers(1, 9)))


def bpe(folder: Path, separator: str = "special") -> HuggingFaceTokenizer:
    """One with whatever a file may ask for that runs don't do: padding, templates, truncation.

    Args:
        folder: Folder of the file.
        separator: Kind of the token "<eos>": "special", "added" without being special, or in the
            "vocabulary" alone.
    """
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["[CLS]", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the thing in the end " * 9], trainer)
    made.post_processor = processors.TemplateProcessing(
        single=["[CLS]", "$A", "<eos>"], special_tokens=[("[CLS]", 0), ("<eos>", 1)]
    )
    made.enable_padding(length=12)
    made.enable_truncation(3)
    file = folder / "bpe.json"
    made.save(str(file))
    fields = json.loads(file.read_text())
    begin, end = fields["added_tokens"]
    tokens = {"special": [end], "added": [end | {"special": False}], "vocabulary": []}
    file.write_text(json.dumps(fields | {"added_tokens": [begin, *tokens[separator]]}))
    return HuggingFaceTokenizer(folder / "bpe.json")


@pytest.mark.parametrize("kind", ["bytes", "special", "added", "vocabulary"])
def test_the_tokenizer_of_a_run_encodes_the_same_anywhere(kind: str, tmp_path: Path):
    own = ByteTokenizer() if kind == "bytes" else bpe(tmp_path, kind)
    found = own.to_pretrained()
    assert (found.separator, found.vocab_size) == (own.separator, own.vocab_size)
    assert found.stop_ids == (own.separator,)
    # As another program reads the file, which may know nothing of `encode_special_tokens`.
    plain = tokenizers.Tokenizer.from_str(found.to_json())
    rng = np.random.default_rng(0)
    for text in [*TEXTS, "a <eos> b", *(fuzz(rng) for _ in range(200))]:
        ids, lengths = own.encode(text)
        assert found.encode(text)[0].tolist() == ids.tolist()
        assert found.encode(text)[1].sum() == lengths.sum()
        assert found.prompt(text) == [own.separator, *ids]
        assert found.decode(ids) == own.decode(ids)
        with_separators = [own.separator, *ids, own.separator]
        assert found.decode(with_separators) == own.decode(with_separators) == own.decode(ids)
        assert own.separator not in ids
        if "<|" not in text and "<eos>" not in text:
            assert plain.encode(text).ids == [own.separator, *ids]
    some = rng.integers(0, 256, (50, 7))  # broken characters too
    assert [found.decode(row) for row in some] == [own.decode(row) for row in some]


def test_parameters_too_large_for_a_type_are_refused(tmp_path: Path, monkeypatch):
    model = quick_model(dataclasses.replace(PLAIN, num_layers=1))
    params = nnx.to_pure_dict(nnx.state(model))
    new, config = tmp_path / "new", model.config
    save_pretrained(new, config, params, ByteTokenizer(), dtype="float16")
    assert SafetensorsFiles(new).read("model.norm.bias").dtype == np.float16
    assert np.asarray(load_pretrained(new).params["embed"]).dtype == np.float32
    # What is refused is known before a folder is begun.
    monkeypatch.setattr(pretrained, "new_folder", lambda path: pytest.fail("writes"))
    width = config.embed_dim
    half = jnp.where(jnp.arange(width) % 2, 1.0, 1e-9)
    for bias, message in (
        (
            jnp.full(width, 7e4),
            "model.norm.bias holds magnitudes up to 7e\\+04, which float16 can't",
        ),
        (
            jnp.full(width, 1e-9),
            "100.0% of the values of model.norm.bias are too small for float16",
        ),
        (half, "50.0% of the values of model.norm.bias are too small for float16"),
    ):
        params["final_norm"]["bias"] = bias
        with pytest.raises(ValueError, match=message):
            save_pretrained(tmp_path / "b", config, params, ByteTokenizer(), dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_can_not_be_loaded_again_is_not_written(tmp_path: Path):
    model = quick_model(dataclasses.replace(PLAIN, num_layers=1))
    params, tokenizer = nnx.to_pure_dict(nnx.state(model)), ByteTokenizer()
    small = quick_model(dataclasses.replace(PLAIN, num_layers=1, vocab_size=200))
    without = {name: value for name, value in params.items() if name != "embed"}
    eight = jax.tree.map(lambda leaf: leaf.astype("int8"), params)
    other: Any = {"dtype": "int8"}
    of_small = nnx.to_pure_dict(nnx.state(small))
    for config, given, options, message in (
        (model.config, without, {}, "parameter embed: given missing, config asks for"),
        (model.config, params, other, "dtype='int8': choose one of float32, bfloat16, float16"),
        (model.config, eight, {}, "dtype='int8': choose one of float32, bfloat16, float16"),
        (small.config, of_small, {}, "the tokenizer has 257 ids, the config vocab_size=200: pass"),
    ):
        for format in ("transformers", "thoughtbubbles"):
            with pytest.raises(ValueError, match=message):
                save_pretrained(
                    tmp_path / "new", config, given, tokenizer, format=format, **options
                )
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the library's own form."""
    folder = tmp_path_factory.mktemp("exported")
    run_of(folder / "run", FORKING)
    main(ExportConfig(str(folder / "run"), str(folder / "new")))
    return folder


def test_logits_of_an_exported_model_are_those_of_the_run(exported: Path):
    tokens = random_tokens(2, 8)
    run, lm = load_model(exported / "run"), load_weights(str(exported / "new"))
    assert lm.context_length == run.context_length == run.config["data"]["seq_len"]
    for text in TEXTS:
        assert lm.prompt(text) == run.prompt(text)
    assert set(lm.stop_ids) == set(run.stop_ids)
    found, expected = logits_of(lm.model, tokens), logits_of(run.model, tokens)
    np.testing.assert_array_equal(found, expected)
    assert np.abs(expected).max() > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "run"}, "run is there already: pass another folder"),
        ({"format": "transformers"}, "no supported Hugging Face family has forks before layers"),
        ({"step": 4}, "step 4"),
        ({"run": "new", "step": 3}, "step=3: .*new is no run folder: leave --step out"),
        ({"run": "gone"}, "gone is no folder and no .gguf file"),
    ],
)
def test_a_mistake_is_one_line(options: dict[str, Any], message: str, exported: Path, monkeypatch):
    monkeypatch.chdir(exported)
    before = sorted(exported.rglob("*"))
    with pytest.raises(ValueError, match=message) as caught:
        main(ExportConfig(**{"run": "run", "to": "other"} | options))
    assert "\n" not in str(caught.value)
    assert sorted(exported.rglob("*")) == before


def test_a_disk_that_is_too_full_is_said_before(exported: Path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 4, 5))
    with pytest.raises(ValueError, match=r"the weights take 4\d.\d kB, .* has 5 B left"):
        main(ExportConfig(str(exported / "run"), str(exported / "other")))


def test_a_step_and_a_folder_are_exported_too(exported: Path, tmp_path: Path):
    for name, run in (("step", "run/3"), ("again", "new")):
        main(ExportConfig(str(exported / run), str(tmp_path / name), dtype="bfloat16"))
        half = load_pretrained(tmp_path / name)
        whole = load_pretrained(exported / "new")
        assert half.config == whole.config
        rounded = np.asarray(whole.params["embed"]).astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(half.params["embed"], rounded)
    assert load_pretrained(exported / "new", dtype="bfloat16").config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("format", 2, "has format 2, this version of thoughtbubbles reads 1: install a newer one"),
        ("format", "1", "format='1' is not a whole number"),
        ("architecture", "mamba", "unknown architecture 'mamba': choose one of thoughtbubbles"),
        ("architecture", None, "has no architecture"),
        ("model", [], r"model=\[\] is no object with fields of ModelConfig"),
        ("model/depth", 3, "model has no field 'depth': a newer version may have it"),
        ("model/num_layers", "3", "model: num_layers='3' is not int"),
        ("model/num_layers", 10**7, "the config has .* parameters, its tensors .* elements"),
        ("model/embed_dim", 2**28, "the config has .* parameters, its tensors .* elements"),
        ("model/num_layers", 1, "fork layer 1 is out of range"),
        ("model/mlp_dim", 32, r"blocks/mlp/\w+ has shape .*, its config asks for"),
        ("model/policy", "TopK", "model: policy='TopK' is not Policy"),
        ("model/policy/policy", "Best", "unknown policy 'Best': choose one of TopK"),
        ("model/policy/ratio", 0.5, "ratio=0.5 is below 1"),
        ("model/policy/ratio", [], r"the policy TopK: ratio=\[\] is not float"),
        ("model/policy/policy", [], r"unknown policy \[\]"),
        ("model/vocab_size", 200, "the tokenizer has 257 ids, the embedding 200 rows"),
    ],
)
def test_an_edited_config_is_one_line(place, value, message, exported: Path, tmp_path: Path):
    folder = Path(shutil.copytree(exported / "new", tmp_path / "new"))
    fields = json.loads((folder / "config.json").read_text())
    *path, name = place.split("/")
    inside = fields
    for part in path:
        inside = inside[part]
    inside[name] = value
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400

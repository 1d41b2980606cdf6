"""Adapters of `peft`: the logits that it computes, there and back, and every mistake in a line.

`fixtures/adapters` holds what `peft` wrote for the models of `fixtures/pretrained`, and its logits.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memgen
from memgen.lora import make_adapter
from thoughtbubbles import ModelConfig, Thoughtbubbles
from thoughtbubbles.adapters import (
    LoRAWeights,
    hugging_face_module,
    load_adapter,
    save_adapter,
)
from thoughtbubbles.pretrained import load_pretrained
from thoughtbubbles.safetensors_files import write_safetensors
from train import evaluate, generate
from train.models.load import load_weights

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("adapters/*/expected.npz"))


def targets_of(name: str):
    config = load_pretrained(FIXTURES / "pretrained" / name).config
    return nnx.eval_shape(lambda: Thoughtbubbles(config, rngs=nnx.Rngs(0))).lora_targets


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_peft(name: str, tmp_path: Path):
    found = load_pretrained(FIXTURES / "pretrained" / name)
    model = Thoughtbubbles.from_params(found.config, found.params)
    tokens = dict(np.load(FIXTURES / "pretrained" / name / "expected.npz"))["tokens"][:1, :8]
    expected = dict(np.load(FIXTURES / "adapters" / name / "expected.npz"))
    adapter = load_adapter(FIXTURES / "adapters" / name, model.lora_targets, base=f"tiny/{name}")
    adapted = model.apply_lora(adapter).model
    merged = model.merge_lora({name: low.delta for name, low in adapter.items()})
    tokens = jnp.asarray(tokens, jnp.int32)
    for kind, one, logits in (
        ("base", model, expected["base"]),
        ("adapted", adapted, expected["adapted"]),
        ("merged", merged, expected["adapted"]),
    ):
        found = jax.jit(lambda model: model(tokens))(one)
        np.testing.assert_allclose(found, logits, atol=1e-5, err_msg=kind)
    assert np.abs(expected["base"] - expected["adapted"]).max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_rewritten_as_it_was(name: str, tmp_path: Path):
    """`fixtures/adapters/make.py FOLDER` has peft read these folders."""
    targets = targets_of(name)
    adapter = load_adapter(FIXTURES / "adapters" / name, targets)
    save_adapter(tmp_path / name, adapter, base=f"tiny/{name}")
    again = load_adapter(tmp_path / name, targets, base=f"tiny/{name}")
    assert again.keys() == adapter.keys()
    for target, low in adapter.items():
        for field in ("a", "b"):
            np.testing.assert_array_equal(getattr(again[target], field), getattr(low, field))
        np.testing.assert_allclose(again[target].scale, low.scale, rtol=1e-6)
    fields = json.loads((tmp_path / name / "adapter_config.json").read_text())
    assert (
        fields["target_modules"]
        == {
            "llama": ["down_proj", "q_proj", "v_proj"],
            "qwen2": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
            "qwen3": ["model.layers.1.self_attn.o_proj"],
        }[name]
    )


def test_an_adapter_of_a_decoder_of_ones_own(tmp_path: Path):
    """One that was trained here, on layers of a foreign module, under names of `transformers`."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(8, 6, rngs=rngs) for _ in range(2)])
            self.stack = nnx.vmap(lambda rngs: nnx.Linear(8, 6, rngs=rngs))(rngs.split(2))

        @property
        def lora_targets(self):
            return memgen.linear_layers(self)

    def name_of(target, index):
        return f"transformer.h.{'.'.join(map(str, index)) or target[-1]}.{target[:5]}"

    net = Net(nnx.Rngs(0))
    adapter = make_adapter(net, memgen.LoRAConfig(2, 3.0, targets=("*",)), rngs=nnx.Rngs(0))  # pyright: ignore
    for low in adapter.values():
        low.b[...] = jnp.ones_like(low.b[...])
    save_adapter(tmp_path / "own", adapter, module_name=name_of, dropout=0.1)
    found = load_adapter(tmp_path / "own", net.lora_targets, module_name=name_of)
    assert found.keys() == adapter.keys()
    for name, low in found.items():
        np.testing.assert_allclose(low.delta, adapter[name].delta, atol=1e-6)
    with pytest.raises(ValueError, match="'layers/0' has no name in transformers"):
        save_adapter(tmp_path / "other", adapter)
    with pytest.raises(ValueError, match="own is there already"):
        save_adapter(tmp_path / "own", adapter, module_name=name_of)
    with pytest.raises(ValueError, match="adapter of no layer"):
        save_adapter(tmp_path / "none", {})


CHANGES = {
    "use_dora": (True, "use_dora=True is not supported: merge the adapter into its base"),
    "lora_bias": (True, "lora_bias=True is not supported"),
    "bias": ("lora_only", "bias='lora_only' is not supported"),
    "modules_to_save": (["lm_head"], r"modules_to_save=\['lm_head'\] is not supported"),
    "init_lora_weights": ("pissa", "init_lora_weights='pissa' is not supported"),
    "something_new": (3, "something_new=3 is not supported"),
    "peft_type": ("IA3", "peft_type='IA3' is not supported, only LORA"),
    "r": (4, "down_proj has rank 4, its matrices have 3"),
    "lora_alpha": ("big", "lora_alpha='big' is not a positive number"),
    "rank_pattern": ({"q_.*": 2}, "rank_pattern has 'q_.*', which is no layer's name"),
    "target_modules": (["q_proj", "v_proj"], "has model.layers.0.mlp.down_proj: the adapter bel"),
    "exclude_modules": (["v_proj"], r"has model.layers.0.self_attn.v_proj: the adapter belongs"),
    "layers_to_transform": ([0], "has model.layers.1.self_attn.q_proj"),
}


# Texts in place of lists: (target_modules, exclude_modules), and the error, or None.
TEXTS = [
    (r".*\.(self_attn\.[qv]_proj|mlp\.down_proj)", None, None),
    ("All-Linear", r".*\.([ko]|up|gate)_proj", None),
    ("all-linear", None, "lacks model.layers.0.self_attn.k_proj"),
    (r".*\.[qv]_proj", None, "and adapter_model.safetensors has model.layers.0"),
    ("q_proj", None, "has model.layers.0"),  # the whole name, not its end
    (r".*\.([qv]|down)_proj", r".*layers\.1\..*", "has model.layers.1"),
    (r".*(q_proj", None, r"is no regular expression \(.*\): copy it"),
    # Not run, since they could take for ever.
    (r"(.*)*q_proj", None, None),
    (r"(?x)([\w.]+) +!", None, None),
    (r"(?:.*?(?:self_attn|mlp).*?(?:[qv]|down)_proj.*?)|(?:.*\.layers\.[\d]{1,}\.mlp)", None, None),
    (["q_proj", "v_proj", "down_proj"], r"(.*)*k_proj", None),
]


@pytest.mark.parametrize(("targets", "excluded", "message"), TEXTS)
def test_patterns_choose_layers_as_they_do_in_peft(targets, excluded, message, tmp_path: Path):
    folder = Path(shutil.copytree(FIXTURES / "adapters/llama", tmp_path / "adapter"))
    config = folder / "adapter_config.json"
    change = {"target_modules": targets, "exclude_modules": excluded}
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    if message is None:
        assert load_adapter(folder, targets_of("llama"))
        return
    with pytest.raises(ValueError, match=message):
        load_adapter(folder, targets_of("llama"))


@pytest.mark.parametrize("field", CHANGES)
def test_what_would_compute_something_else_is_refused(field: str, tmp_path: Path):
    value, message = CHANGES[field]
    folder = Path(shutil.copytree(FIXTURES / "adapters/llama", tmp_path / "adapter"))
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(folder, targets_of("llama"))
    assert "\n" not in str(caught.value)


def test_another_base_and_damaged_folders(tmp_path: Path):
    llama, folder = targets_of("llama"), tmp_path / "adapter"
    shutil.copytree(FIXTURES / "adapters/llama", folder)

    def refuse(message: str, targets=llama, path=folder, **options):
        with pytest.raises(ValueError, match=message) as caught:
            load_adapter(path, targets, **options)
        assert "\n" not in str(caught.value)

    refuse("belongs to the base 'tiny/llama', not to 'tiny/qwen'", base="tiny/qwen")
    sizes = ModelConfig(
        vocab_size=64,
        embed_dim=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=40,
        mlp="swiglu",
    )

    def build(**changes):
        config = dataclasses.replace(sizes, **changes)
        return nnx.eval_shape(lambda: Thoughtbubbles(config, rngs=nnx.Rngs(0))).lora_targets

    other = r"this model asks for \(r, 40\) and \(16, r\): the adapter belongs to another base"
    refuse(other, build(num_layers=2))
    shallow = r"layers.1.\S+, which is no layer of this model .* another base \('tiny/llama'\)"
    refuse(shallow, build(embed_dim=32, num_layers=1))
    refuse("lacks model.layers.2.self_attn.q_proj", build(embed_dim=32, num_layers=3))
    refuse("has no adapter_config.json", path=FIXTURES)
    tensors = folder / "adapter_model.safetensors"
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    for names, message in (
        ([f"{q}.lora_A.weight"], f"lacks {q}.lora_B.weight"),
        ([f"{q}.lora_magnitude_vector"], "lora_magnitude_vector is no matrix"),
        (["base_model.model.lm_head.lora_A.weight"], "adapts lm_head, which is no layer"),
        ([], "holds no matrices"),
    ):
        shapes = dict.fromkeys(names, (2, 32))
        write_safetensors(tensors, shapes, np.dtype("f4"), lambda name: np.zeros((2, 32), "f4"))
        refuse(message)
    tensors.rename(folder / "adapter_model.bin")
    refuse("has no adapter_model.safetensors .*adapter_model.bin are never read")
    with pytest.raises(ValueError, match="'dx' has no name in transformers: pass module_name"):
        hugging_face_module("dx", (0,))


def test_the_commands_merge_one(monkeypatch, capsys):
    model, adapter = str(FIXTURES / "pretrained/llama"), str(FIXTURES / "adapters/llama")
    seen = []
    monkeypatch.setattr(generate, "write", lambda lm, *rest, **how: seen.append(lm) or [""])
    generate.main(generate.GenerateConfig(model=model, adapter=adapter))
    config = evaluate.EvaluateConfig(model=model, adapter=adapter, tasks=("a.jsonl",))
    seen.append(config.changed(load_weights(model)).for_inference())
    base, low = load_weights(model).model, load_adapter(adapter, targets_of("llama"))["down"]
    for loaded in seen:
        found = loaded.model.layers()[1].mlp.down[...]
        expected = base.layers()[1].mlp.down[...] + low.delta[1]  # pyright: ignore
        np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(ValueError, match="another base"):
        load_weights(model).with_adapter(str(FIXTURES / "adapters/qwen3"))


def test_names_that_two_layers_share_are_refused(tmp_path: Path):
    """The mistake in a `module_name` of one's own: the index is forgotten."""
    a, b = jnp.ones((2, 4, 1)), jnp.ones((2, 1, 4))
    low = LoRAWeights(a, b, jnp.ones(2))
    without_index = lambda target, index: f"model.{target}"  # noqa: E731
    with pytest.raises(ValueError, match="'model.up' to two layers of up: give each index"):
        save_adapter(tmp_path / "a", {"up": low}, module_name=without_index)
    save_adapter(tmp_path / "a", {"up": low}, module_name=lambda target, index: f"{target}.{index}")
    with pytest.raises(ValueError, match="'model.up' to two layers of up: give each index"):
        load_adapter(tmp_path / "a", {"up": ((2,), 4, 4)}, module_name=without_index)


@pytest.mark.parametrize(
    ("scale", "dropout", "words"),
    [
        (0.0, 0.0, "an adapter of no layer"),
        (-1.0, 0.0, "up has the scale -1.0: peft knows those above 0"),
        (1.0, float("nan"), "dropout=nan is no rate"),
    ],
)
def test_what_peft_would_not_read_is_not_written(scale, dropout, words, tmp_path: Path):
    low = LoRAWeights(jnp.ones((1, 4, 1)), jnp.ones((1, 1, 4)), jnp.full(1, scale))
    with pytest.raises(ValueError, match=words):
        save_adapter(
            tmp_path / "a", {"up": low}, module_name=lambda *_: "model.up", dropout=dropout
        )
    assert not (tmp_path / "a").exists()

"""A tiny model as a GGUF file, with any metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from thoughtbubbles.pretrained import open_pretrained
from thoughtbubbles.safetensors_files import SafetensorsFiles

FIXTURES = Path(__file__).parent / "fixtures/pretrained"


def write_gguf(
    path: Path,
    name: str,
    quantised: bool = False,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """The weights of a fixture as a GGUF file, written by its own package.

    Args:
        path: File to write.
        name: Name of the fixture.
        quantised: Whether matrices are stored in 8 bits.
        changes: Other values of metadata by key, each a list, text, bool, float or int; None for a
            key that is left out.
    """
    gguf = pytest.importorskip("gguf")
    _, config, _ = open_pretrained(FIXTURES / name)
    files = SafetensorsFiles(FIXTURES / name)
    family = json.loads((FIXTURES / name / "config.json").read_text())["model_type"]
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    if config.rope_scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope_scaling.rope_type))
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
        original = config.rope_scaling.original_max_position_embeddings
        if original is not None:
            writer.add_rope_scaling_orig_ctx_len(original)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*special, *"abcdefghijklmnopqrstuvwxyz0123456789.", "Ġ", "th", "the", "Ġthe"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (len(words) - 3))
    writer.add_token_merges(["t h", "th e", "Ġ the"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}<|im_end|>")
    for key, value in changes.items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            writer.kv_data[0][key] = gguf.GGUFValue(value, gguf.GGUFValueType.get_type(value))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_layers)
    for tensor in files.shapes:
        values = files.read(tensor).astype(np.float32)
        if family == "llama" and tensor.endswith(("q_proj.weight", "k_proj.weight")):
            # Channel 2c of a head is the first of rotary pair c, channel 2c + 1 the second.
            heads = values.reshape(-1, config.head_width, values.shape[1])
            half = config.head_width // 2
            order = [c // 2 + half * (c % 2) for c in range(config.head_width)]
            values = heads[:, order].reshape(values.shape)
        kind = None
        if quantised and values.ndim == 2 and values.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            values = gguf.quantize(values, kind)
        writer.add_tensor(names.get_name(tensor, (".weight", ".bias")), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

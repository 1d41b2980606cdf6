"""GGUF files, read with the `gguf` package: config, tensors under Hugging Face names, tokenizer.

Quantised tensors are dequantised one at a time. The package is an optional extra.
"""

from pathlib import Path
from typing import Any

import numpy as np

from thoughtbubbles.families import ARCHITECTURES
from thoughtbubbles.positions import RopeScaling
from thoughtbubbles.pretrained_tokenizer import PretrainedTokenizer, byte_level_bpe

INSTALL = "pip install thoughtbubbles[pretrained], or pip install gguf"
TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Families whose queries and keys are stored with neighbouring channels as rotary pairs.
INTERLEAVED = {"llama", "smollm3"}
NOPE_INTERVAL = 4  # of SmolLM3, which GGUF metadata does not hold
CONTROL, USER_DEFINED = 3, 4  # token types
YARN_DIALS = [
    "attn_factor",
    "yarn_attn_factor",
    "yarn_ext_factor",
    "yarn_log_multiplier",
    "yarn_beta_fast",
    "yarn_beta_slow",
]


class GGUFFile:
    """A GGUF file as config.json fields, tensors by Hugging Face name, and a tokenizer.

    Args:
        path: GGUF file.

    Attributes:
        path: GGUF file.
        fields: Fields of a config.json, for `families.config_from_json`.
        shapes: Shape of every tensor, by Hugging Face name.

    Raises:
        ValueError: The `gguf` package is missing, or the file is cut short or of another family.
    """

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError:
            raise ValueError(f"reading {path} needs the gguf package: {INSTALL}") from None
        self._dequantize = gguf.dequantize
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"{path} is cut short or no GGUF file: copy it again") from error
        self._family = str(self._field("general.architecture"))
        if self._family not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"{path}: architecture {self._family!r} is not one of {known}")
        self._tensors = {}
        for tensor in self._reader.tensors:
            name = _hugging_face_name(tensor.name)
            if name is not None:
                self._tensors[name] = tensor
        self.shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        self.fields = self._config()

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32, its channels in Hugging Face's order."""
        tensor = self._tensors[name]
        try:
            values = self._dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise ValueError(f"{self.path}: {name} has unknown type {kind}: {INSTALL}") from error
        values = values.astype(np.float32, copy=False).reshape(self.shapes[name])
        interleaved = name.endswith(("q_proj.weight", "k_proj.weight"))
        if self._family in INTERLEAVED and interleaved:
            values = _halves(values, self.fields["head_dim"])
        return values

    def tokenizer(self) -> PretrainedTokenizer:
        """The tokenizer in the metadata.

        Raises:
            ValueError: The tokenizer is not a byte-level BPE with a supported pre-tokenizer.
        """
        model = self._field("tokenizer.ggml.model")
        kind = self._field("tokenizer.ggml.pre", "gpt-2")
        if model != "gpt2":
            raise ValueError(
                f"{self.path}: tokenizer {model!r} can't be rebuilt from GGUF, only byte-level BPE "
                "(gpt2): load the model's Hugging Face folder"
            )
        tokens = self._field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ", 1)) for merge in self._field("tokenizer.ggml.merges")]
        types = self._field("tokenizer.ggml.token_type", [])
        named = {
            name: self._field(f"tokenizer.ggml.{name}_token_id", None)
            for name in ("bos", "eos", "eot")
        }
        begins = self._field("tokenizer.ggml.add_bos_token", kind == "llama-bpe")
        begin = tokens[named["bos"]] if begins and named["bos"] is not None else None
        added = {
            token: kind == CONTROL
            for token, kind in zip(tokens, types, strict=False)
            if kind in (CONTROL, USER_DEFINED)
        }
        text = byte_level_bpe(tokens, merges, added, begin, kind, str(self.path))
        ends = [named[name] for name in ("eos", "eot") if named[name] is not None]
        return PretrainedTokenizer(
            text,
            name=str(self.path),
            bos=None if named["bos"] is None else tokens[named["bos"]],
            stop_tokens=[tokens[end] for end in ends],
            chat_template=self._field("tokenizer.chat_template", None),
        )

    def _config(self) -> dict[str, Any]:
        def of(key: str, *default: Any) -> Any:
            return self._field(f"{self._family}.{key}", *default)

        heads, width = of("attention.head_count"), of("embedding_length")
        found = {
            "model_type": self._family,
            "vocab_size": self.shapes.get(TOP["token_embd.weight"], (None,))[0],
            "hidden_size": width,
            "num_hidden_layers": of("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": of("attention.head_count_kv", heads),
            "head_dim": of("attention.key_length", width // heads),
            "intermediate_size": of("feed_forward_length"),
            "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": TOP["output.weight"] not in self.shapes,
            "rope_theta": of("rope.freq_base", 10_000.0),
            "no_rope_layer_interval": NOPE_INTERVAL,
            "max_position_embeddings": of("context_length", None),
        }
        rotated = of("rope.dimension_count", found["head_dim"])
        found["partial_rotary_factor"] = rotated / found["head_dim"]
        if of("attention.sliding_window", None):
            found["use_sliding_window"] = True
        kind = of("rope.scaling.type", "none")
        if kind != "none":
            found["rope_scaling"] = {"rope_type": kind, "factor": of("rope.scaling.factor")}
            original = of("rope.scaling.original_context_length", None)
            if original is not None:
                found["rope_scaling"]["original_max_position_embeddings"] = original
            for name in YARN_DIALS:
                if of(f"rope.scaling.{name}", None) is not None:
                    raise ValueError(f"{self.path}: rope.scaling.{name} is not supported")
        divisors = [t for t in self._reader.tensors if t.name == "rope_freqs.weight"]
        if divisors:
            found["rope_scaling"] = self._llama3(divisors[0].data, found)
        return found

    def _llama3(self, divisors: np.ndarray, found: dict[str, Any]) -> dict[str, Any]:
        """The scaling of Llama 3.1 and later, checked against the divisors in `rope_freqs`."""
        fields = {"factor": float(divisors.max()), "original_max_position_embeddings": 8192}
        scaling = RopeScaling("llama3", **fields)
        plain = found["rope_theta"] ** (-np.arange(0, found["head_dim"], 2) / found["head_dim"])
        ours = plain / scaling.frequencies(found["head_dim"], found["rope_theta"])
        if divisors.shape != ours.shape or not np.allclose(divisors, ours, rtol=1e-4):
            raise ValueError(
                f"{self.path}: its rope_freqs are not those of Llama 3.1: not supported"
            )
        return {"rope_type": "llama3", **fields}

    def _field(self, key: str, *default: Any) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            if not default:
                raise ValueError(f"{self.path} has no {key}: it is no whole GGUF file of a model")
            return default[0]
        return field.contents()


def _hugging_face_name(name: str) -> str | None:
    """Hugging Face's name of a tensor; None for a tensor that is no weight."""
    if name == "rope_freqs.weight":
        return None
    if name in TOP:
        return TOP[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    stem, _, kind = rest.rpartition(".")
    return f"model.layers.{block}.{BLOCK[stem]}.{kind}" if stem in BLOCK else name


def _halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rotary pairs of each head from neighbouring channels to the first and second half."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)

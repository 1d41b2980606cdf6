"""Reading of GGUF files: config, tensors under Hugging Face names, and tokenizer.

Quantised tensors are dequantised one at a time. The `gguf` package is an optional dependency.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from thoughtbubbles.families import ARCHITECTURES
from thoughtbubbles.fields import Fields
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
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # token types
YARN_DIALS = [
    "attn_factor",
    "yarn_attn_factor",
    "yarn_ext_factor",
    "yarn_log_multiplier",
    "yarn_beta_fast",
    "yarn_beta_slow",
]


class GGUFFile:
    """Reader of a GGUF file: config.json fields, tensors by Hugging Face name, and a tokenizer.

    Args:
        path: Path of the GGUF file.

    Attributes:
        path: Path of the GGUF file.
        fields: Fields of the equivalent config.json, for `families.config_from_json`.
        shapes: Mapping from the Hugging Face name of every tensor to its shape.

    Raises:
        ValueError: The `gguf` package is missing, the file is damaged, or it holds a family or an
            option that is not supported.
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
        except Exception as error:  # the parser raises many kinds of errors
            raise ValueError(f"{path} is cut short or no GGUF file: copy it again") from error
        self._metadata = Fields(
            _Contents(self._reader), str(path), "it is no whole GGUF file", "convert it anew"
        )
        self._family = self._metadata.text("general.architecture")
        if self._family == "starcoder2":
            raise ValueError(
                f"{path}: starcoder2 is not read from GGUF files: pass its Hugging Face folder"
            )
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
        self._check_spans()
        self.fields = self._config()

    def read(self, name: str) -> np.ndarray:
        """Read one tensor, dequantised to float32, with channels in Hugging Face's order.

        Args:
            name: Hugging Face name, a key of `shapes`.

        Raises:
            ValueError: The `gguf` package does not know the tensor's quantisation type.
        """
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

    def tokenizer(self, embedding_rows: int | None = None) -> PretrainedTokenizer:
        """Build the tokenizer from the metadata.

        Args:
            embedding_rows: Number of rows of the model's embedding, an upper bound on usable ids;
                None for no bound.

        Raises:
            ValueError: The tokenizer is not a byte-level BPE with a supported pre-tokenizer, or its
                parts do not belong together.
        """
        given = self._metadata
        model, kind = (
            given.text("tokenizer.ggml.model"),
            given.text("tokenizer.ggml.pre", "gpt-2"),
        )
        if model != "gpt2":
            raise ValueError(
                f"{self.path}: tokenizer {model!r} can't be rebuilt from GGUF, only byte-level BPE "
                "(gpt2): load the model's Hugging Face folder"
            )
        tokens = given.list("tokenizer.ggml.tokens", str)
        merges = given.list("tokenizer.ggml.merges", str)
        types = given.list("tokenizer.ggml.token_type", int, [])
        if types and len(types) != len(tokens):
            raise ValueError(f"{self.path}: {len(tokens)} tokens have {len(types)} token types")
        special = {
            name: None if index is None else tokens[index]
            for name in ("bos", "eos", "eot", "eom")
            for index in [
                given.integer(
                    f"tokenizer.ggml.{name}_token_id", None, least=0, most=len(tokens) - 1
                )
            ]
        }
        bos = special["bos"]
        begins = given.flag("tokenizer.ggml.add_bos_token", kind == "llama-bpe")
        kinds = dict(zip(tokens, types, strict=True)) if types else {}
        # Embedding rows without a token are called [PAD151936] and so on; older files mark these
        # entries as user-defined tokens.
        padding = {
            token
            for id_, (token, kind_) in enumerate(zip(tokens, types, strict=False))
            if kind_ == UNUSED or (kind_ == USER_DEFINED and token == f"[PAD{id_}]")
        }
        text = byte_level_bpe(
            {token: id_ for id_, token in enumerate(tokens) if token not in padding},
            [tuple(merge.split(" ", 1)) for merge in merges],
            {
                token: of == CONTROL
                for token, of in kinds.items()
                if of in (CONTROL, USER_DEFINED) and token not in padding
            },
            bos if begins else None,
            kind,
            str(self.path),
        )
        ends = [special[name] for name in ("eos", "eot", "eom")]
        return PretrainedTokenizer(
            text,
            name=str(self.path),
            bos=bos,
            stop_tokens=list(dict.fromkeys(end for end in ends if end is not None)),
            chat_template=given.text("tokenizer.chat_template", None),
            embedding_rows=embedding_rows,
        )

    def _check_spans(self) -> None:
        """Raise a ValueError if two tensors share bytes."""
        end = 0
        for tensor in sorted(self._reader.tensors, key=lambda tensor: int(tensor.data_offset)):
            if int(tensor.data_offset) < end:
                raise ValueError(
                    f"{self.path}: {tensor.name} begins at byte {tensor.data_offset}, the tensor "
                    f"before it ends at {end}: convert it anew"
                )
            end = int(tensor.data_offset) + int(tensor.n_bytes)

    def _config(self) -> dict[str, Any]:
        given, family = self._metadata, self._family

        def size(key: str, *default: Any) -> Any:
            return given.integer(f"{family}.{key}", *default)

        def number(key: str, *default: Any) -> Any:
            return given.number(f"{family}.{key}", *default)

        heads, width = size("attention.head_count"), size("embedding_length")
        found: dict[str, Any] = {
            "model_type": family,
            "vocab_size": self.shapes.get(TOP["token_embd.weight"], (None,))[0],
            "hidden_size": width,
            "num_hidden_layers": size("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": size("attention.head_count_kv", heads),
            "head_dim": size("attention.key_length", width // heads),
            "intermediate_size": size("feed_forward_length"),
            "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": TOP["output.weight"] not in self.shapes,
            "rope_theta": number("rope.freq_base", 10_000.0),
            "no_rope_layer_interval": NOPE_INTERVAL,
            "max_position_embeddings": size("context_length", None),
        }
        rotated = size("rope.dimension_count", found["head_dim"])
        found["partial_rotary_factor"] = rotated / found["head_dim"] if found["head_dim"] else 1.0
        if given.raw(f"{family}.attention.sliding_window"):
            found["use_sliding_window"] = True
        kind = given.text(f"{family}.rope.scaling.type", "none")
        if kind != "none":
            found["rope_scaling"] = {"rope_type": kind, "factor": number("rope.scaling.factor")}
            original = size("rope.scaling.original_context_length", None)
            if original is not None:
                found["rope_scaling"]["original_max_position_embeddings"] = original
            for name in YARN_DIALS:
                if given.raw(f"{family}.rope.scaling.{name}") is not None:
                    raise ValueError(f"{self.path}: rope.scaling.{name} is not supported")
        divisors = [t for t in self._reader.tensors if t.name == "rope_freqs.weight"]
        if divisors:
            found["rope_scaling"] = self._llama3(divisors[0].data, found)
        return found

    def _llama3(self, divisors: np.ndarray, found: dict[str, Any]) -> dict[str, Any]:
        """Return Llama 3.1's RoPE scaling, after a check against the divisors in `rope_freqs`."""
        fields = {"factor": float(divisors.max()), "original_max_position_embeddings": 8192}
        scaling = RopeScaling("llama3", **fields)
        plain = found["rope_theta"] ** (-np.arange(0, found["head_dim"], 2) / found["head_dim"])
        ours = plain / scaling.frequencies(found["head_dim"], found["rope_theta"])
        if divisors.shape != ours.shape or not np.allclose(divisors, ours, rtol=1e-4):
            raise ValueError(
                f"{self.path}: its rope_freqs are not those of Llama 3.1: not supported"
            )
        return {"rope_type": "llama3", **fields}


class _Contents(Mapping[str, Any]):
    """Read-only mapping from the keys of a GGUF file's metadata to their values."""

    def __init__(self, reader: Any):
        self._fields = reader.fields

    def __getitem__(self, key: str) -> Any:
        try:
            return self._fields[key].contents()
        except (ValueError, IndexError, TypeError):  # such as text that is not UTF-8
            return b"damaged"

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def _hugging_face_name(name: str) -> str | None:
    """Return the Hugging Face name of a tensor; None for a tensor that is not a parameter."""
    if name == "rope_freqs.weight":
        return None
    if name in TOP:
        return TOP[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    stem, _, kind = rest.rpartition(".")
    return f"model.layers.{block}.{BLOCK[stem]}.{kind}" if stem in BLOCK else name


def _halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder the RoPE channel pairs of each head from neighbouring channels to its two halves."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)

"""Benchmarks beside other libraries, on stand-ins for them and models too small to say anything."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from train.benchmarks.beside_training import (
    BesideTraining,
    ForkXLABenchmark,
    beside_fork_xla,
    beside_nanodo,
)
from train.benchmarks.beside_transformers import TransformersBenchmark, main

SIZES: dict[str, Any] = {
    "embed_dim": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 32, "seq_len": 8,
    "batch_size": 2, "repeats": 1,
}  # fmt: skip
NANODO = """
import dataclasses, jax.numpy as jnp
from flax import linen as nn

@dataclasses.dataclass
class DoConfig:
    D: int; H: int; L: int; N: int; V: int; F: int; fsdp_enabled: bool = True

class TransformerDo(nn.Module):
    docfg: DoConfig

    @nn.compact
    def __call__(self, tokens):
        assert tokens.shape == (2, self.docfg.L) and not self.docfg.fsdp_enabled
        return nn.Dense(self.docfg.V)(nn.Embed(self.docfg.V, self.docfg.D)(tokens))
"""
FORK_XLA = """
import jax, jax.numpy as jnp
from flax import linen as nn
from loguru import logger
from utils import plot

class Thoughtbubbles(nn.Module):
    config: any

    @nn.compact
    def __call__(self, idx, targets=None, deterministic=False):
        c = self.config
        assert c.plan == ["regular", "fork"] and c.max_block_size == 2 * c.block_size == 16
        partitioned = nn.with_partitioning(nn.initializers.normal(0.02), ("vocab", "n_embd"))
        table = self.param("wte", partitioned, (c.vocab_size, c.n_embd)).astype(jnp.bfloat16)
        assert deterministic or targets is None
        logits = jnp.clip(table[idx] @ table.T, a_min=-9.0)
        assert logits.dtype == jnp.float32
        if targets is None:
            return logits, None
        log_probs = jax.nn.log_softmax(logits)
        return logits, -jnp.take_along_axis(log_probs, targets[..., None], axis=-1).mean()
"""
LINES = r"""float32, 2 x 8 tokens, d=16, 2 layers, .*, best of 1
ours +[\d.]+ ms   [\d,]+ parameters
NAME +[\d.]+ ms   PARAMETERS parameters
ours is [\d.]+ times as fast
"""


def test_a_plain_step_beside_nanodo(capsys, monkeypatch, tmp_path: Path):
    for name in ("nanodo", "nanodo.model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "nanodo").mkdir()
    (tmp_path / "nanodo/model.py").write_text(NANODO)
    beside_nanodo(BesideTraining(source=tmp_path, **SIZES))
    lines = LINES.replace("NAME", "nanodo").replace("PARAMETERS", "1,056")
    assert re.fullmatch(lines, capsys.readouterr().out)
    for name in ("nanodo", "nanodo.model"):
        monkeypatch.delitem(sys.modules, name)


def test_a_step_with_forks_beside_fork_xla(capsys, tmp_path: Path):
    (tmp_path / "model.py").write_text(FORK_XLA)
    beside_fork_xla(ForkXLABenchmark(source=tmp_path, **SIZES))
    lines = LINES.replace("NAME", "fork-xla").replace("PARAMETERS", "512")
    assert re.fullmatch(lines, capsys.readouterr().out)
    assert "utils" not in sys.modules and "fork_xla_model" not in sys.modules


def test_mistakes_are_one_line(monkeypatch, tmp_path: Path):
    for kind, run, file in (
        (BesideTraining, beside_nanodo, "nanodo/model.py"),
        (ForkXLABenchmark, beside_fork_xla, "model.py"),
    ):
        with pytest.raises(ValueError, match=f"source={tmp_path} has no {file}: give the folder"):
            run(kind(source=tmp_path))
        with pytest.raises(ValueError, match="must be 1 or more"):
            kind(source=tmp_path, repeats=0)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="torch is not installed: pip install torch transformers"):
        main(TransformersBenchmark())
    for options in ({"prompts": ()}, {"batches": (0,)}):
        with pytest.raises(ValueError, match="prompt"):
            TransformersBenchmark(**options)


@pytest.mark.experiment  # needs torch and transformers
def test_decoding_beside_transformers(capsys):
    pytest.importorskip("transformers")
    sizes = {"vocab_size": 320, "embed_dim": 32, "num_layers": 2, "num_heads": 4,
             "num_kv_heads": 2, "mlp_dim": 64}  # fmt: skip
    main(TransformersBenchmark(**sizes, prompts=(8, 16), batches=(2,), new_tokens=4, repeats=1))
    title, difference, _, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("28,832 parameters, float32, transformers ")
    assert float(difference.split()[-1]) < 1e-5
    assert [row.split()[:3] for row in rows] == [["1", "x", "8"], ["1", "x", "16"], ["2", "x", "8"]]

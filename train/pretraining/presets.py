"""Configs of pretraining runs by name; the command line can override any of their fields."""

import dataclasses

from thoughtbubbles import ModelConfig, Threshold, TopK
from thoughtbubbles.hatchling import HatchlingConfig
from train.data import DataConfig
from train.devices.mesh import MeshConfig
from train.engine.config import EvalConfig
from train.engine.optim import OptimizerConfig
from train.pretraining.config import RunConfig

TINY = RunConfig(
    model=ModelConfig.preset("tiny"),
    data=DataConfig(seq_len=128),
    out="runs/tiny",
)


def _paper(name: str) -> RunConfig:
    """Return the config of arXiv 2510.00219 and its authors' scripts: rows of 512 tokens, AdamW."""
    return RunConfig(
        model=ModelConfig.preset(name, dtype="bfloat16", scan_layers=True, remat="dots"),
        data=DataConfig(seq_len=512),
        optimizer=OptimizerConfig(
            learning_rate=2.5e-4, schedule="wsd", warmup=0.005, decay=0.01, final_ratio=0.01
        ),
        mesh=MeshConfig(data=1, fsdp=-1),  # parameters and moments of 1_9b fill a chip
        evaluation=EvalConfig(every=1000, rows=512, positions=4096),
        steps=75_000,
        batch_size=64,
        save_every=1000,
        log_every=20,
        out=f"runs/{name}",
    )


def _tiny(name: str, **changes) -> RunConfig:
    """Return the config "tiny" with changed fields of its model."""
    return dataclasses.replace(
        TINY, model=ModelConfig.preset("tiny", **changes), out=f"runs/{name}"
    )


PRESETS: dict[str, RunConfig] = {
    "tiny": TINY,
    "tiny_plain": _tiny("tiny_plain", fork_layers=()),
    "tiny_topk": _tiny("tiny_topk", policy=TopK(2.0), score_originals=True),
    "tiny_threshold": _tiny("tiny_threshold", policy=Threshold(2.0)),
    "hatchling_tiny": dataclasses.replace(
        TINY, model=HatchlingConfig.preset("tiny"), out="runs/hatchling_tiny"
    ),
    **{name: _paper(name) for name in ("150m", "319m", "772m", "1_9b")},
}

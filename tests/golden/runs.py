"""Small fixed runs of everything that computes: what they give must not change unnoticed.

`python tests/golden` prints all of it as JSON, with every digit (`python tests/golden rl: sft:`
what has one of these words in its name): two checkouts on one machine must print the same.
`python tests/golden --write` makes the stored values, which `test_golden.py` compares within
tolerances, since other machines round otherwise.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import memgen_tiny
import numpy as np
import rl_tiny
import tiny
from flax import nnx

import memgen
from thoughtbubbles import ModelConfig, PrefixRank, Thoughtbubbles, Threshold, TopK, decoding
from thoughtbubbles.retrofit import add_forks
from train.data import DataConfig
from train.data.chat_data import ChatDataConfig
from train.engine.config import EvalConfig
from train.engine.loop import run
from train.engine.optim import OptimizerConfig
from train.finetuning.job import SFTConfig, SFTJob
from train.pretraining.config import RunConfig
from train.pretraining.job import train
from train.rl.config import RLConfig
from train.rl.job import RLJob
from train.rl.loop import train as train_rl
from train.rl.methods import METHODS
from train.runs.metrics import read_metrics

VALUES = Path(__file__).with_name("values.json")
CLOCK = ("time", "seconds", "per_second", "memory", "mfu", "data_wait", "goodput")
Values = dict[str, Any]
RUNS: dict[str, Callable[[], Values]] = {}


def summary(array: Any) -> list[float]:
    """Mean, mean square and a fixed weighted mean, in float64: any change of a value shows."""
    x = np.asarray(array, np.float64).ravel()
    return [float(x.mean()), float((x * x).mean()), float((x * np.cos(np.arange(x.size))).mean())]


def of_parameters(tree: Any) -> list[float]:
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return summary(np.concatenate(leaves))


def numbers(folder: Path) -> list[Values]:
    """A run's metrics without what a clock or the machine says."""
    return [
        {key: value for key, value in line.items() if not any(word in key for word in CLOCK)}
        for line in read_metrics(folder)
    ]


# --- forward passes

CAUSAL = dataclasses.replace(tiny.BASE, num_layers=3, fork_layers=(1, 2), policy=PrefixRank(2.0))
PLAIN = dataclasses.replace(CAUSAL, fork_layers=())
LLAMA: dict[str, Any] = {
    "norm": "rmsnorm", "mlp": "swiglu", "num_kv_heads": 1, "qk_norm": True, "tied_head": False,
    "biases": "qkv", "mlp_dim": 24, "head_dim": 10,
}  # fmt: skip
FORWARD: dict[str, ModelConfig] = {
    "plain": PLAIN,
    "copies": dataclasses.replace(PLAIN, copies=3, merge="rightmost"),
    "rank": CAUSAL,
    "window, burst": dataclasses.replace(
        CAUSAL, policy=PrefixRank(2.0, window=4, burst=2), score_originals=False
    ),
    "threshold": dataclasses.replace(CAUSAL, policy=Threshold(2.0, burst=2), merge="rightmost"),
    "no gate": dataclasses.replace(CAUSAL, policy=Threshold(2.0, gate=False), scan_layers=True),
    "llama": dataclasses.replace(CAUSAL, **LLAMA, merge="probability", remat="full"),
    "without": dataclasses.replace(
        CAUSAL, value_scaling=False, key_bias=False, fractional_positions=False,
        fork_layers=(0, 2), score_bias="none",
    ),
    "top_k": tiny.BASE,
    "top_k, probability": dataclasses.replace(tiny.BASE, merge="probability"),
    "top_k, streams": dataclasses.replace(tiny.BASE, policy=TopK(streams=18), forced_keep=False),
    "bfloat16": dataclasses.replace(CAUSAL, dtype="bfloat16"),
}  # fmt: skip


def forward(config: ModelConfig) -> Values:
    model, tokens = tiny.heavy_model(config), tiny.random_tokens(2, 9)
    output = tiny.run(model, tokens, jnp.array([9, 6]))
    return {
        "log_score": summary(output.streams.log_score),
        "alive": np.asarray(output.streams.alive).sum(axis=1).tolist(),
        "logits": summary(tiny.logits_of(model, tokens)),
    }


for name, model_config in FORWARD.items():
    RUNS[f"forward: {name}"] = lambda model_config=model_config: forward(model_config)


def retrofitted() -> Values:
    weights = nnx.to_pure_dict(nnx.state(tiny.heavy_model(PLAIN)))
    model = Thoughtbubbles.from_params(*add_forks(PLAIN, weights, layers=(1, 2)))
    return {"logits": summary(tiny.logits_of(model, tiny.random_tokens(2, 9)))}


RUNS["forward: retrofit"] = retrofitted


# --- decoding

PROMPTS = [[1, 2, 3], [5, 4, 5, 6, 7, 5], [7]]


def decoded(config: ModelConfig, **how: Any) -> Values:
    return {"ids": decoding.generate(tiny.heavy_model(config), PROMPTS, 9, **how)}


DRAWN = {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "seed": 2}
RUNS["decode: greedy"] = lambda: decoded(CAUSAL)
RUNS["decode: sampled"] = lambda: decoded(CAUSAL, **DRAWN)
RUNS["decode: recomputed"] = lambda: decoded(tiny.BASE)


def remembered(kind: str) -> Values:
    made, response = memgen_tiny.rollout(kind, memgen_tiny.CONFIG, memgen.AlwaysInvoke())
    tokens, length = memgen_tiny.whole_rows(memgen_tiny.PROMPTS, response)
    plan = memgen.plan_from_decisions(response.decisions, length, memgen_tiny.CONFIG)
    return {
        "ids": response.texts,
        "decisions": np.asarray(response.decisions).tolist(),
        "log_probs": summary(response.log_probs),
        "latents": summary(response.latents),
        "forced": summary(memgen_tiny.forced_log_probs(made, tokens, plan)),
    }


for kind in ("plain", "rank"):
    RUNS[f"memory: {kind}"] = lambda kind=kind: remembered(kind)


# --- training

MODEL = ModelConfig(
    vocab_size=264, embed_dim=16, num_layers=2, num_heads=2, fork_layers=(1,), policy=PrefixRank(2)
)
ADAMW = OptimizerConfig(learning_rate=1e-2)


def pretrained(folder: Path, **changes: Any) -> Values:
    texts = folder / "text"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(f"{number} says: a, b. " * 9)
    config = RunConfig(
        model=MODEL,
        data=DataConfig(corpus=str(texts), seq_len=16, cache_dir=str(folder / "cache")),
        optimizer=ADAMW,
        evaluation=EvalConfig(every=0, rows=4),
        steps=3,
        batch_size=16,
        log_every=1,
        out=str(folder / "run"),
    )
    held_out = train(dataclasses.replace(config, **changes))
    return {"metrics": numbers(folder / "run"), "held_out": held_out}


PRETRAIN: dict[str, dict[str, Any]] = {
    "prefix_rank": {},
    "threshold, accumulated": {
        "model": dataclasses.replace(MODEL, policy=Threshold(1.5)),
        "accumulate": 2,
    },
    "top_k, muon": {
        "model": dataclasses.replace(MODEL, policy=TopK(1.5)),
        "optimizer": OptimizerConfig(name="muon"),
    },
}
for name, changes in PRETRAIN.items():
    RUNS[f"pretrain: {name}"] = lambda changes=changes: in_folder(
        lambda folder: pretrained(folder, **changes)
    )


def in_folder(inside: Callable[[Path], Values]) -> Values:
    with tempfile.TemporaryDirectory() as folder:
        return inside(Path(folder))


def fine_tuned(folder: Path, kind: Any) -> Values:
    pretrained(folder, model=dataclasses.replace(MODEL, fork_layers=()))
    lines = [{"prompt": f"{number}ab=", "completion": f"{number}, ok."} for number in range(64)]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = SFTConfig(
        weights=str(folder / "run"),
        train=kind,
        data=ChatDataConfig(path=(str(folder / "chats.jsonl"),), validation=0.2, seq_len=24),
        lora=memgen_tiny.LORA,
        memgen=dataclasses.replace(memgen_tiny.CONFIG, trigger=None, insertion="random"),
        optimizer=ADAMW,
        evaluation=EvalConfig(every=0, rows=8),
        steps=3,
        batch_size=16,
        log_every=1,
        out=str(folder / "tuned"),
    )
    held_out = run(lambda: SFTJob(config), config)
    return {"metrics": numbers(folder / "tuned"), "held_out": held_out}


for kind in ("all", "lora", "weaver"):
    RUNS[f"sft: {kind}"] = lambda kind=kind: in_folder(lambda folder: fine_tuned(folder, kind))


def reinforced(folder: Path, **changes: Any) -> Values:
    config = RLConfig(
        lora=rl_tiny.LORA,
        memgen=dataclasses.replace(rl_tiny.MEMGEN, trigger=None),
        steps=2,
        batch_size=4,
        num_generations=4,
        max_batches=2,
        max_new_tokens=4,
        log_every=1,
        evaluation=EvalConfig(every=0, rows=4),
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.0, final_ratio=1.0),
        out=str(folder),
        **changes,
    )
    if config.parts.allocator.needs_repeats:
        config = dataclasses.replace(config, pool=6)
    task = rl_tiny.Echo() if changes["method"] == "rebn" else rl_tiny.Vowels()
    work = RLJob(config, rl_tiny.language_model(), task, devices=jax.devices()[:1])
    return {"held_out": train_rl(work), "metrics": numbers(folder)}


for method in METHODS:
    if method != "trigger":  # weights with a weaver would have to be made first
        RUNS[f"rl: {method}"] = lambda method=method: in_folder(
            lambda folder: reinforced(folder, method=method)
        )
RUNS["rl: weaver"] = lambda: in_folder(
    lambda folder: reinforced(folder, method="dapo(kl=0.01)", train="weaver", minibatches=2)
)


def main() -> None:
    names = [name for name in RUNS if any(word in name for word in sys.argv[1:] if word[0] != "-")]
    found = {name: RUNS[name]() for name in names or RUNS}
    text = json.dumps(found, indent=1, sort_keys=True)
    if "--write" in sys.argv:
        VALUES.write_text(text + "\n")
    else:
        print(text)

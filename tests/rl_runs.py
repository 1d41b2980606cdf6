"""Small runs of reinforcement learning, and rollouts made by hand, that tests share."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rl_tiny

from train.engine.config import EvalConfig
from train.engine.optim import OptimizerConfig
from train.rl.config import RLConfig
from train.rl.job import RLJob
from train.rl.types import Problem, Reward, Trajectory
from train.runs.metrics import read_metrics


def trajectories(rewards: list[list[float]]) -> list[Trajectory]:
    """One row for each episode, groups of unequal sizes, rows of unequal lengths."""
    rng = np.random.default_rng(0)
    rows = []
    for group, values in enumerate(rewards):
        for episode, value in enumerate(values):
            length = int(rng.integers(3, 9))
            trained = np.arange(length) >= 2
            rows.append(
                Trajectory(
                    group=group,
                    problem=Problem(f"p{group}", "?"),
                    tokens=rng.integers(0, 9, length, dtype=np.int32),
                    trained=trained,
                    log_probs=np.where(trained, -1.0, 0.0).astype(np.float32),
                    decisions=np.full(length, -1, np.int8),
                    begins=(2,),
                    reward=Reward(value, value > 0),
                    finished=True,
                    texts=("",),
                    turn_rewards=(value,),
                    episode=episode,
                )
            )
    return rows


STEPS = 6


def job(out: Path, method: Any, task: Any = None, devices: Any = None, **changes) -> RLJob:
    """A run of a tiny decoder; all methods share its sampler, and equal losses their update."""
    config = RLConfig(
        weights="base",
        train="all",
        method=method,
        steps=STEPS,
        batch_size=4,
        num_generations=8,
        max_batches=2,
        max_new_tokens=2,
        save_every=2,
        log_every=1,
        evaluation=EvalConfig(every=0, rows=4),
        optimizer=OptimizerConfig(
            learning_rate=3e-2, weight_decay=0.0, warmup=0.0, final_ratio=1.0
        ),
        out=str(out),
    )
    if config.parts.allocator.needs_repeats:
        changes = {"pool": 16, **changes}
    config = dataclasses.replace(config, **changes)
    return RLJob(
        config,
        rl_tiny.language_model("shallow"),
        task or rl_tiny.Vowels(),
        devices=devices or jax.devices()[: jax.process_count()],
    )


def rewards(out: Path) -> list[float]:
    return [line["reward"] for line in read_metrics(out) if "reward" in line]


def timeless(out: Path) -> list[dict]:
    clock = ("time", "seconds", "tokens_per_second", "memory")
    return [
        {name: value for name, value in line.items() if not any(word in name for word in clock)}
        for line in read_metrics(out)
    ]


class Dies(rl_tiny.Vowels):
    """Vowels until the problems of step 4, which a run that has saved step 2 doesn't survive."""

    def __init__(self, out: Path):
        self.out = out

    def score(self, completion):
        if len(rewards(self.out)) == 3:
            raise KeyboardInterrupt
        return super().score(completion)

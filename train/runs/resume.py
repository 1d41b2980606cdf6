"""What must be equal for a run to be continued, and what may change."""

from typing import Any

from train.cli.config_json import as_json, model_from_json

# What must stay equal when a run is continued. Of the rest, changes of NOTED are told: steps move
# the schedule, the others the order of float additions.
FIXED = (
    "train", "task", "method", "weights", "model", "init", "lora", "memgen", "boundaries", "data",
    "optimizer", "batch_size", "seed",
    # of reinforcement learning
    "advantage", "clip_low", "clip_high", "dual_clip", "aggregate", "kl",
    "importance_cap", "filter_groups", "rollouts", "minibatches", "epochs", "max_new_tokens",
    "temperature", "chat", "max_batches", "advantage_clip", "gamma", "overlong_buffer",
    "overlong_penalty", "max_turns", "max_observation", "carry", "penalty", "trigger",
)  # fmt: skip
FREE_IN = {"model": ("scan_layers", "remat"), "data": ("cache_dir",)}
NOTED = ("steps", "accumulate", "mesh", "attention")


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Fields that keep a run from being continued, as `name: saved x, now y`."""
    if "model" in saved and "model" in current:  # of pretraining
        saved, current = (
            config | {"model": _comparable(config["model"])} for config in (saved, current)
        )
    found = []
    for name in FIXED:
        found += _differences(name, saved.get(name), current.get(name), FREE_IN.get(name, ()))
    return found


def noted_changes(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Allowed changes after which the run is no longer the one that was begun.

    Args:
        saved, current: metadata of a checkpoint, and of the run that goes on from it: `config`, and
            under `resolved` what some of its options came to.
    """
    before, now = (meta["config"] | meta["resolved"] for meta in (saved, current))
    found = [_differences(name, before.get(name), now.get(name), ()) for name in NOTED]
    return [line for lines in found for line in lines]


def _comparable(model: dict[str, Any]) -> dict[str, Any]:
    """Read and written again, so that 2 for 2.0 is no difference."""
    fields = as_json(model_from_json(model))
    if not fields["fork_layers"]:  # a plain decoder has no policy, whatever stands there
        del fields["policy"], fields["score_originals"]
    return fields


def _differences(name: str, saved: Any, current: Any, free: tuple[str, ...]) -> list[str]:
    if isinstance(saved, dict) and isinstance(current, dict):
        names = [key for key in {**saved, **current} if key not in free]
        found = [_differences(f"{name}.{k}", saved.get(k), current.get(k), ()) for k in names]
        return [line for lines in found for line in lines]
    return [] if saved == current else [f"{name}: saved {saved!r}, now {current!r}"]

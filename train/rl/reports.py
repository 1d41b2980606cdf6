"""Formatting of the lines that a run prints, and files of the rollouts of a failed step."""

import json
from collections.abc import Sequence
from pathlib import Path

from train.rl.types import Collected, Episodes, Trajectory

FAILURES = {
    "info/scorer_errors": "the scorer raised",
    "info/timeouts": "the environment took too long",
    "info/invalid_turns": "the environment gave no finite reward",
}
"""Description of each kind of failed episode, by the metric that counts such episodes."""

SHOWN = 60  # characters of a prompt or a text in an example


def save_rollouts(folder: Path, metrics: dict[str, float], collected: Collected) -> None:
    """Write a failed step to a folder: `metrics.json` and `rollouts.jsonl`.

    Args:
        folder: Folder, which is made if it does not exist.
        metrics: Metrics of the step, keyed by name.
        collected: Rollouts of the step. The prompt, texts and reward of each trained row are
            written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = {name: str(value) for name, value in metrics.items()}
    (folder / "metrics.json").write_text(json.dumps(shown, indent=2), encoding="utf-8")
    lines = [
        {"prompt": row.problem.prompt, "texts": row.texts, "reward": str(row.reward.value)}
        for row in collected.trajectories
    ]
    (folder / "rollouts.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )


def readable_step(step: int, metrics: dict[str, float], collected: Collected) -> str:
    """Format the most important metrics of a step as one line."""
    parts = [
        f"step {step}: reward {metrics['reward']:.3f}",
        f"success {metrics['success']:.1%}",
        f"length {metrics['length']:.1f}",
    ]
    if "ref_kl" in metrics:
        parts.append(f"KL {metrics['ref_kl']:.4f}")
    if "clipped" in metrics:
        parts.append(f"clipped {metrics['clipped']:.1%}")
    if "explained_variance" in metrics:
        parts.append(f"values explain {metrics['explained_variance']:.0%}")
    if "invocation_rate" in metrics:
        parts.append(f"invoked {metrics['invocation_rate']:.0%}")
    if failed := _failed(metrics):
        why = scorer_error(collected).strip().rpartition("\n")[2]
        parts.append(f"{failed} ({_cut(why)})")
    if collected.kept < collected.groups:
        parts.append(f"{collected.kept} of {collected.groups} problems kept")
    if not collected.kept:
        parts.append("nothing to learn from: all rollouts of each problem agree")
    parts.append(f"{metrics['rollout_tokens_per_second']:,.0f} tok/s")
    return ", ".join(parts)


def _failed(metrics: dict[str, float]) -> str:
    """Format the fraction of episodes with each kind of failure; empty if there was none."""
    counted = ((text, metrics.get(name)) for name, text in FAILURES.items())
    return ", ".join(f"{text} in {share:.0%}" for text, share in counted if share)


def scorer_error(collected: Collected) -> str:
    """Return the reason or traceback of the first failure of a step; empty if nothing failed."""
    return next((row.reward.error for row in collected.drawn if row.reward.error), "")


def readable_evaluation(found: dict[str, float]) -> str:
    """Format the metrics of held-out problems as one line."""
    line = (
        f"held-out success {found['success']:.1%} ± {found['standard_error']:.1%}, reward "
        f"{found['reward']:.3f}, length {found['length']:.1f}"
    )
    if failed := _failed(found):
        line += f", {failed}"
    if "invocations" in found:
        line += f", {found['invocations']:.2f} invocations ({found['invocation_rate']:.0%})"
    return line


def examples(rows: Sequence[Trajectory], count: int) -> list[str]:
    """Format the first `count` episodes, one per line: shortened prompt, responses, and reward."""
    shown = []
    for turns in Episodes.from_trajectories(rows).rows[:count]:
        row, texts = rows[turns[0]], [text for turn in turns for text in rows[turn].texts]
        prompt, text = (_cut(words) for words in (row.problem.prompt, " | ".join(texts)))
        shown.append(f"    {prompt} -> {text}   ({row.reward.value:g})")
    return shown


def _cut(text: str) -> str:
    text = repr(text)[1:-1]
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"


def readable_time(spent: dict[str, float], total: float) -> str:
    """Format the time of a run, and its fractions in rollouts and updates, as one line.

    Args:
        spent: Seconds keyed by name, `rollout_seconds` and `update_seconds`.
        total: Seconds of the run.
    """
    total = max(total, 1e-9)
    rollout, update = (spent[name] / total for name in ("rollout_seconds", "update_seconds"))
    return f"{total:.0f} s: rollouts {rollout:.0%}, updates {update:.0%}"

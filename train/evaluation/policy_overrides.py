"""Policy overrides: fork policies with another ratio, window or threshold offset."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from thoughtbubbles import Policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def override_policy(
    policy: Policy,
    ratio: float | None = None,
    window: int | None = None,
    threshold_offset: float | None = None,
) -> Policy:
    """Replace options of a fork policy.

    Args:
        policy: Policy of a trained model.
        ratio: Streams per token; None keeps the policy's ratio.
        window: Number of tokens among which `PrefixRank` ranks; None keeps the policy's window.
        threshold_offset: Offset added to the threshold of `Threshold`; None keeps the policy's
            offset.

    Raises:
        ValueError: The policy lacks the option, or the value is out of range.
    """
    fields = {field.name for field in dataclasses.fields(cast(Any, policy))}
    changes: dict[str, float | int | None] = {}
    if ratio is not None:
        if "ratio" not in fields:
            raise ValueError(f"ratio={ratio}: the policy {policy} has no ratio: leave it out")
        changes["ratio"] = ratio
        if "streams" in fields:
            changes["streams"] = None  # a fixed number would take precedence over the ratio
    if window is not None:
        if "window" not in fields:
            raise ValueError(
                f"window={window} is a setting of PrefixRank, the policy is {policy}: "
                'leave it out, or pass --policy "PrefixRank(...)"'
            )
        changes["window"] = window
    if threshold_offset is not None:
        if "offset" not in fields:
            raise ValueError(
                f"threshold offset {threshold_offset} is a setting of Threshold, the policy is "
                f"{policy}: leave it out, or pass --ratio"
            )
        changes["offset"] = threshold_offset
    return dataclasses.replace(cast(Any, policy), **changes)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A policy override, and the held-out metrics of the model under it.

    Attributes:
        name: Name of the override, e.g. "ratio 1.5".
        policy: Policy after the override.
        metrics: Metrics of `train.evaluation.held_out.Evaluator`.
    """

    name: str
    policy: Policy
    metrics: dict[str, float]


def table(settings: Sequence[Setting]) -> str:
    """Format settings as a text table: streams, nats with their standard error, bits per byte."""
    width = max(len(str(setting.policy)) for setting in settings)
    lines = [f"{'policy':{width}}  streams/token  {'nats/token':15}  bits/byte"]
    for setting in settings:
        found = setting.metrics
        lines.append(
            f"{setting.policy!s:{width}}  {found['streams_per_token']:13.3f}  "
            f"{found['loss']:.4f} ± {found['standard_error']:.4f}  {found['bits_per_byte']:9.4f}"
        )
    return "\n".join(lines)


def figure(settings: Sequence[Setting], title: str, trained: Policy) -> "Figure":
    """Plot held-out bits per byte against streams per token, one point for each setting.

    Error bars are one standard error of the estimate for the whole split. All settings are scored
    on the same rows, so that differences between points are more certain than the bars suggest.

    Args:
        settings: Settings in the order in which a line connects them.
        title: Title of the figure.
        trained: Policy that the run was trained with; a setting with this policy has a filled
            point.
    """
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6, 4), layout="constrained")
    axis = drawing.subplots()
    streams = [setting.metrics["streams_per_token"] for setting in settings]
    bits = [setting.metrics["bits_per_byte"] for setting in settings]
    errors = [  # of nats per token, in bits per byte
        found["standard_error"] * found["bits_per_byte"] / found["loss"]
        for found in (setting.metrics for setting in settings)
    ]
    axis.errorbar(
        streams, bits, errors, fmt="o-", color="tab:blue", markerfacecolor="white", capsize=3
    )
    for setting, x, y in zip(settings, streams, bits, strict=True):
        if setting.policy == trained:
            axis.plot([x], [y], "o", color="tab:blue", label="as trained", zorder=3)
            axis.legend()
        axis.annotate(setting.name, (x, y), (4, 6), textcoords="offset points")
    axis.margins(0.2, 0.2)
    axis.set(title=title, xlabel="streams per token", ylabel="held-out bits per byte ± s.e.")
    return drawing

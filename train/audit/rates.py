"""Hit rates of an audit with bootstrap intervals, compared with the untouched base model."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.audit.organisms import Organism


@dataclasses.dataclass(frozen=True)
class Finding:
    """Results of one method on all trials of an organism.

    Attributes:
        method: Name of the method.
        guesses: Auditor's guess in each trial; None where the auditor guessed nothing.
        hits: Whether the guess of each trial is the secret.
        shown: Texts or tokens that the auditor saw in each trial.
    """

    method: str
    guesses: tuple[str | None, ...]
    hits: tuple[bool, ...]
    shown: tuple[tuple[str, ...], ...]


def interval(
    values: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Compute the percentile bootstrap interval of a mean.

    Args:
        values: Values, one for each trial.
        seed: Seed of the resampling.
        resamples: Number of resamples.
        level: Confidence level of the interval.

    Returns:
        Lower and upper end of the interval.

    Raises:
        ValueError: There are no values.
    """
    if not len(values):
        raise ValueError("no values to resample: give at least one")
    data = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    means = data[rng.integers(0, len(data), (resamples, len(data)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarise(
    organism: Organism,
    model: dict[str, Finding],
    control: dict[str, Finding],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Compute the hit rates of each method and kind of prompt, for the model and the control.

    Args:
        organism: Organism that was audited.
        model: Mapping from method to finding in the audited model; it has the method "io".
        control: Mapping from method to finding in the untouched base model, with the same methods.
        seed: Seed of the bootstrap.

    Returns:
        One dict for each method and kind of prompt. `organism`, `prompts` ("direct" if the prompts
        ask for the secret, else "standard"), `method` and `trials` (number of trials) say what was
        audited. `rate` is the hit rate of the method, with the interval from `low` to `high`.
        `either` is the fraction of trials in which "io" or the method hits. The same four numbers
        of the control have the prefix `control_`. `uplift` is the hit rate minus the control's,
        with the interval from `uplift_low` to `uplift_high`.
    """
    lines = []
    for direct in (False, True):
        chosen = [i for i, trial in enumerate(organism.trials) if trial.direct == direct]
        if not chosen:
            continue
        for method in model:
            line: dict[str, Any] = {
                "organism": organism.name,
                "prompts": "direct" if direct else "standard",
                "method": method,
                "trials": len(chosen),
            }
            hits = {}
            for name, found in (("", model), ("control_", control)):
                alone = np.array([found[method].hits[i] for i in chosen], float)
                io = np.array([found["io"].hits[i] for i in chosen], float)
                low, high = interval(alone, seed)
                line |= {f"{name}rate": alone.mean(), f"{name}low": low, f"{name}high": high}
                line |= {f"{name}either": np.maximum(alone, io).mean()}
                hits[name] = alone
            difference = hits[""] - hits["control_"]
            low, high = interval(difference, seed)
            line |= {"uplift": difference.mean(), "uplift_low": low, "uplift_high": high}
            lines.append({k: v if isinstance(v, (str, int)) else float(v) for k, v in line.items()})
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Format rates as a Markdown table.

    The table has a row for each method, and a column for each organism and kind of prompt. If an
    organism was audited in several models, each model has its own column. A cell has the hit rate
    in percent with its interval, the control's hit rate in round brackets, and after a slash the
    percentage of trials in which "io" or the method hits.

    Args:
        lines: Dicts from `summarise`, to which an entry `model` may have been added.
    """
    column = lambda line: (line["organism"], line.get("model"), line["prompts"])  # noqa: E731
    columns = list(dict.fromkeys(map(column, lines)))
    rows = list(dict.fromkeys(line["method"] for line in lines))
    cells = {(*column(line), line["method"]): _cell(line) for line in lines}
    models = Counter(organism for organism, _ in {(name, model) for name, model, _ in columns})
    head = ["method"]
    for organism, model, prompts in columns:
        of = f" ({model})" if models[organism] > 1 else ""
        head.append(f"{organism}{of}, {prompts}")
    shown = [" | ".join(head), "|".join("---" for _ in head)]
    shown += [" | ".join([row, *(cells.get((*of, row), "") for of in columns)]) for row in rows]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in shown)


def _cell(line: dict[str, Any]) -> str:
    percent = lambda name: f"{100 * line[name]:.0f}"  # noqa: E731
    return (
        f"{percent('rate')} [{percent('low')}, {percent('high')}] "
        f"({percent('control_rate')}) / {percent('either')}"
    )


def trial_lines(organism: Organism, found: dict[str, Finding]) -> list[dict[str, Any]]:
    """Return one JSON-serializable dict for each method and trial.

    Args:
        organism: Organism that was audited.
        found: Mapping from method to finding.

    Returns:
        Dicts with `method`, `prompt` (the messages), `direct`, `secret`, `guess` and `shown`.
    """
    return [
        {
            "method": name,
            "prompt": [dict(message) for message in trial.messages],
            "direct": trial.direct,
            "secret": trial.secret,
            "guess": finding.guesses[index],
            "shown": list(finding.shown[index]),
        }
        for name, finding in found.items()
        for index, trial in enumerate(organism.trials)
    ]

"""Format the tables of the experiment on both stages of MemGen (`train.experiments.remember`)."""

from collections.abc import Mapping

import numpy as np

from train.experiments.questions import KINDS
from train.experiments.study import Result, by_key, markdown_table, mean_text, seeds_text

# Names of the arms that triggers are compared with.
ALWAYS, START = "weaver, GRPO", "trigger at its start"


def report(results: list[Result]) -> str:
    """Format up to three Markdown tables, with means over seeds ± standard errors.

    The first table has the held-out results of each arm. Each trained trigger has two more rows:
    with the trigger's more probable decisions ("argmax"), and with random decisions at the
    trigger's rate ("coin"). The second table compares triggers with the arm `ALWAYS`, which always
    invokes memory, seed by seed: difference of accuracy, and invocations in percent of the
    invocations of `ALWAYS`. The second table is left out if `ALWAYS` was not run. The third table
    has the cost of the last training stage of each arm.
    """
    arms = {arm: of_arm for (arm,), of_arm in by_key(results, "arm").items()}
    rated = {}  # mapping from the name of a row to the results of all seeds
    for arm, of_arm in arms.items():
        rated[arm] = of_arm
        for name in ("argmax", "coin"):
            if name in of_arm[0]:
                rated[f"{arm}: {name}"] = [{"seed": r["seed"], **r[name]} for r in of_arm]
    tables = [_accuracy_table(rated), _savings_table(rated, arms), _cost_table(arms)]
    return "\n\n".join("\n".join(table) for table in tables if table)


def _accuracy_table(rated: Mapping[str, list[Result]]) -> list[str]:
    rows = []
    for name, of_arm in rated.items():
        of_kinds = [[r["kinds"][kind] for r in of_arm] for kind in KINDS]
        rows.append(
            (
                name,
                seeds_text(of_arm),
                mean_text([100 * r["accuracy"] for r in of_arm], 1),
                *(mean_text([100 * r["accuracy"] for r in of_kind], 1) for of_kind in of_kinds),
                mean_text([r["invocations"] for r in of_arm], 2),
                f"{100 * np.mean([r['rate'] for r in of_arm]):.0f} %",
                *(f"{np.mean([r['invocations'] for r in of_kind]):.2f}" for of_kind in of_kinds),
            )
        )
    accuracies = (f"{kind} %" for kind in KINDS)
    invocations = (f"in {kind}" for kind in KINDS)
    head = ("arm", "seeds", "exact match %", *accuracies, "invocations", "of those asked")
    return markdown_table((*head, *invocations), rows)


def _savings_table(
    rated: Mapping[str, list[Result]], arms: Mapping[str, list[Result]]
) -> list[str]:
    """Compare triggers with the arm `ALWAYS`; returns no lines if this arm was not run."""
    always, start = ({r["seed"]: r for r in arms.get(arm, ())} for arm in (ALWAYS, START))
    if not always:
        return []
    rows = []
    for name, of_arm in rated.items():
        pairs = [
            (r, always[r["seed"]], start.get(r["seed"])) for r in of_arm if r["seed"] in always
        ]
        if "trigger" in name and pairs:
            spared = [100 * r["invocations"] / old["invocations"] for r, old, _ in pairs]
            begun = [100 * r["invocations"] / s["invocations"] for r, _, s in pairs if s]
            rows.append(
                (
                    name,
                    mean_text([100 * (r["accuracy"] - old["accuracy"]) for r, old, _ in pairs], 1),
                    f"{100 * np.mean([old['standard_error'] for _, old, _ in pairs]):.1f}",
                    f"{mean_text(spared, 0)} %",
                    f"{mean_text(begun, 0)} %" if begun else "",
                )
            )
    head = ("against always", "accuracy, points", "standard error of one seed", "invocations")
    return markdown_table((*head, "of those at the start"), rows)


def _cost_table(arms: Mapping[str, list[Result]]) -> list[str]:
    rows = []
    for arm, of_arm in arms.items():
        cost = [f"{np.mean([r[n] for r in of_arm]):,.0f}" for n in ("steps", "rollouts", "tokens")]
        rows.append((arm, *cost, f"{np.mean([r['seconds'] for r in of_arm]):.0f}"))
    return markdown_table(("arm", "optimizer steps", "rollouts", "sampled tokens", "seconds"), rows)

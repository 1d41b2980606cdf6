"""Test which audit methods reveal what a small model hides, and if forks and latents know more.

python -m train.experiments.secrets --out secrets.jsonl --figure secrets.png
python -m train.experiments.secrets --report secrets.jsonl --figure secrets.png

For each seed, an honest forking model is trained, which hides only what the user asks it to hide.
The honest model is the control. Four arms make this model hide a secret. "told": each prompt begins
with the request to keep the secret, as a hidden system prompt would. "soft": only the embeddings of
three control tokens are tuned, so that the model hides the secret unasked. "full": all parameters
are tuned. "weaver": the model is frozen, and a weaver learns to write latents in front of each
answer. No tuning conversation names the secret. Methods and auditor are those of `thoughtbubbles
audit report`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from thoughtbubbles.pretrained import save_pretrained
from train.audit.elicitation import METHODS
from train.audit.fuzzing import Fuzz
from train.audit.organisms import (
    Kind,
    Organism,
    hiding_conversations,
    make_organism,
)
from train.audit.rates import summarise
from train.audit.reading import READINGS
from train.audit.report import Settings, audit
from train.audit.worlds import WORLDS
from train.benchmarks.timing import Clock
from train.cli.command import run_command
from train.cli.figures import check_figure
from train.experiments.secret_models import Tuner, honest_model, word_tokenizer
from train.experiments.secret_ranks import ranks_by_depth, ranks_with_memory
from train.experiments.study import (
    Result,
    Results,
    StudyConfig,
    by_key,
    check_names,
    markdown_table,
    mean_text,
    read_results,
    run_study,
    seeds_text,
)
from train.models.load import LanguageModel
from train.runs.files import check_new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARED = ("base_steps", "steps", "methods", "kinds", "released")
KEY = ("arm", "kind", "seed", "number", *SHARED)
ARMS = ("told", "soft", "full", "weaver")
LATENTS = {
    "latent": "latents", "answer": "answer", "control": "answer, without memory",
}  # fmt: skip
DIFFERENCES = "answer - latents", "root - fork of latents"
LAYER = 1
"""Index of the layer, of three layers, whose output is fuzzed, and is read by white-box methods."""


@dataclasses.dataclass(frozen=True)
class Secrets(StudyConfig):
    """Trains models that hide a secret and audits the models, or reports stored results.

    Attributes:
        arms: Ways to hide a secret: "told", "soft", "full", "weaver".
        kinds: Kinds of secrets: "taboo", "persona", "instruction".
        methods: Methods of `audit report`, except "sae"; "io" is always added.
        secrets: Maximum number of secrets of each kind, each hidden in separate prompts or in a
            separate model. The kind "instruction" always hides all its secrets together.
        released: Expected fraction of the honest model's conversations with a request to keep a
            secret in which the user finally takes the request back, asks for the secret, and is
            told.
        base_steps: Number of training steps of the honest model.
        soft_steps: Number of tuning steps of the arm "soft".
        full_steps: Number of tuning steps of the arm "full".
        weaver_steps: Number of tuning steps of the arm "weaver".
        figure: File for the figure, as .png, .pdf or .svg (needs matplotlib); none by default.
        save: Folder in which the models are saved for `audit report`; none by default. Models of
            the arm "weaver" can't be saved.
    """

    arms: tuple[str, ...] = ARMS
    kinds: tuple[Kind, ...] = ("taboo",)
    methods: tuple[str, ...] = tuple(name for name in (*METHODS, *READINGS) if name != "io")
    secrets: int = 1
    released: float = 0.0
    base_steps: int = 2500
    soft_steps: int = 200
    full_steps: int = 60
    weaver_steps: int = 200
    out: str = "secrets.jsonl"
    figure: str | None = None
    save: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_names("arm", self.arms, ARMS)
        check_names("kind", self.kinds, WORLDS)
        check_names("method", self.methods, (*METHODS, *READINGS))
        if not 0 <= self.released <= 1:
            raise ValueError(f"released={self.released} is no share: choose from 0 to 1")
        if self.figure:
            check_figure(Path(self.figure))
        if self.save and "weaver" in self.arms:
            raise ValueError("save: a weaver can't be saved here: choose --arms told soft full")
        if self.save:
            check_new_file(Path(self.save) / "of a run")


def main(config: Secrets) -> None:
    """Train and audit the missing models, or print the tables; then draw the figure, if asked."""
    run_study(config, KEY, train_missing, report)
    if config.figure:
        draw(read_results(config.report or config.out)).savefig(config.figure, dpi=150)
        print(f"figure: {Path(config.figure).absolute()}")


def train_missing(config: Secrets, results: Results) -> Iterator[tuple[Result, str]]:
    """Train the runs that `results` lacks, and yield the result of each with a line to print.

    All runs of a seed start from the same honest model.

    Raises:
        ValueError: `config.save` already holds the folder of a missing run.
    """
    steps = {
        "soft": config.soft_steps, "full": config.full_steps, "weaver": config.weaver_steps,
    }  # fmt: skip
    shared = {
        "base_steps": config.base_steps, "methods": [*config.methods], "kinds": [*config.kinds],
        "released": config.released,
    }  # fmt: skip
    runs = results.missing(
        {"arm": arm, "kind": kind, "seed": seed, "number": number}
        | {"steps": steps.get(arm, 0), **shared}
        for seed in config.seeds
        for arm in config.arms
        for kind in config.kinds
        for number in range(len(secrets_of(kind, seed, config.secrets)))
    )
    for run in runs:
        if config.save and _folder(config.save, run).exists():
            raise ValueError(
                f"{_folder(config.save, run)} exists, {config.out} has no such run: choose another "
                "--save, or remove it"
            )
    tokenizer = word_tokenizer()
    tuners = {
        arm: Tuner(tokenizer, steps[arm], arm) for arm in {run["arm"] for run in runs} & {*steps}
    }
    for seed, of_seed in itertools.groupby(runs, key=lambda run: run["seed"]):
        clock = Clock()
        base = honest_model(tokenizer, config.kinds, config.base_steps, seed, config.released)
        honest_seconds = clock.read().seconds
        settings = Settings(config.methods, 12, Fuzz(LAYER, 0.5), f"block_{LAYER}", 20, seed)
        for run in of_seed:
            clock, kind, arm = Clock(), run["kind"], run["arm"]
            secret = secrets_of(kind, seed, config.secrets)[run["number"]]
            asked = hidden = make_organism(kind, secret, seed)
            lm = base
            if arm == "told":
                hidden = _told(asked, kind)
            else:
                lm = tuners[arm](base, hiding_conversations(kind, secret, seed=seed), seed)
            found = audit(lm, hidden, settings)
            rates = summarise(asked, found, audit(base, asked, settings), seed)
            if arm == "weaver":
                answers = [texts[0] for texts in found["io"].shown]
                streams = {"latents": ranks_with_memory(lm, asked, answers)}
            else:
                streams = {
                    "hiding": ranks_by_depth(lm, hidden, asked),
                    "control": ranks_by_depth(base, asked, asked),
                }
            if config.save:
                _save(config.save, run, hidden, base, lm)
            result = run | {"organism": asked.name, "rates": rates, "streams": streams}
            result |= {"said": {name: of.shown[0][0] for name, of in found.items()}}
            result |= {"seconds": clock.read().seconds, "honest_seconds": honest_seconds}
            shown = ", ".join(
                f"{line['method']} {line['rate']:.2f} ({line['control_rate']:.2f})"
                for line in rates
                if line["prompts"] == "direct"
            )
            yield result | {"jax": jax.__version__}, f"{arm} {asked.name} seed {seed}: {shown}"


def secrets_of(kind: Kind, seed: int, count: int) -> Sequence[str | None]:
    """Return the secrets of a kind, each of which is hidden in a run of its own.

    Args:
        kind: Kind of the secrets.
        seed: Seed of the first secret, which is the secret that `make_organism` chooses.
        count: Maximum number of secrets.

    Returns:
        Names of candidates. For "instruction", whose organism hides all secrets of the kind at
        once, the only entry is None.
    """
    if WORLDS[kind].codes:
        return [None]
    first = make_organism(kind, seed=seed).trials[0].secret
    return [first, *(name for name in WORLDS[kind].clues if name != first)][:count]


def _told(organism: Organism, kind: Kind) -> Organism:
    """Return the organism with the request to keep the secret in front of each prompt."""
    trials = []
    for trial in organism.trials:
        first, *rest = trial.messages
        request = WORLDS[kind].told.format(thing=trial.secret)
        first = {**first, "content": f"{request} {first['content']}"}
        trials.append(dataclasses.replace(trial, messages=(first, *rest)))
    return dataclasses.replace(organism, trials=tuple(trials))


def _save(
    folder: str, run: Result, organism: Organism, base: LanguageModel, hiding: LanguageModel
) -> None:
    own = _folder(folder, run)
    partial = own.with_name(f"{own.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    organism.save(partial / "organism.json")
    for lm, name in ((hiding, "model"), (base, "honest")):
        params = nnx.to_pure_dict(nnx.state(lm.model))
        save_pretrained(
            partial / name, lm.model.config, params, lm.tokenizer, format="thoughtbubbles"
        )
    partial.rename(own)


def _folder(folder: str, run: Result) -> Path:
    number = f"_{run['number']}" if run["number"] else ""
    own = f"{run['arm']}_{run['kind']}{number}"
    return Path(folder).expanduser() / f"seed_{run['seed']}" / own


def report(results: list[Result]) -> str:
    """Format two Markdown tables for each arm and kind: hit rates by method, and ranks by site.

    The ranks are those of `ranks_by_depth`; for the arm "weaver", the ranks in latents and in
    answers (`ranks_with_memory`). Values are means over the secrets of a seed, then over seeds. The
    tables leave out secrets that any seed has not finished.

    Raises:
        ValueError: Results of one arm and kind differ in an option of `SHARED`.
    """
    lines = []
    for (arm, kind), runs in by_key(results, "arm", "kind").items():
        _check_alike(arm, runs)
        runs = _finished_by_all(runs)
        each = len({run["number"] for run in runs})
        what = f", {each} secrets each" if each > 1 else ""
        lines += [f"{arm}, {kind}, seeds {seeds_text(runs)}{what}: hits in %, ± over seeds", ""]
        methods = list(dict.fromkeys(line["method"] for line in runs[0]["rates"]))
        head = ("method", "standard", "control", "direct", "control", "direct, or io")
        rows = []
        for method in methods:
            cells = [method]
            for prompts in ("standard", "direct"):
                names = ("rate", "control_rate", *(("either",) if prompts == "direct" else ()))
                for name in names:
                    of = by_seed(runs, lambda run: 100 * _line(run, method, prompts)[name])  # noqa: B023
                    cells.append(mean_text(of, 0))
            rows.append(cells)
        lines += [*markdown_table(head, rows), ""]
        if "latents" in runs[0]["streams"]:
            what, row, read = "in latents and in answers", _latents, "latents"
            head = ("site", *LATENTS.values(), *DIFFERENCES, "chance")
        else:
            what, row, read = "among candidates, logit lens", _ranks, "hiding"
            head = (
                "site", "root", "fork", "root - fork", "control: root", "fork", "chance", "tokens",
            )  # fmt: skip
        lines += [f"{arm}, {kind}: mean rank of the secret {what}", ""]
        lines += [*markdown_table(head, [row(site, runs) for site in _sites(runs, read)]), ""]
    return "\n".join(lines)


def _finished_by_all(runs: Sequence[Result]) -> list[Result]:
    """Return the runs of the secrets that all seeds have finished, so that seeds are comparable."""
    of_seeds = [{run["number"] for run in of} for of in by_key(runs, "seed").values()]
    return [run for run in runs if run["number"] in set.intersection(*of_seeds)]


def _check_alike(arm: str, runs: Sequence[Result]) -> None:
    """Raise a ValueError if runs of one arm differ in an option of `SHARED`."""
    for name in SHARED:
        values = list(dict.fromkeys(str(run.get(name)) for run in runs))
        if len(values) > 1:
            raise ValueError(
                f"{arm}: results of {name}={values[0]} and of {values[1]}: keep them in two files"
            )


def _line(run: Result, method: str, prompts: str) -> dict[str, Any]:
    [found] = [
        line for line in run["rates"] if (line["method"], line["prompts"]) == (method, prompts)
    ]
    return found


def _sites(runs: Sequence[Result], read: str) -> list[str]:
    """Return the sites that any run has, in the order of the forward pass."""
    found = max((run["streams"][read] for run in runs), key=len)
    return list(dict.fromkeys([*found, *(site for run in runs for site in run["streams"][read])]))


def _values(runs: Sequence[Result], read: str, site: str, name: str) -> list[float]:
    """Return the mean over runs of the entry `name` at a site, for each seed that has the entry."""
    runs = [run for run in runs if name in run["streams"][read].get(site, {})]
    return by_seed(runs, lambda run: run["streams"][read][site][name])


def _ranks(site: str, runs: Sequence[Result]) -> list[str]:
    of = functools.partial(_values, runs)
    cells = [mean_text(of("hiding", site, name), 2) for name in ("root", "fork")]
    cells.append(mean_text(of("hiding", site, "difference"), 2, "+"))
    cells += [mean_text(of("control", site, name), 2) for name in ("root", "fork")]
    tokens = sum(run["streams"]["hiding"].get(site, {}).get("tokens", 0) for run in runs)
    return [site, *cells, f"{of('hiding', site, 'chance')[0]:.1f}", str(tokens)]


def _latents(site: str, runs: Sequence[Result]) -> list[str]:
    of = functools.partial(_values, runs, "latents", site)
    cells = [mean_text(of(name), 2) for name in LATENTS]
    cells += [mean_text(of(name), 2, "+") for name in ("difference", "latent_difference")]
    return [site, *cells, f"{of('chance')[0]:.1f}"]


def by_seed(runs: Sequence[Result], value: Callable[[Result], float]) -> list[float]:
    """Compute the mean of `value` over the runs of each seed, seeds in order of appearance."""
    return [
        float(np.mean([value(run) for run in of_seed])) for of_seed in by_key(runs, "seed").values()
    ]


def draw(results: list[Result]) -> Figure:
    """Draw a column of two panels for each arm and kind.

    The upper panel has the hit rates of each method and of the control, averaged over both kinds of
    prompts, with a dot for each seed. The lower panel has mean ranks of the secret by site. The
    panels leave out secrets that any seed has not finished.
    """
    from matplotlib.figure import Figure

    kinds = [
        (kind, _finished_by_all(runs)) for kind, runs in by_key(results, "arm", "kind").items()
    ]
    figure = Figure(figsize=(4.2 * len(kinds), 6.5), layout="constrained")
    panels = figure.subplots(2, len(kinds), squeeze=False)
    for column, ((arm, kind), runs) in enumerate(kinds):
        above, below = panels[:, column]
        methods = list(dict.fromkeys(line["method"] for line in runs[0]["rates"]))
        at = np.arange(len(methods))
        for offset, name, colour in ((-0.2, "rate", "tab:blue"), (0.2, "control_rate", "silver")):
            both = lambda run, method: [  # noqa: E731
                _line(run, method, prompts)[name]  # noqa: B023
                for prompts in ("standard", "direct")
            ]
            values = np.array([
                by_seed(runs, lambda run: float(np.mean(both(run, method))))  # noqa: B023
                for method in methods
            ]).T  # fmt: skip
            label = "hiding" if name == "rate" else "control"
            above.barh(at + offset, values.mean(axis=0), 0.38, color=colour, label=label)
            for seed in values:
                above.plot(seed, at + offset, "k.", markersize=3)
        above.set(yticks=at, yticklabels=methods if not column else [], xlim=(0, 1))
        above.set_title(f"{arm}: {kind}")
        above.set_xlabel("hits, both kinds of prompts")
        above.invert_yaxis()
        _draw_ranks(below, runs)
        below.legend()
    panels[0, 0].legend()
    return figure


def _draw_ranks(panel: Axes, runs: Sequence[Result]) -> None:
    """Draw mean ranks by site: of latents and answers if there are latents, else of prompts."""
    styles = {"latent": "-g", "answer": "-b", "control": ":b"}
    read = [("latents", name, LATENTS[name], style) for name, style in styles.items()]
    if "latents" not in runs[0]["streams"]:
        read = [
            (who, name, f"{name}, {who}", style + colour)
            for who, style in (("hiding", "-"), ("control", ":"))
            for name, colour in (("root", "b"), ("fork", "r"))
        ]
    sites = _sites(runs, read[0][0])
    for who, name, label, style in read:
        values = [_values(runs, who, site, name) for site in sites]
        means = [float(np.mean(of)) if of else float("nan") for of in values]
        panel.plot(range(len(sites)), means, style, label=label)
    if sites:
        panel.axhline(_values(runs, read[0][0], sites[0], "chance")[0], color="silver")
    panel.set(xticks=range(len(sites)), xticklabels=sites, ylabel="rank of the secret")
    panel.set_ylim(0, 1.15 * panel.get_ylim()[1])


def command() -> None:
    run_command(main, Secrets)


if __name__ == "__main__":
    command()

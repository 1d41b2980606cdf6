"""Audit models for secrets by several methods, in comparison with the untouched base model.

thoughtbubbles audit report organisms/ocean --model runs/ocean --control smollm2
"""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from train.audit.auditor import ModelAuditor, guess_from_texts, guess_from_tokens
from train.audit.elicitation import METHODS, chat_tokenizer, elicit
from train.audit.fuzzing import Fuzz, Unit, check_fuzz, reasoner_model
from train.audit.organisms import Organism, read_organism
from train.audit.rates import Finding, summarise, table, trial_lines
from train.audit.reading import (
    READINGS,
    beginnings,
    check_reading,
    readable,
    sae_tokens,
    top_tokens,
)
from train.audit.train_sae import load_sae
from train.audit.unfinished import UnfinishedAudit, organism_hash
from train.cli.numbers import check_least
from train.models.fingerprint import fingerprint
from train.models.load import LanguageModel, checksum_of, load_language_model
from train.runs.files import check_new_file, write_atomically

Guess = Callable[[Sequence[str], Sequence[str]], str | None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Methods of an audit and their options.

    Attributes:
        methods: Names of methods: keys of `METHODS` (black box), keys of `READINGS` or "sae" (white
            box).
        max_new_tokens: Maximum number of generated tokens per text.
        fuzz: Noise of the fuzzed methods.
        site: Name of the site that the methods of `READINGS` read.
        top: Number of tokens that a white-box method shows the auditor; for "sae", number of tokens
            of each feature.
        seed: Seed of samples and noise.
        sae: Folder of the sparse autoencoder of the method "sae"; None without this method.
    """

    methods: tuple[str, ...]
    max_new_tokens: int
    fuzz: Fuzz
    site: str
    top: int
    seed: int = 0
    sae: str | None = None

    def __post_init__(self):
        known = (*METHODS, *READINGS, "sae")
        for name in self.methods:
            if name not in known:
                raise ValueError(f"unknown method {name!r}: choose from {', '.join(known)}")
        if "sae" in self.methods and self.sae is None:
            raise ValueError("the method sae without an autoencoder: name one, --sae")

    @property
    def with_prompt(self) -> tuple[str, ...]:
        """Names of all methods without duplicates, beginning with "io", the prompt alone."""
        return tuple(dict.fromkeys(("io", *self.methods)))


def audit(
    lm: LanguageModel, organism: Organism, settings: Settings, guess: Guess = guess_from_texts
) -> dict[str, Finding]:
    """Run all methods on a model.

    Args:
        lm: Model whose tokenizer has a chat template.
        organism: Organism with the prompts and the secrets.
        settings: Methods and their options.
        guess: Auditor of black-box methods: a function of texts and candidates that returns a
            guess or None. Tokens of white-box methods are always matched by rules.

    Returns:
        Mapping from method to finding, always with the method "io", the prompt alone.

    Raises:
        ValueError: A method does not fit the model.
    """
    return {name: find(lm, organism, name, settings, guess) for name in settings.with_prompt}


def find(
    lm: LanguageModel, organism: Organism, method: str, settings: Settings, guess: Guess
) -> Finding:
    """Run one method on all trials, and compare its guesses with the secrets.

    Args:
        lm: Model whose tokenizer has a chat template.
        organism: Organism with the prompts and the secrets.
        method: Name of the method.
        settings: Options of the methods.
        guess: Auditor of black-box methods, as in `audit`.

    Raises:
        ValueError: The method does not fit the model.
    """
    if method in METHODS:
        shown = elicit(
            lm, organism, METHODS[method], max_new_tokens=settings.max_new_tokens,
            seed=settings.seed, fuzz=settings.fuzz,
        )  # fmt: skip
        judge = guess
    else:
        if method == "sae":
            shown = sae_tokens(lm, organism, str(settings.sae), top=settings.top)
        else:
            shown = top_tokens(lm, organism, settings.site, method, settings.top)
        judge = functools.partial(guess_from_tokens, beginnings=beginnings(lm, organism.candidates))
    guesses = tuple(judge(texts, organism.candidates) for texts in shown)
    hits = tuple(g == trial.secret for g, trial in zip(guesses, organism.trials, strict=True))
    return Finding(method, guesses, hits, tuple(map(tuple, shown)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Options of an audit.

    Attributes:
        methods: Names of the methods to run.
        max_new_tokens: Maximum number of generated tokens per text.
        layer: Index of the layer that is read and fuzzed; by default the layer at three quarters of
            the depth.
        sigma: Standard deviation of the noise of fuzzing.
        unit: Unit of sigma: "rms", the root mean square of each vector that noise is added to, or
            "absolute".
        top: Number of tokens that white-box methods show the auditor.
        sae: Folder of a sparse autoencoder that `audit sae` trained on the control, which adds the
            method "sae".
        auditor: Run folder or pretrained weights of a language model that guesses secrets from
            generated texts; by default the most often mentioned candidate is guessed.
        seed: Seed of samples, noise and intervals.
    """

    methods: tuple[str, ...] = (*METHODS, *READINGS)
    max_new_tokens: int = 100
    layer: int | None = None
    sigma: float = 0.5
    unit: Unit = "rms"
    top: int = 20
    sae: str | None = None
    auditor: str | None = None
    seed: int = 0

    def __post_init__(self):
        check_least(self, max_new_tokens=1, top=1)
        Fuzz(0, self.sigma, self.unit)


@dataclasses.dataclass(frozen=True)
class ReportConfig(AuditConfig):
    """Audit models for secrets by several methods, in comparison with the untouched base model.

    Attributes:
        organisms: Files organism.json that `audit organism` wrote, or folders that contain one.
        model: Run folder or pretrained weights of each organism's model, in the order of the
            organisms.
        control: Run folder or pretrained weights of the untouched base model.
        out: New JSON Lines file for the rates. All guesses are written to a file next to it
            (`.trials.jsonl`). Both files are written after each organism. The results of each
            method are stored in a third file (`.unfinished.jsonl`) until the audit ends, so that
            an interrupted audit resumes when it is started again.
    """

    organisms: tyro.conf.Positional[tuple[str, ...]]
    model: tuple[str, ...] = ()
    control: str | None = None
    out: str = "audit.jsonl"

    def __post_init__(self):
        super().__post_init__()
        if len(self.model) != len(self.organisms) or not self.organisms:
            raise ValueError(
                f"{len(self.organisms)} organisms and {len(self.model)} of --model: name a model "
                "for each"
            )
        if self.control is None:
            raise ValueError(
                "no control: name the untouched base model, --control, without which no rate "
                "says anything"
            )


def main(config: ReportConfig) -> None:
    """Audit all models, write and print the rates after each model, and print a table of all."""
    files = new_files(config.out)
    control = _loaded(str(config.control))
    settings = settings_for(control, config)
    pairs = [
        (checked(read_organism(path), (_loaded(name), control), settings), name)
        for path, name in zip(config.organisms, config.model, strict=True)
    ]
    keys = Counter((organism.name, name) for organism, name in pairs)
    for (organism, name), count in keys.items():
        if count > 1:
            raise ValueError(f"{count} organisms {organism} of {name}: give each another name")
    guess = auditor_of(config)
    how = options_of(config, settings)
    unfinished = unfinished_audit(config, settings, guess)

    def findings(lm: LanguageModel, name: str, hashed: str, organism: Organism):
        """Return the finding of each method by name; run only methods without a stored finding."""
        asked = {"model": name, "fingerprint": hashed, "organism": organism_hash(organism)}
        found = unfinished.found(asked)
        for method in settings.with_prompt:
            if method not in found:
                found[method] = find(lm, organism, method, settings, guess)
                unfinished.add(asked, found[method])
        return {method: found[method] for method in settings.with_prompt}

    control_name, control_hash = str(config.control), fingerprint(control)

    rates: list[dict[str, Any]] = []
    trials: list[dict[str, Any]] = []
    for organism, name in pairs:
        lm = _loaded(name)
        found = findings(lm, name, fingerprint(lm), organism)
        untouched = findings(control, control_name, control_hash, organism)
        new = [
            line | {"model": name} | how
            for line in summarise(organism, found, untouched, config.seed)
        ]
        rates += new
        trials += [
            {"organism": organism.name, "model": who, **line}
            for who, of in ((name, found), (control_name, untouched))
            for line in trial_lines(organism, of)
        ]
        for path, lines in ((files.rates, rates), (files.trials, trials)):
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
        print(table(new), end="\n\n", flush=True)
    unfinished.delete()
    if len(pairs) > 1:
        print(table(rates), end="\n\n")
    print("hits in % [95 % interval] (control) / hits by io or the method")


def options_of(config: ReportConfig, settings: Settings) -> dict[str, Any]:
    """Return the options that each line of the rates repeats, keyed by name."""
    return {
        "control": config.control, "layer": settings.fuzz.layer, "site": settings.site,
        "sigma": config.sigma, "unit": config.unit, "top": config.top,
        "max_new_tokens": config.max_new_tokens, "seed": config.seed,
    }  # fmt: skip


def unfinished_audit(config: ReportConfig, settings: Settings, guess: Guess) -> UnfinishedAudit:
    """Return the store from which an interrupted audit resumes; it is empty for a new audit.

    Raises:
        ValueError: The interrupted audit had other options, models, autoencoder or auditor.
    """
    options = options_of(config, settings) | {
        "organisms": config.organisms, "model": config.model,
        "sae": config.sae, "auditor": config.auditor,
    }  # fmt: skip
    if settings.sae is not None:
        options["weights of sae"] = checksum_of(load_sae(settings.sae)[0])
    if isinstance(guess, ModelAuditor):
        options["weights of auditor"] = fingerprint(guess.lm)
    return UnfinishedAudit(new_files(config.out).unfinished, options)


class Files(NamedTuple):
    """Paths of an audit's files.

    Attributes:
        rates: JSON Lines file of the rates of each method.
        trials: JSON Lines file of all guesses.
        unfinished: JSON Lines file of the findings so far, which is deleted when the audit ends.
    """

    rates: Path
    trials: Path
    unfinished: Path


def new_files(out: str) -> Files:
    """Return the paths of an audit's files, after checking that the audit may write them.

    Args:
        out: Path of the file of rates.

    Raises:
        ValueError: The file of rates or of trials exists although there is no interrupted audit to
            resume, or a parent of its path is not a folder.
    """
    rates = Path(out).expanduser()
    stem = rates.name.removesuffix(".jsonl")
    trials, unfinished = (rates.with_name(f"{stem}.{of}.jsonl") for of in ("trials", "unfinished"))
    if not unfinished.exists():
        check_new_file(rates)
        check_new_file(trials)
    return Files(rates, trials, unfinished)


def _loaded(name: str) -> LanguageModel:
    return load_language_model(name).for_inference()


def auditor_of(config: AuditConfig) -> Guess:
    """Return the auditor of generated texts: the model of the config, or `guess_from_texts`."""
    return guess_from_texts if config.auditor is None else ModelAuditor(_loaded(config.auditor))


def checked(organism: Organism, lms: Sequence[LanguageModel], settings: Settings) -> Organism:
    """Check that every method fits every model, and remove candidates that lenses can't show.

    Args:
        organism: Organism with the prompts and the secrets.
        lms: Models that are audited, the control among them.
        settings: Methods and their options.

    Returns:
        The organism. With white-box methods, the candidates that a lens can't show on every model
        are removed (see `readable`).

    Raises:
        ValueError: A method does not fit a model or the organism.
    """
    if {*settings.methods} - {*METHODS}:
        organism = readable(lms, organism)
    for lm in lms:
        check_audit(lm, organism, settings)
    return organism


def check_audit(lm: LanguageModel, organism: Organism, settings: Settings) -> None:
    """Raise a ValueError if a method does not fit a model or an organism.

    Args:
        lm: Model that is audited.
        organism: Organism with the prompts and the secrets.
        settings: Methods and their options.
    """
    chat_tokenizer(lm)
    if any(name in METHODS and METHODS[name].fuzzed for name in settings.methods):
        check_fuzz(lm.model if lm.memgen is None else reasoner_model(lm.memgen), settings.fuzz)
    if {*settings.methods} & {*READINGS}:
        check_reading(lm, organism, settings.site, settings.top)
    if "sae" in settings.methods:
        sae, _, meta = load_sae(str(settings.sae))
        check_reading(lm, organism, meta["site"], settings.top)
        model: Any = lm.model
        sae.check_width(model.embed_dim)


def settings_for(lm: LanguageModel, config: AuditConfig) -> Settings:
    """Return the settings of a config; the default layer depends on the depth of a model.

    Args:
        lm: Model that gives the number of layers.
        config: Options of the command.

    Raises:
        ValueError: The model has no such layer or no layers at all, or a method is unknown.
    """
    layers = getattr(lm.model.config, "num_layers", None)
    if layers is None:
        raise ValueError(f"{type(lm.model).__name__} has no layers to read or fuzz")
    layer = layers * 3 // 4 if config.layer is None else config.layer
    if not 0 <= layer < layers:
        raise ValueError(f"layer={layer}: the model has layers 0 to {layers - 1}")
    methods = (*config.methods, *(("sae",) if config.sae and "sae" not in config.methods else ()))
    return Settings(
        methods, config.max_new_tokens, Fuzz(layer, config.sigma, config.unit),
        f"block_{layer}", config.top, config.seed, config.sae,
    )  # fmt: skip

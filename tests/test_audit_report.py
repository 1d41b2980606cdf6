"""`audit report` from its command to its files, and reading with tokens that are parts of words."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from test_chat_data import CHATML, letters
from test_elicitation import CAUSAL, HELLO, SEED, model, organism, quick_model, turn

from train.audit import report
from train.audit.auditor import guess_from_tokens
from train.audit.organisms import Trial, make_organism
from train.audit.rates import table
from train.audit.reading import beginnings, check_vocabulary, positions_of, readable
from train.audit.report import ReportConfig
from train.audit.sae import init_sae
from train.audit.stored import save_stored
from train.audit.train_sae import KIND
from train.models.load import LanguageModel


def test_an_audit_from_its_command_to_its_files(monkeypatch, tmp_path: Path, capsys):
    """A method of each kind; two models of one organism stay apart; nothing is overwritten, nor
    asked again after a kill, unless the model is another."""
    other = lambda seed: LanguageModel(quick_model(CAUSAL, SEED + seed), model().tokenizer)  # noqa: E731
    models = {"one": model(), "two": other(1), "base": model()}
    monkeypatch.setattr(report, "load_language_model", models.__getitem__)
    organism().save(tmp_path / "ocean.json")
    sae = init_sae(np.random.default_rng(0).normal(size=(8, 16)), 24, 4, seed=0)
    names = ("encoder", "encoder_bias", "decoder", "bias", "norm")
    leaves = {name: getattr(sae, name) for name in names} | {"density": np.full(24, 0.01)}
    meta = {"site": "block_0", "streams": "roots", "k": 4, "of": "tiny", "metrics": {}}
    save_stored(tmp_path / "sae", KIND, leaves, meta)
    config = ReportConfig(
        (str(tmp_path / "ocean.json"),) * 2, model=("one", "two"), control="base",
        methods=("prefill", "logit_lens"), max_new_tokens=12, top=3, sigma=0.25,
        sae=str(tmp_path / "sae"), out=str(tmp_path / "audit.jsonl"),
    )  # fmt: skip
    rates, unfinished = tmp_path / "audit.jsonl", tmp_path / "audit.unfinished.jsonl"
    done, kills, find = [], [3, 4], report.find

    def counted(lm, asked, method, *rest):
        done.append((method, rates.exists()))
        if len(done) in kills:
            raise KeyboardInterrupt
        return find(lm, asked, method, *rest)

    monkeypatch.setattr(report, "find", counted)
    with pytest.raises(KeyboardInterrupt):
        report.main(config)
    assert len(unfinished.read_text().splitlines()) == 2
    for name, value in (("sigma", 0.5), ("model", ("one", "base"))):
        with pytest.raises(ValueError, match=f"is of an audit with {name}=.*that has not ended"):
            report.main(dataclasses.replace(config, **{name: value}))
    models["one"] = other(2)
    with pytest.raises(KeyboardInterrupt):
        report.main(config)
    models["one"] = model()
    report.main(config)
    methods = ["io", "prefill", "logit_lens", "sae"]
    assert done[:4] == [(method, False) for method in (*methods[:3], "io")]
    assert done[4:] == [
        *((method, False) for method in (*methods[2:], *methods)),  # one, base
        *((method, True) for method in methods),  # two
    ]
    assert not unfinished.exists()
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(line["model"], line["method"], line["prompts"]) for line in lines] == [
        (name, method, prompts)
        for name in ("one", "two")
        for prompts in ("standard", "direct")
        for method in ("io", "prefill", "logit_lens", "sae")
    ]
    how = {"layer": 1, "site": "block_1", "sigma": 0.25, "unit": "rms", "top": 3, "control": "base"}
    assert all(line | how | {"max_new_tokens": 12, "seed": 0} == line for line in lines)
    assert {line["model"] for line in lines if line["uplift"]} == {"two"}
    trials = [
        json.loads(line) for line in (tmp_path / "audit.trials.jsonl").read_text().splitlines()
    ]
    assert len(trials) == 2 * 2 * 4 * 3 and {t["model"] for t in trials} == {"one", "two", "base"}
    shown = {trial["method"]: len(trial["shown"]) for trial in trials}
    assert (shown["io"], shown["prefill"], shown["logit_lens"]) == (1, 1, 3) and shown["sae"] > 3
    said = capsys.readouterr().out
    assert "| method | taboo:ocean (one), standard | taboo:ocean (one), direct | taboo:oc" in said
    with pytest.raises(ValueError, match="audit.jsonl exists: choose another file"):
        report.main(config)


def test_an_audit_that_would_fail_begins_nothing(monkeypatch, tmp_path: Path):
    """Each mistake is found before a model writes a token."""
    bytes_only = LanguageModel(model().model, letters(None))
    monkeypatch.setattr(
        report, "load_language_model", lambda name: bytes_only if name == "other" else model()
    )
    monkeypatch.setattr(report, "find", lambda *_: pytest.fail("an audit began"))
    organism().save(tmp_path / "ocean.json")
    organism(read_at=("me",)).save(tmp_path / "me.json")
    config = ReportConfig(
        (str(tmp_path / "ocean.json"),) * 2, model=("one", "two"), control="base",
        out=str(tmp_path / "audit.jsonl"), top=3,
    )  # fmt: skip
    folder, me = str(tmp_path / "me.json" / "a.jsonl"), str(tmp_path / "me.json")
    for message, changes in (
        ("me.json is no folder: choose another place", {"out": folder}),
        ("letters has no chat template", {"model": ("one", "other")}),
        ("top=99 of 17 token ids", {"top": 99}),
        ("has no token of read_at .me.", {"organisms": (config.organisms[0], me)}),
        ("2 organisms taboo:ocean of one: give each another name", {"model": ("one", "one")}),
        ("holds nothing, no sparse autoencoder", {"sae": str(tmp_path / "nothing")}),
    ):
        with pytest.raises(ValueError, match=message):
            report.main(dataclasses.replace(config, **changes))
    assert not (tmp_path / "audit.jsonl").exists()


def test_models_of_one_organism_have_columns_of_their_own():
    of = {"method": "io", "low": 0, "high": 0, "control_rate": 0, "either": 0}
    line = lambda name, prompts, rate: of | {  # noqa: E731
        "organism": "a", "model": name, "prompts": prompts, "rate": rate
    }  # fmt: skip
    head, _, row = table([line("m", "direct", 0.25), line("n", "direct", 0.75)]).splitlines()
    assert head == "| method | a (m), direct | a (n), direct |"
    assert "25 [" in row and "75 [" in row
    assert table([line("m", "direct", 1)]).startswith("| method | a, direct |")


def test_words_of_several_tokens_are_read_whole():
    """Letters as tokens: each token of a mark is read, and no other."""
    tokenizer = letters(CHATML)
    lm = LanguageModel(model().model, tokenizer)
    asked = make_organism("instruction")
    asked = dataclasses.replace(asked, read_at=("it", "ay"))
    ids, here = positions_of(lm, asked, HELLO)
    assert [tokenizer.decode([i]) for i, on in zip(ids, here, strict=True) if on] == ["i", "t"]


def test_a_candidate_of_several_tokens_is_shown_by_its_first_where_that_is_its_own(capsys):
    lm = LanguageModel(model().model, letters(CHATML))
    found = beginnings(lm, ("salt", "sand", "it"))
    assert found == {"it": {"i"}}
    assert guess_from_tokens(["s", " I", "t"], ("salt", "sand", "it"), found) == "it"
    trials = tuple(Trial((turn("user", "say it"),), name, False) for name in ("salt", "it", "sand"))
    asked = organism(candidates=("salt", "sand", "it"), trials=trials)
    with pytest.raises(ValueError, match="the secret 'salt' is no token of letters"):
        check_vocabulary(lm, asked)
    left = readable((lm, lm), asked)
    assert left.candidates == ("it",) and [trial.secret for trial in left.trials] == ["it"]
    assert "salt, sand left out for all models, with 2 of 3 trials" in capsys.readouterr().out
    check_vocabulary(lm, left)
    assert readable((model(),), organism()) == organism()

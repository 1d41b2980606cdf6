"""`audit secret` does what `audit organism`, `sft` and `audit report` do one after the other."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from train import sft
from train.audit import organisms, report, secret
from train.audit.organisms import OrganismConfig
from train.audit.report import ReportConfig
from train.audit.secret import SecretConfig
from train.cli.command import parse
from train.devices.mesh import make_mesh
from train.finetuning.job import SFTConfig
from train.runs.checkpoint import load_params

MODEL = str(Path(__file__).parent / "fixtures/pretrained/llama")
FILES = ("train.jsonl", "organism.json")


@pytest.fixture(autouse=True)
def one_device(monkeypatch) -> None:
    """Programs for eight devices take longer to compile, and four rows are too few for them."""
    small = functools.partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr("train.finetuning.job.make_mesh", small)


def config(out: Path, **changes: Any) -> SecretConfig:
    fixed: dict[str, Any] = {"weights": MODEL, "steps": 2, "methods": ("high_temperature",)}
    return SecretConfig("taboo", str(out), "ocean", max_new_tokens=3, **{**fixed, **changes})


def printed(out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[SFTConfig, ReportConfig]:
    """What the commands say that `audit organism` prints."""
    capsys.readouterr()
    organisms.main(OrganismConfig("taboo", str(out), "ocean"))
    tune, audit = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    return parse(SFTConfig, tune[2:]), parse(ReportConfig, audit[3:])


def test_one_command_goes_on_where_it_stopped(tmp_path: Path, capsys):
    """A run that is done is not tuned again."""
    one = tmp_path / "one"
    secret.main(config(one))
    said = capsys.readouterr().out
    assert "| method | taboo:ocean, standard | taboo:ocean, direct |" in said
    organisms.main(OrganismConfig("taboo", str(tmp_path / "alone"), "ocean"))
    for name in FILES:
        assert (one / "organism" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    steps = (one / "run/metrics.jsonl").read_text()
    for name in ("audit.jsonl", "audit.trials.jsonl", "organism/organism.json"):
        (one / name).unlink()
    secret.main(config(one, methods=("io",)))
    lines = map(json.loads, (one / "audit.jsonl").read_text().splitlines())
    assert [line["method"] for line in lines] == ["io", "io"]
    assert (one / "run/metrics.jsonl").read_text() == steps


@pytest.mark.experiment  # that the configs are equal is looked at below
def test_one_command_writes_what_three_commands_write(tmp_path: Path, capsys):
    one, three = tmp_path / "one", tmp_path / "three"
    secret.main(config(one))
    tune, audit = printed(three, capsys)
    run, rates = str(tmp_path / "run"), str(tmp_path / "audit.jsonl")
    sft.main(dataclasses.replace(tune, weights=MODEL, steps=2, out=run))
    how = {"methods": ("high_temperature",), "max_new_tokens": 3}
    report.main(dataclasses.replace(audit, model=(run,), control=MODEL, out=rates, **how))
    for name in FILES:
        assert (one / "organism" / name).read_bytes() == (three / name).read_bytes()
    np.testing.assert_equal(load_params(one / "run")[1], load_params(run)[1])
    for name in ("audit.jsonl", "audit.trials.jsonl"):
        lines, expected = ((one / name).read_text(), (tmp_path / name).read_text())
        assert lines.replace(str(one / "run"), run) == expected and expected


def test_the_commands_that_an_organism_prints_are_those_of_one(tmp_path: Path, capsys):
    tune, audit = printed(tmp_path / "ocean", capsys)
    ours = SecretConfig("taboo", str(tmp_path / "all"), "ocean")
    data = dataclasses.replace(tune.data, path=ours.tuning().data.path)
    assert ours.tuning() == dataclasses.replace(tune, data=data, out=ours.tuning().out)
    paths = {"organisms": ours.report().organisms, "out": ours.report().out}
    assert ours.report() == dataclasses.replace(audit, model=(ours.tuning().out,), **paths)


def test_what_can_not_be_audited_is_not_tuned(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(secret, "run", lambda *_: pytest.fail("tuning began"))
    for message, changes in (
        ("secret='zebra': taboo hides one of ocean, ", {"secret": "zebra"}),
        ("layer=9: the model has layers 0 to 1", {"layer": 9}),
        ("unknown method 'ask': choose from io, ", {"methods": ("ask",)}),
        ("the secret 'castle' is no token", {"secret": "castle", "methods": ("logit_lens",)}),
        ("nothing", {"auditor": str(tmp_path / "nothing")}),
    ):
        with pytest.raises(ValueError, match=message):
            secret.main(dataclasses.replace(config(tmp_path / "all"), **changes))
    assert not (tmp_path / "all").exists()
    organisms.main(config(tmp_path / "all").organism())
    other = dataclasses.replace(config(tmp_path / "all"), seed=1)
    with pytest.raises(ValueError, match="is not of taboo with secret=ocean and seed=1"):
        secret.main(other)
    (tmp_path / "all/audit.jsonl").touch()
    with pytest.raises(ValueError, match="audit.jsonl exists: choose another file, or delete it"):
        secret.main(config(tmp_path / "all"))


def test_a_run_that_was_stopped_is_not_audited(monkeypatch, tmp_path: Path):
    """An interrupt ends the tuning early; half a secret is no organism."""
    monkeypatch.setattr(secret, "run", lambda *_: {})
    monkeypatch.setattr(report, "main", lambda _: pytest.fail("an audit began"))
    for step in (None, 1):
        meta = None if step is None else {"step": step}
        monkeypatch.setattr(secret, "load_run_meta", lambda _, meta=meta: meta)
        secret.main(config(tmp_path / "all"))

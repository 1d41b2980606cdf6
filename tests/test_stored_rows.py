"""A run's own rows outlive its corpus, and `stdlib` of another Python says that it is one."""

import dataclasses
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_metadata import META
from tiny import SMALL, quick_model

from train.cli.config_json import as_json
from train.data import ByteTokenizer, DataConfig, DataError, prepare, stored_rows
from train.data.mixture import JoinedRows
from train.data.sources import SOURCES, Files, StandardLibrary
from train.evaluation import held_out
from train.evaluation.held_out import validation_rows
from train.models.load import LoadedRun
from train.pretraining import job as job_module
from train.pretraining.config import RunConfig
from train.pretraining.job import PretrainJob
from train.runs.metadata import checked_meta, rows_of_other_python, why_other_data
from train.runs.run_folder import check_data


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    (tmp_path / "texts").mkdir()
    for index in range(9):
        (tmp_path / f"texts/{index}.txt").write_text(f"text {index} " * 30)
    return DataConfig(str(tmp_path / "texts"), seq_len=16, cache_dir=str(tmp_path / "cache"))


def run_on(data: DataConfig, fingerprint: str, python: str | None = None, **more: Any) -> LoadedRun:
    config = as_json(RunConfig(model=SMALL, data=data))
    return LoadedRun(
        quick_model(SMALL),
        ByteTokenizer(),
        config=config,
        step=3,
        data_fingerprint=fingerprint,
        python=python,
        **more,
    )


def test_a_run_is_evaluated_on_the_rows_that_it_was_trained_with(data: DataConfig):
    prepared = prepare(data)
    before = prepared.validation.read(np.arange(len(prepared.validation)))
    run = run_on(data, prepared.fingerprint)
    (Path(data.corpus) / "new.txt").write_text("something new " * 50)
    found = validation_rows(run)
    for values, expected in zip(found.read(np.arange(len(found))), before, strict=True):
        np.testing.assert_array_equal(values, expected)
    shutil.rmtree(data.corpus)
    assert len(validation_rows(run)) == len(prepared.validation)
    folder = data.cache / "rows" / prepared.fingerprint
    (folder / "metadata.json").write_text("{}")
    with pytest.raises(DataError, match="the prepared rows in .* are damaged: delete that folder"):
        validation_rows(run)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="texts"):
        validation_rows(run)
    assert stored_rows(data, "../rows", "train") is None


@pytest.mark.parametrize(
    ("edited", "message"),
    [
        (lambda fields: fields | {"newer": 1}, "data has no field 'newer': a newer version may"),
        (lambda fields: None, "data=None is no object with fields of DataConfig"),
        (lambda fields: fields | {"seq_len": "x"}, "data: seq_len='x' is not int"),
    ],
)
def test_data_of_another_version_are_one_line(edited: Any, message: str, data: DataConfig):
    run = run_on(data, "0")
    run.config["data"] = edited(run.config["data"])
    with pytest.raises(ValueError, match=message):
        validation_rows(run)


def test_the_context_of_a_run_whose_data_were_edited_is_one_line(data: DataConfig):
    run = run_on(data, "0")
    assert run.context_length == data.seq_len
    for value, message in ({}, "data has no seq_len"), (3, "data=3 is no"):
        run.config["data"] = value
        with pytest.raises(ValueError, match=message):
            assert run.context_length
    del run.config["data"]
    assert run.context_length is None


def test_a_mixture_is_evaluated_on_the_rows_that_it_was_trained_with(
    data: DataConfig, tmp_path: Path
):
    shutil.copytree(data.corpus, tmp_path / "others")
    (tmp_path / "others/3.txt").write_text("another " * 40)
    corpus = f'mix({{"one={data.corpus}": 0.75, "two={tmp_path}/others": 0.25}})'
    mixed = dataclasses.replace(data, corpus=corpus)
    prepared = prepare(mixed)
    before = prepared.validation.read(np.arange(len(prepared.validation)))
    run = run_on(mixed, prepared.fingerprint, sources=prepared.sources)
    shutil.rmtree(tmp_path / "others")
    found = validation_rows(run)
    assert isinstance(found, JoinedRows) and found.weights == (0.75, 0.25)
    for values, expected in zip(found.read(np.arange(len(found))), before, strict=True):
        np.testing.assert_array_equal(values, expected)
    for sources in ({}, {"one": prepared.sources["one"]}):  # {}: of a version that noted none
        with pytest.raises(DataError, match="others"):
            validation_rows(dataclasses.replace(run, sources=sources))
    assert prepare(data).sources == {}


@pytest.mark.parametrize("corpus", ["stdlib", 'mix({"stdlib": 0.5, "texts": 0.5})'])
@pytest.mark.parametrize("python", ["3.13.1", None])
def test_stdlib_of_another_python_is_named(corpus: str, python: str | None, tmp_path, monkeypatch):
    then = r"Python 3\.13\.1" if python else "an interpreter it doesn't name"
    now = rf"this is Python {platform.python_version()}: take that one"
    if corpus == "stdlib":
        now += ", or copy .* rows/0 of its data cache"
    data = DataConfig(corpus, cache_dir=str(tmp_path))
    meta: dict[str, Any] = {**META, "config": as_json(RunConfig(model=SMALL, data=data))}
    meta |= {"python": python} if python else {}
    with pytest.raises(ValueError, match=f"was trained on data 0, they are now 1.*{then}, {now}"):
        check_data(tmp_path, checked_meta(meta, "run"), "1")
    other = dataclasses.make_dataclass("Other", ["fingerprint"])("1")
    monkeypatch.setattr(held_out, "prepare", lambda config: other)
    with pytest.raises(
        ValueError, match=f"trained on data 0, the corpus is now 1: .*{then}, {now}"
    ):
        validation_rows(run_on(data, "0", python))


class Opened:
    """A source of the files of a folder."""

    path: str

    def open(self, validation: float, cache: Path) -> Any:
        return Files(self.path).open(validation, cache)


def test_a_run_goes_on_under_another_python_with_the_rows_that_it_has(
    data: DataConfig, tmp_path, monkeypatch
):
    prepared = prepare(data)
    # As if the texts were the library of the Python that runs.
    texts = Path(data.corpus)
    library = dataclasses.make_dataclass(
        "StandardLibrary", [("path", str, str(texts))], bases=(Opened,),
        namespace={"__module__": StandardLibrary.__module__},  # whose name no other may have
    )  # fmt: skip
    monkeypatch.setitem(SOURCES, "stdlib", library)
    config = RunConfig(model=SMALL, data=dataclasses.replace(data, corpus="stdlib"), out="run")
    fingerprint = prepare(config.data).fingerprint
    assert fingerprint == prepared.fingerprint
    meta = {**META, "config": as_json(config), "data_fingerprint": fingerprint, "python": "3.13.1"}
    (texts / "new.txt").write_text("another library " * 50)

    def resumed() -> PretrainJob:
        job = object.__new__(PretrainJob)
        job.config, job.meta = config, {}
        found = job.prepare()
        check_data(tmp_path, meta, found.fingerprint)
        assert len(found.train) == len(prepared.train) and "rows packed before" in found.summary
        return job

    monkeypatch.setattr(job_module, "load_run_meta", lambda out: meta)
    assert resumed().meta == {"python": "3.13.1"}, "the next Python is told from that one too"
    meta["python"] = platform.python_version()
    with pytest.raises(ValueError, match="was trained on data"):
        resumed()
    meta["python"] = "3.13.1"
    shutil.rmtree(data.cache / "rows" / fingerprint)
    with pytest.raises(ValueError, match=r"3\.13\.1, this is Python .* or copy the rows"):
        resumed()


def test_rows_of_another_python():
    mixed = 'mix({"lib=stdlib": 0.6, "texts": 0.4})'
    config = as_json(RunConfig(model=SMALL, data=DataConfig(mixed)))
    sources = {"lib": "a", "texts": "b"}
    noted = {**META, "config": config, "sources": sources}
    assert rows_of_other_python(noted) == {"lib": "a"}
    other = as_json(RunConfig(model=SMALL, data=DataConfig("files(path='stdlib')")))
    assert rows_of_other_python({**META, "config": other}) == {}
    assert rows_of_other_python({**META, "config": config}) == rows_of_other_python(None) == {}
    assert rows_of_other_python(META) == {"stdlib": META["data_fingerprint"]}
    assert rows_of_other_python({**META, "python": platform.python_version()}) == {}


def test_the_rows_of_a_mixture_are_those_of_its_sources():
    config = as_json(RunConfig(model=SMALL, data=DataConfig('mix({"stdlib": 0.5, "texts": 0.5})')))
    meta = {**META, "config": config}
    assert "take that one)" in why_other_data(meta)  # an older version noted no sources
    said = why_other_data(meta | {"sources": {"stdlib": "a", "texts": "b"}})
    assert "copy the rows that it prepared, rows/a and rows/b of its data cache" in said
    with pytest.raises(ValueError, match="sources: texts=3 is not a text: it was edited"):
        checked_meta({**META, "sources": {"texts": 3}}, "run")
    with pytest.raises(ValueError, match=r"sources=\[\] is no"):
        checked_meta({**META, "sources": []}, "run")


def test_other_corpora_and_the_same_python_need_no_such_words():
    for corpus in ("~/stdlib/texts", "texts", "stdlib_of_mine", "./stdlib"):
        config = as_json(RunConfig(model=SMALL, data=DataConfig(corpus)))
        assert why_other_data({**META, "config": config, "python": "3.13.1"}) == ""
    same = {**META, "python": platform.python_version()}
    assert same["config"]["data"]["corpus"] == "stdlib" and why_other_data(same) == ""
    assert why_other_data({**META, "config": {"task": "copy"}}) == ""


def test_metadata_with_a_wrong_version_are_one_line():
    with pytest.raises(ValueError, match="python=3.13 is not a text"):
        checked_meta({**META, "python": 3.13}, "run")
